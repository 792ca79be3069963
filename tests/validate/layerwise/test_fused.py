"""--layers covers what generate runs: layers of decode through the compiled operators, in every dtype."""

from __future__ import annotations

import json

import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.cli.validate import EXIT_ACCURACY
from deepseek_trt.plugins.cpu.library import CpuLibrary, cpu_library
from deepseek_trt.plugins.cpu.operators import ANGLES, CPU_DOMAIN
from deepseek_trt.validate.layerwise import fused, layerwise
from deepseek_trt.validate.layerwise.fused import FusedDecode, cut_fused
from deepseek_trt.validate.layerwise.layerwise import parts_of

compiled = pytest.mark.skipif(cpu_library().path is None, reason="no compiled CPU operators on this machine")


def validate(*args):
    return CliRunner().invoke(main, ["validate", *map(str, args), "--threads", "1"], catch_exceptions=False)


def verdicts(folder):
    parts = json.loads((folder / "report.json").read_text())["parts"]
    return {name: [p["part"] for p in parts if not p["passed"][name]] for name in parts[0]["passed"]}


@compiled
@pytest.mark.parametrize("kind", ["good", "biased"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_layers_of_the_compiled_operators_agree(request, kind, dtype, tmp_path):
    bundle = request.getfixturevalue(kind)(dtype)
    done = validate(bundle.path, "--layers", "0-2", "--backend", "ort", "--report", tmp_path)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    (backend,) = report["backends"]
    names = {o["output"] for o in backend["outputs"]}
    assert names == {*(f"hidden.{i}" for i in range(4)), *(f"latents.{i}" for i in range(3)), "logits"}
    assert not backend["follows_routing"]
    assert "not compiled" not in backend["note"]
    assert report["scope"]["not_compared"] == ["graphs as exported: not compared, --backend leaves them out"]


@compiled
def test_each_part_is_the_operators(good):
    bundle = good("float16")
    found = FusedDecode.of(bundle, cpu_library(), 1)
    counts = []
    for part in parts_of("0-2", 3):
        model = ir.serde.deserialize_model(onnx.load_model_from_string(found.data))
        cut_fused(model, part, found.hidden)
        counts.append(sum(node.domain == CPU_DOMAIN and node.op_type not in ANGLES for node in model.graph))
    assert counts == [0, 2, 2, 2, 1]


@compiled
def test_a_fault_in_one_operator_is_named_and_the_exported_graphs_pass(good, monkeypatch, tmp_path):
    real = fused.fused_graph

    def faulty(bundle, graph):
        data, left = real(bundle, graph)
        model = onnx.load_model_from_string(data)
        nodes = [n for n in model.graph.node if n.domain == CPU_DOMAIN and any(a.name == "scale" for a in n.attribute)]
        next(a for a in nodes[1].attribute if a.name == "scale").f *= 1.001
        return model.SerializeToString(), left

    monkeypatch.setattr(fused, "fused_graph", faulty)
    done = validate(good("float32").path, "--layers", "0-2", "--report", tmp_path)
    assert done.exit_code == EXIT_ACCURACY
    assert verdicts(tmp_path) == {"exported": [], "ort": ["layer 1"], "torch": []}
    assert "FAIL layer 1: failed (ort)" in done.stdout


def test_without_the_library_the_report_says_so(good, monkeypatch, tmp_path):
    monkeypatch.setattr(layerwise, "cpu_library", lambda path: CpuLibrary(None, "no compiler"))
    done = validate(good("float32").path, "--layers", "0", "--report", tmp_path)
    assert done.exit_code == 0, done.output
    assert "compiled CPU operators (backend ort): not compared, no compiler" in done.stdout
    assert list(verdicts(tmp_path)) == ["exported", "torch"]
    asked = validate(good("float32").path, "--layers", "0", "--backend", "ort")
    assert asked.exit_code == 0, asked.output
    assert "Backends run: ort (no compiler)" in asked.stdout


@pytest.mark.parametrize("by_reference", [True, False])
def test_fp8_checkpoints_agree_by_reference_too(small_v2, bundle_of, tmp_path, by_reference):
    """The product of code and scale is no bfloat16: each export rounds it, and so does whoever reads by reference."""
    checkpoint = tmp_path / "checkpoint"
    _write_fp8(checkpoint, small_v2)
    bundle = bundle_of(checkpoint, page_size=8, by_reference=by_reference, dtype="bfloat16")
    done = validate(bundle.path, "--layers", "0-2", "--report", tmp_path / "report")
    assert done.exit_code == 0, done.output


def _write_fp8(path, small):
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in sorted(small.checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[name] = tensor
            if name.endswith("_proj.weight"):
                scale = tensor.abs().max().float() / 400
                tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
                blocks = [-(-size // 128) for size in tensor.shape]
                tensors[f"{name}_scale_inv"] = torch.full(blocks, scale.item())
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps({**small.raw, "quantization_config": fp8}))
