"""Bundles with a narrow cache: the graphs beside torch with the same cache, and what it costs beside a whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.ops.cache.codes import narrowed, widened
from deepseek_trt.validate.backends.torch_watch import rounded_as

pytestmark = pytest.mark.usefixtures("little_greed")
PAGE = 8


@pytest.fixture(scope="session")
def cached(small_v2, bundle_of):
    """A right bundle with such a cache."""
    return lambda cache, **options: bundle_of(
        small_v2.checkpoint, **{"dtype": "float32", "page_size": PAGE, "cache_dtype": cache, **options}
    )


def run(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def validate(bundle: Bundle | Path, *args: Any) -> Any:
    path = bundle if isinstance(bundle, Path) else bundle.path
    return run("validate", path, "--backend", "exported", "--threads", "1", "--json", *args)


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        ("int8", {}),
        ("fp8", {"dtype": "bfloat16", "quantize": "int8"}),
        ("int8", {"dtype": "bfloat16", "by_reference": True}),
        ("fp8", {"dtype": "float16"}),
    ],
)
def test_right_bundles_pass_and_say_what_they_cost(cached, tmp_path, cache: str, options: dict[str, Any]) -> None:
    bundle = cached(cache, **options)
    done = validate(bundle, "--backend", "ort", "--max-kl", "0.1", "--report", tmp_path)
    assert done.exit_code == 0, done.output
    brief = json.loads(done.stdout)
    cost = brief["narrowing"]
    assert cost["cache"] == cache
    each = 3 * (32 + 17 * (4 if options.get("dtype", "float32") == "float32" else 2))  # codes; rope part and a scale
    assert cost["cache_bytes"] == bundle.manifest.cache.bytes_per_token == each < cost["whole_cache_bytes"]
    assert 0 < cost["kl_mean"] < 0.1
    assert cost["formats"] == (["int8"] if "quantize" in options else [])
    assert brief["independent"]["status"] != "differs"
    exported, compiled = (backend["outputs"] for backend in brief["backends"])
    assert {"logits", "latents.0", "latents.2"} <= exported.keys()
    if options.get("dtype") != "float16":
        assert exported["logits"]["tolerance"] < 1e-4
    assert compiled["logits"]["tolerance"] < (1e-3 if "quantize" in options else 2e-2)
    assert f"cache {cache}, " in (tmp_path / "report.html").read_text()


def test_a_cost_beyond_the_limit_is_no_good(cached) -> None:
    done = validate(cached("fp8", dtype="bfloat16", quantize="int8"), "--max-kl", "1e-9")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["passed"] is True


def with_body(bundle: Bundle, into: Path, change: Any, relist: Any) -> Path:
    shutil.copytree(bundle.path, into)
    for graph in ("prefill", "decode"):
        model = onnx.load(into / f"{graph}.onnx", load_external_data=False)
        for function in (f for f in model.functions if f.name.startswith("Mla")):
            change(function)
        onnx.save(model, into / f"{graph}.onnx")
    relist(into)
    return into


def cut_off(function: Any) -> None:
    """Codes are rounded down."""
    (node,) = (n for n in function.node if n.op_type == "Round")
    node.op_type = "Floor"


def larger_steps(function: Any) -> None:
    """Scales are 1 / 126 of the largest."""
    (node,) = (n for n in function.node if "top_f" in n.output)
    node.attribute[0].f = 126.0


def no_product(function: Any) -> None:
    """Scales are taken off the codes they belong to."""
    (node,) = (n for n in function.node if "latents_by_group" in n.output)
    node.op_type = "Sub"


@pytest.mark.parametrize("fault", [cut_off, larger_steps, no_product], ids=lambda fault: fault.__name__)
def test_faults_fail(cached, tmp_path, relist, fault: Any) -> None:
    done = validate(with_body(cached("int8"), tmp_path / "wrong", fault, relist))
    assert done.exit_code == 3
    assert json.loads(done.stdout)["passed"] is False


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_near_tie_of_a_code_is_followed_and_nothing_else(format: str) -> None:
    own = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    theirs = widened(*narrowed(own + 1e-7, 32, format, 32), format, 32)[:, :32]
    assert torch.equal(rounded_as(own, theirs, format, 32, 1e-6)[:, :32], theirs)
    assert torch.equal(rounded_as(own, theirs, format, 32, 1e-6)[:, 32:], own[:, 32:])
    step = own[1, :32].abs().max() / 127
    wrong = theirs.clone()
    wrong[1, 5] += torch.sign(wrong[1, 5]) * (step if format == "int8" else wrong[1, 5].abs() / 8 + step)
    kept = rounded_as(own, wrong, format, 32, 1e-6)
    assert torch.equal(kept[1], own[1])
    assert torch.equal(kept[[0, 2, 3], :32], theirs[[0, 2, 3]])
    wrong[2] = torch.nan
    assert torch.equal(rounded_as(own, wrong, format, 32, 1e-6)[2], own[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "transformers"], "the bundle has a narrow cache, which it does not take"),
        (["--layers", "0"], "--layers compares layers over a whole cache"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(cached, options: list[str], words: str) -> None:
    done = validate(cached("int8"), *options)
    assert done.exit_code == 1
    assert words in done.output


@pytest.mark.parametrize(
    ("format", "options"), [("int8", {"quantize": "int4"}), pytest.param("fp8", {}, marks=pytest.mark.slow)]
)
def test_kernels_pass(cached, format: str, options: dict[str, Any]) -> None:
    """What plugins compute, interpreted: judged as every backend."""
    done = validate(cached(format, **options), "--backend", "kernels")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mtp"], "--mtp drafts over a whole cache"),
        (["--task", "feature-extraction"], "--cache-dtype is for runs of this package that generate text"),
        (["--io", "transformers"], "--cache-dtype is for runs of this package that generate text"),
        (["--inputs-embeds"], "--cache-dtype is for runs of this package that generate text"),
    ],
)
def test_exports_that_cannot_be_are_refused_by_name(small_v2, tmp_path, options: list[str], words: str) -> None:
    done = run("export", small_v2.checkpoint, tmp_path / "out", "--cache-dtype", "int8", *options)
    assert done.exit_code == 1
    assert words in " ".join(done.output.split())


def test_check_counts_the_cache(small_v2) -> None:
    whole, narrow = (
        json.loads(run("check", small_v2.checkpoint, "--json", *more).stdout)["facts"]
        for more in ([], ["--cache-dtype", "int8"])
    )
    assert (whole["cache"], narrow["cache"]) == ("bfloat16", "int8")
    assert narrow["cache_bytes_per_token"] == 3 * (32 + 17 * 2) < whole["cache_bytes_per_token"] == 3 * 48 * 2
    assert np.isclose(narrow["context_tokens"] / whole["context_tokens"], 96 / 66, rtol=1e-3)
    assert len(narrow["capacities"]) == len(whole["capacities"])
