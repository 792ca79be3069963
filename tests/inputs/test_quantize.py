"""export --quantize: presets, files of rules, and what is refused, each in one sentence before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.engines.sessions.graphs import OrtGraphs, TorchGraphs
from deepseek_trt.engines.sessions.opening import choose_backend
from deepseek_trt.engines.sessions.tensorrt.session import TrtSession
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.weights import WeightReader
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.exporter import ExportRequest, export_bundle

SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32, "v_head_dim": 32}
EXPERTS = "model.layers.1.mlp.experts"


def export(*args: Any) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, args)])


def narrow(bundle: Bundle) -> dict[str, str]:
    records = {w.recipe.name: w.recipe for w in bundle.manifest.weights}
    return {name: r.narrow.format for name, r in records.items() if r.narrow and not r.is_scales}


@pytest.mark.parametrize("base", ["v2", "v3"])
@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_presets(made, tmp_path, base: str, preset: str) -> None:
    checkpoint = made(base, **SIZES).path
    done = export(checkpoint, tmp_path / "out", "--quantize", preset)
    assert done.exit_code == 0, done.output
    assert f"note: --quantize '{preset}': " in done.output
    bundle = Bundle.open(tmp_path / "out", verify=True)
    kinds = narrow(bundle)
    stacks = {name for name in kinds if name.startswith(EXPERTS)}
    assert stacks == {f"{EXPERTS}.{stack}" for stack in ("gate_proj", "up_proj", "down_proj")}
    assert {kinds[name] for name in stacks} == {preset}
    assert {kinds[name] for name in kinds.keys() - stacks} == {"int8"}
    linears = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in kinds.keys() - stacks} == {*linears, "lm_head"}
    assert bundle.manifest.quantization.name == preset
    reader = WeightReader(bundle)
    for name in kinds:
        assert reader.records[f"{name}_scale"].dtype == "float16"


def feeds(bundle: Bundle, graph: str = "prefill") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"batch_size": 2, "sequence_length": 5, "pages": 4, "table": 1, "past_sequence_length": 0}
    made: dict[str, np.ndarray] = {}
    for t in bundle.graph(graph).inputs:
        shape = [sizes.get(d, 5) if isinstance(d, str) else d for d in t.dims]
        if t.name == "page_table":
            made[t.name] = np.array([[1], [2]], dtype=np.int32)
        elif t.name == "sequence_lengths":
            made[t.name] = np.array([5, 3], dtype=np.int32)
        elif t.name == "attention_mask":
            made[t.name] = np.ones(shape, dtype=np.int64)
        elif t.name == "position_ids":
            made[t.name] = np.arange(5)[None].repeat(2, 0)
        elif t.dtype.startswith("int"):
            made[t.name] = rng.integers(0, 40, shape).astype(t.dtype) * (t.name == "input_ids")
        else:
            made[t.name] = (rng.standard_normal(shape) * (t.name == "inputs_embeds")).astype(np.float32)
    return made


@pytest.mark.parametrize("preset", ["int8", "int4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"all_logits": True},
        {"logits_to_keep": 3},
        {"io": "transformers"},
        {"inputs_embeds": True},
        {"task": "feature-extraction", "hidden_states": True},
        {"task": "feature-extraction", "no_cache": True},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_any_graph_computes_what_torch_does(made, tmp_path, preset: str, options: dict[str, Any]) -> None:
    checkpoint = made("v3", **SIZES, attention_bias=True).path
    bundle = export_bundle(ExportRequest(checkpoint, tmp_path / "out", quantize=preset, **options)).bundle
    graph = bundle.manifest.graphs[0].name
    given = feeds(bundle, graph)
    ours, theirs = OrtGraphs(bundle).run(graph, given), TorchGraphs(bundle).run(graph, given)
    for name in theirs:
        if "present" not in name:
            assert np.abs(ours[name] - theirs[name]).max() <= 2e-5 * np.abs(theirs[name]).max(), name


def rules(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "rules.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_file_mixes_formats_of_linear_layers(made, tmp_path) -> None:
    checkpoint = made("v2", **SIZES).path
    file = rules(
        tmp_path,
        [
            {"pattern": "*.o_proj.*", "format": "int4"},
            {"pattern": "lm_head.weight", "format": "int8", "group": 32, "method": "least_squares"},
            {"pattern": f"{EXPERTS}.*", "format": "int8"},
        ],
    )
    bundle = export_bundle(ExportRequest(checkpoint, tmp_path / "out", quantize=str(file))).bundle
    kinds = narrow(bundle)
    assert kinds["model.layers.0.self_attn.o_proj.weight"] == "int4"
    assert kinds["lm_head.weight"] == kinds[f"{EXPERTS}.up_proj"] == "int8"
    assert len(kinds) == 2 + 1 + 3
    assert bundle.manifest.quantization.rules[0].method == "least_squares"
    given = feeds(bundle)
    ours, theirs = OrtGraphs(bundle).run("prefill", given), TorchGraphs(bundle).run("prefill", given)
    assert np.abs(ours["logits"] - theirs["logits"]).max() <= 2e-5 * np.abs(theirs["logits"]).max()


OTHER = {"pattern": "*", "format": "int8"}
WRONG = {
    "no json": ("[", "is not JSON"),
    "no list": ({"pattern": "*"}, "does not hold a list of rules"),
    "an empty list": ([], "does not hold a list of rules"),
    "no object": (["*"], r"\[0\] is '\*', where an object is needed"),
    "an unknown key": ([{**OTHER, "bits": 4}], r"\[0\]\.bits is a key that nothing here knows"),
    "no format": ([{"pattern": "*"}], r"\[0\]\.format is missing"),
    "no pattern": ([{"format": "int4"}], r"\[0\]\.pattern is missing"),
    "another format": ([{**OTHER, "format": "fp4"}], r"\[0\]\.format is 'fp4', where one of int8, int4, fp8 is needed"),
    "a format that is a list": ([{**OTHER, "format": ["int4"]}], r"\[0\]\.format is "),
    "another method": ([{**OTHER, "method": "gptq"}], r"\[0\]\.method is 'gptq'"),
    "another group": ([{**OTHER, "group": 64}], r"\[0\]\.group is 64: groups are of 32 numbers"),
    "a group of true": ([{**OTHER, "group": True}], r"\[0\]\.group is True"),
    "a key twice": ('[{"pattern": "*", "pattern": "*", "format": "int8"}]', "the key 'pattern' twice"),
    "a pattern of nothing": ([OTHER, {**OTHER, "pattern": "*.w7"}], r"\[1\]\.pattern '\*\.w7' matches no tensor"),
    "a router": (
        [{**OTHER, "pattern": "*.mlp.gate.weight"}],
        "matches only model.layers.1.mlp.gate.weight and the like",
    ),
    "what was matched before": ([OTHER, {**OTHER, "pattern": "lm_head*"}], "matches only what rules before it match"),
    "experts half": ([{**OTHER, "pattern": f"{EXPERTS}.up_proj"}], "of a layer's experts must be narrow alike"),
    "experts mixed": (
        [{**OTHER, "pattern": f"{EXPERTS}.up_proj"}, {"pattern": f"{EXPERTS}.*", "format": "int4"}],
        "of a layer's experts must be narrow alike",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_files_that_are_wrong(made, tmp_path, what: str) -> None:
    content, words = WRONG[what]
    done = export(made("v2", **SIZES).path, tmp_path / "out", "--quantize", rules(tmp_path, content))
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert re.search(words, line), line
    assert "rules.json" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantize", "int5"], "--quantize 'int5': must be one of int8, int4, fp8, keep, none, or"),
        (["--quantize", "/"], "--quantize '/' cannot be read"),
        (["--quantize", "int4", "--by-reference"], "leave out --by-reference"),
        (["--quantize", "int4", "--allow-nonfinite"], "leave out --allow-nonfinite"),
    ],
)
def test_options_that_contradict(made, tmp_path, options: list[str], words: str) -> None:
    done = export(made("v2", **SIZES).path, tmp_path / "out", *options)
    assert done.exit_code == 1
    assert words in done.output
    assert not (tmp_path / "out").exists()


def test_rows_that_fit_no_group_stay_whole_and_are_said(made, tmp_path) -> None:
    done = export(
        made("v2", **{**SIZES, "q_lora_rank": 24, "moe_intermediate_size": 24}).path,
        tmp_path / "out",
        "--quantize",
        "int4",
    )
    assert done.exit_code == 0, done.output
    assert "weights stay whole, as their rows are no multiple of 32 numbers: " in done.output
    kinds = narrow(Bundle.open(tmp_path / "out"))
    assert not any(name.startswith(EXPERTS) or "q_b_proj" in name for name in kinds)
    assert "lm_head.weight" in kinds
    file = rules(tmp_path, [{"pattern": "*q_b_proj*", "format": "int8"}])
    done = export(tmp_path / "checkpoint", tmp_path / "other", "--quantize", file)
    assert "q_b_proj.weight [40, 24] has rows of 24 numbers, no multiple of 32" in done.output


def test_nothing_that_fits_is_refused(made, tmp_path) -> None:
    done = export(made("v2", hidden_size=40, q_lora_rank=24).path, tmp_path / "out", "--quantize", "int8")
    assert done.exit_code == 1
    assert "no weight has rows of a multiple of 32 numbers" in done.output


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(made, tmp_path, value: float) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"

    def stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][3, 5] = value
        return tensors

    done = export(made("v2", stored=stored, **SIZES).path, tmp_path / "out", "--quantize", "int4")
    assert done.exit_code == 1
    assert f"1 weights are NaN or infinite, in 1 tensors of model.safetensors: {name} (1)" in done.output


def test_check_counts_narrow_bytes_of_engines_too(made) -> None:
    checkpoint = made("v2", **SIZES).path

    def facts(*options: str) -> dict[str, Any]:
        done = CliRunner().invoke(main, ["check", str(checkpoint), "--json", *options])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["facts"]

    whole, small = facts(), facts("--quantize", "int4")
    assert whole["parameters"] == small["parameters"]
    assert whole["active_parameters"] == small["active_parameters"]
    sizes = [{n["step"]: n for n in f["needs"]} for f in (whole, small)]
    assert sizes[1]["export"]["disk"] < sizes[0]["export"]["disk"]
    assert "export --by-reference" not in sizes[1]
    engines = "engines on a GPU, without cache"
    assert sizes[1][engines]["memory"] < sizes[0][engines]["memory"]
    assert not sizes[1][engines]["refused"]


def test_tensorrt_asks_for_plans_alone(made, tmp_path) -> None:
    bundle = export_bundle(ExportRequest(made("v2", **SIZES).path, tmp_path / "out", quantize="int8")).bundle
    assert choose_backend(bundle, "tensorrt").backend == "tensorrt"
    with pytest.raises(BundleError, match="make it with deepseek-trt build"):
        TrtSession(bundle, 4)


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_generate_widens_no_weight_for_good(made, tmp_path, monkeypatch, backend: str) -> None:
    """ONNX Runtime computes constants once where it may: of codes and scales the whole model in float32."""
    bundle = export_bundle(ExportRequest(made("v2", **SIZES).path, tmp_path / "out", quantize="int4")).bundle
    real, folded = ort.InferenceSession, []

    def opened(model: Any, options: Any, *args: Any, disabled_optimizers: list[str], **more: Any) -> Any:
        folded.append("ConstantFolding" not in disabled_optimizers)
        return real(model, options, *args, disabled_optimizers=disabled_optimizers, **more)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    args = ["--token-ids", "3,4,5", "--greedy", "--max-new-tokens", "3", "--backend", backend, "--threads", "1"]
    done = CliRunner().invoke(main, ["generate", str(bundle.path), *args])
    assert done.exit_code == 0, done.output
    assert folded == ([False, False] if backend == "ort" else [])


def test_a_rerun_with_the_same_rules_does_nothing_and_with_others_refuses(made, tmp_path) -> None:
    checkpoint = made("v2", **SIZES).path
    for preset, fresh, code in (("int8", True, 0), ("int8", False, 0), ("int4", None, 1)):
        done = export(checkpoint, tmp_path / "out", "--quantize", preset, "--json")
        assert done.exit_code == code
        if code == 0:
            said = json.loads(done.stdout)
            assert said["fresh"] is fresh
            assert said["quantization"]["name"] == "int8"
