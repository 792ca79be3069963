"""The command's exit codes: 0 for right bundles in every dtype, 3 for every planted fault."""

from __future__ import annotations

import json

import onnx
import pytest
from click.testing import CliRunner
from polygraphy.comparator import AccuracyResults

from deepseek_trt.cli.main import main
from deepseek_trt.cli.validate_command import BACKENDS as CHOICES
from deepseek_trt.cli.validate_command import EXIT_ACCURACY
from deepseek_trt.engines.backends import BACKENDS as ENGINES
from deepseek_trt.validate.backends import BACKENDS

LAYER_0_WEIGHT = "model.layers.0.self_attn.o_proj.weight"


def validate(*args):
    return CliRunner().invoke(main, ["validate", *map(str, args), "--threads", "1"], catch_exceptions=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_right_bundles_pass(good, dtype, tmp_path):
    done = validate(good(dtype).path, "--report", tmp_path, "--json", "--backend", "ort", "--backend", "torch")
    assert done.exit_code == 0, done.output
    brief = json.loads(done.stdout)
    assert [b["passed"] for b in brief["backends"]] == [True, True]
    # ONNX Runtime's CPU provider computes bfloat16 bundles in float32, and they must meet float32's tolerance
    computed = brief["backends"][0]["computed_in"]
    assert computed == ("float32" if dtype == "bfloat16" else dtype)
    assert (brief["backends"][0]["outputs"]["logits"]["tolerance"] < 1e-4) == (computed == "float32")


def test_the_files_say_the_same_as_the_command(good, tmp_path):
    brief = json.loads(validate(good("float32").path, "--report", tmp_path, "--json").stdout)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is brief["passed"] is True
    assert report["schema_version"] == brief["schema_version"]
    accuracy = AccuracyResults.load(str(tmp_path / "ort.polygraphy.json"))
    assert bool(accuracy)
    assert accuracy.output_names() == [o["output"] for o in report["backends"][0]["outputs"]]


def change_constant(model, function, name, factor):
    """Multiply a constant in an op's body, and the attribute of the same meaning on its nodes."""
    attribute = {"scale_f": "scale", "factor": "routed_scaling_factor"}[name]
    body = next(f for f in model.functions if f.name == function)
    constant = next(n for n in body.node if n.output[0] == name)
    constant.attribute[0].f *= factor
    for node in model.graph.node:
        if node.op_type == function:
            next(a for a in node.attribute if a.name == attribute).f *= factor


def worst_experts(model):
    """The lowest scores are chosen instead of the highest."""
    body = next(f for f in model.functions if f.name == "MoeRouter")
    chosen = next(n for n in body.node if n.op_type == "TopK" and n.input[1] == "top_k")
    chosen.attribute.append(onnx.helper.make_attribute("largest", 0))


@pytest.mark.parametrize(
    ("edit", "graphs"),
    [
        (lambda model: change_constant(model, "MlaDecode", "scale_f", 1.001), ("decode",)),
        (lambda model: change_constant(model, "MoeRouter", "factor", 1.001), ("prefill", "decode")),
        (worst_experts, ("decode",)),
    ],
    ids=["softmax scale", "routed_scaling_factor", "top-k"],
)
def test_wrong_graphs_fail(edited, edit, graphs):
    done = validate(edited(edit, *graphs), "--json")
    assert done.exit_code == EXIT_ACCURACY, done.output
    assert not json.loads(done.stdout)["backends"][0]["passed"]


def test_a_changed_weight_fails_by_name(with_changed_weight):
    done = validate(with_changed_weight(LAYER_0_WEIGHT))
    assert done.exit_code == EXIT_ACCURACY
    assert LAYER_0_WEIGHT in done.stdout


def test_a_backend_that_is_not_there_is_an_error(good, monkeypatch):
    monkeypatch.delitem(ENGINES, "tensorrt", raising=False)
    done = validate(good("float32").path, "--backend", "tensorrt")
    assert done.exit_code == 1
    assert "tensorrt" in done.output


def test_the_choices_are_the_backends():
    assert set(CHOICES) == set(BACKENDS)
