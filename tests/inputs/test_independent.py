"""validate does not share its reader with what it proves: transformers reads the checkpoint's own files beside it.

Source of every right value: transformers 5.24, by its own config reader and weight loader, in float32.
"""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from deepseek_trt.cli.main import main
from deepseek_trt.cli.validate import EXIT_ACCURACY
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BackendError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.reading import source
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.header import read_header
from deepseek_trt.export.reading.weight_files import INDEX_FILE
from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.cases import long_cases
from deepseek_trt.validate.independent import oracle
from deepseek_trt.validate.independent.differences import known_differences
from deepseek_trt.validate.report.html import render_html
from deepseek_trt.validate.request import ValidateRequest

pytest.importorskip("transformers", reason="transformers is the test extra's")
pytestmark = pytest.mark.filterwarnings("default")  # other people's
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _run_in_full(monkeypatch):
    """Little greed, and transformers as far as it goes, which tests/validate leaves out."""
    monkeypatch.setattr(long_cases, "GREEDY_STEPS", 1)
    monkeypatch.setattr(oracle, "MOST_PARAMETERS", 20e9)


def export(checkpoint, tmp_path, **options) -> Bundle:
    return export_bundle(ExportRequest(checkpoint, tmp_path / "out", **{"page_size": 8, **options})).bundle


def report_of(bundle, *backends, **options):
    backends = backends or ("torch",)
    return validate_bundle(ValidateRequest(bundle.path, backends, threads=1, **options)).report


def validate(bundle, *options):
    return CliRunner().invoke(main, ["validate", str(bundle.path), "--threads", "1", "--backend", "torch", *options])


def test_by_default_transformers_agrees_and_the_report_says_so_first(made, tmp_path):
    bundle = export(made("v2").path, tmp_path)
    done = validate(bundle, "--report", str(tmp_path / "report"))
    assert done.exit_code == 0, done.output
    version = importlib.metadata.version("transformers")
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"transformers {version}, from the checkpoint's own files: logits of 47 tokens agree with")
    found = json.loads((tmp_path / "report" / "report.json").read_text())["independent"]
    assert (found["status"], found["tokens"], found["output"]) == ("agrees", 47, "logits")
    assert found["max_relative"] < found["tolerance"] < 1e-5
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.index("Independent check") < page.index("</section>")  # in the first box
    assert "47 tokens agree with the reference" in page


def test_a_cut_and_rounded_model_is_compared_as_it_was_exported(made, tmp_path):
    bundle = export(made("v3", num_hidden_layers=3).path, tmp_path, dtype="bfloat16", num_layers=2)
    assert report_of(bundle).independent.status == "agrees"


def test_an_fp8_checkpoint_is_dequantised_by_transformers_itself(made, tmp_path):
    def stored(tensors):
        made_of = {}
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                scale = tensor.abs().max() / 400
                made_of[name] = (tensor / scale).to(torch.float8_e4m3fn)
                made_of[f"{name}_scale_inv"] = scale.reshape(1, 1)
            else:
                made_of[name] = tensor
        return made_of

    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    bundle = export(made("v3", stored=stored, quantization_config=fp8).path, tmp_path, dtype="bfloat16")
    assert report_of(bundle).independent.status == "agrees"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"rope_interleave": False}, {"rope_interleave": True}),  # which the reference's weights read for themselves
        ({"routed_scaling_factor": 2.5}, {"routed_scaling_factor": 2.4}),
        ({"rope_theta": 10000.0}, {"rope_theta": 10500.0}),
        ({"norm_topk_prob": True}, {"norm_topk_prob": False}),
    ],
)
def test_a_key_of_config_json_that_is_read_wrongly_fails(made, tmp_path, monkeypatch, written, read):
    """Export and reference are wrong alike: without transformers only the first of these is seen."""
    checkpoint = made("v3", **written).path
    real = source.read_config
    with monkeypatch.context() as patch:
        patch.setattr(source, "read_config", lambda path: real(path) | read)
        bundle = export(checkpoint, tmp_path)
    done = validate(bundle)
    assert done.exit_code == EXIT_ACCURACY, done.output
    assert done.stdout.rstrip().endswith("failed")
    if "rope_interleave" not in read:
        assert "DIFFER from the reference" in done.stdout.splitlines()[0]
        assert report_of(bundle, independent=False).passed


@pytest.fixture
def stale(made, tmp_path, monkeypatch):
    """The bundle of a reader that takes the index's stale shard, where model.safetensors is what counts."""
    found = made("v2")
    old = {name: t + 0.1 for name, t in found.tensors.items()}
    save_file(old, found.path / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (found.path / INDEX_FILE).write_text(json.dumps(index))

    def stale_tensors(root):
        shard = root / "model-00001-of-00001.safetensors"
        return Checkpoint(root, {t.name: t for t in read_header(shard)}, (shard,))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "open", stale_tensors)
        return export(found.path, tmp_path)


def test_a_stale_index_that_is_believed_fails(stale):
    """By transformers, and by the reference's own weights, which are looked up apart from export's reader."""
    report = report_of(stale)
    assert not report.passed
    assert not report.backends[0].passed
    alone = report_of(stale, independent=False)
    assert not alone.passed


def test_without_transformers_the_first_line_says_what_is_not_proven(made, tmp_path, monkeypatch):
    bundle = export(made("v2").path, tmp_path)
    real = importlib.metadata.version

    def version(name):
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    done = validate(bundle)
    assert done.exit_code == 0, done.output
    first = done.stdout.splitlines()[0]
    assert first.startswith("NOT proven: no independent implementation has checked how config.json is read")
    assert "transformers is not installed: pip install" in first
    report = report_of(bundle)
    assert (report.independent.status, report.independent.max_relative) == ("absent", None)
    assert "NOT proven" in render_html(report)
    required = validate(bundle, "--independent")
    assert "--independent: transformers is not installed" in required.output + str(required.exception)
    assert required.exit_code == 1
    assert "hashing" not in required.stderr  # before any work


def test_it_can_be_left_out_and_is_too_much_above_a_size(made, tmp_path, monkeypatch):
    bundle = export(made("v2").path, tmp_path)
    assert "--no-independent" in validate(bundle, "--no-independent").stdout.splitlines()[0]
    monkeypatch.setattr(oracle, "MOST_PARAMETERS", 1000)
    assert "--independent runs it" in report_of(bundle).independent.summary
    assert report_of(bundle, independent=True).independent.status == "agrees"
    monkeypatch.setattr(oracle, "available_memory", lambda: 2**20)
    assert "are free" in report_of(bundle).independent.summary
    with pytest.raises(BackendError, match=r"--independent: .* need 0\.5 GB"):
        report_of(bundle, independent=True)


def test_a_checkpoint_that_is_gone_is_named(made, tmp_path):
    found = made("v2")
    bundle = export(found.path, tmp_path)
    (found.path / "model.safetensors").unlink()
    report = report_of(bundle)
    assert report.passed
    assert "model.safetensors is missing" in report.independent.summary


def test_what_transformers_cannot_compute_is_no_failure(made, tmp_path):
    bundle = export(made("v2", norm_topk_prob=True).path, tmp_path)
    report = report_of(bundle)
    assert report.passed
    assert "does not compute norm_topk_prob=True as the original model" in report.independent.summary


def test_a_merged_adapter_is_merged_by_peft(made, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is the test extra's")
    transformers = pytest.importorskip("transformers")
    checkpoint = made("v2").path
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    bundle = export(checkpoint, tmp_path, adapter=tmp_path / "adapter")
    assert report_of(bundle).independent.status == "agrees"
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert "the merged adapter in" in report_of(bundle).independent.summary


def test_layers_alone_are_not_compared_with_the_whole(made, tmp_path):
    bundle = export(made("v2").path, tmp_path)
    assert "--layers compares parts" in report_of(bundle, layers="0").independent.summary
    with pytest.raises(BackendError, match="--independent: --layers"):
        report_of(bundle, layers="0", independent=True)


@pytest.mark.parametrize(
    ("options", "output"),
    [
        ({"task": "feature-extraction", "no_cache": True}, "last_hidden_state"),
        ({"task": "text-classification"}, "logits"),
    ],
)
def test_bundles_that_do_not_generate_are_compared_alike(made, tmp_path, options, output):
    def stored(tensors):
        score = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
        return {**tensors, "score.weight": score}

    labels = {str(i): f"label {i}" for i in range(3)}
    bundle = export(made("v2", stored=stored, id2label=labels).path, tmp_path, **options)
    found = report_of(bundle).independent
    assert (found.status, found.output) == ("agrees", output), found.summary


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ()),
        ({"norm_topk_prob": True, "num_experts_per_tok": 1}, ()),
        ({"norm_topk_prob": True, "num_experts_per_tok": 2}, ("norm_topk_prob=True",)),
        ({"model_type": "deepseek_v3", "norm_topk_prob": True, "num_experts_per_tok": 2}, ()),
        ({"moe_layer_freq": 2}, ("moe_layer_freq=2",)),
        ({"moe_layer_freq": 1, "scoring_func": "softmax"}, ()),
        ({"model_type": "deepseek_v3", "topk_method": "greedy"}, ("topk_method='greedy'",)),
        ({"rope_scaling": YARN}, ()),
        ({"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}}, ("rope_scaling.mscale=0.0",)),
        ({"rope_scaling": {k: v for k, v in YARN.items() if k != "mscale"}}, ("rope_scaling.mscale=None",)),
        (
            {"rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("original")}},
            ("rope_parameters.original_max_position_embeddings=None",),
        ),
    ],
)
def test_keys_that_transformers_computes_otherwise(changes, named):
    found = known_differences({"model_type": "deepseek_v2", **changes})
    assert found[: len(named)] == named
    assert bool(found) == bool(named)
