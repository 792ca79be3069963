"""The command's exit codes: 0 for right bundles in every dtype, 3 for every planted fault."""

from __future__ import annotations

import importlib.util
import json
import sys

import onnx
import pytest
from click.testing import CliRunner
from polygraphy.comparator import AccuracyResults

from deepseek_trt.cli.main import main
from deepseek_trt.cli.validate import EXIT_ACCURACY
from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate import generation
from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.backends.backends import BACKENDS
from deepseek_trt.validate.request import BACKENDS as CHOICES
from deepseek_trt.validate.request import ValidateRequest

pytestmark = pytest.mark.usefixtures("little_greed")
LAYER_0_WEIGHT = "model.layers.0.self_attn.o_proj.weight"


def validate(*args):
    given = [*map(str, args), *(() if "--backend" in args else ("--backend", "exported"))]
    return CliRunner().invoke(main, ["validate", *given, "--threads", "1"], catch_exceptions=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_right_bundles_pass(good, dtype, tmp_path):
    done = validate(good(dtype).path, "--report", tmp_path, "--json", "--backend", "exported", "--backend", "torch")
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
    accuracy = AccuracyResults.load(str(tmp_path / "exported.polygraphy.json"))
    assert bool(accuracy)
    assert accuracy.output_names() == [o["output"] for o in report["backends"][0]["outputs"]]


def worst_experts(model):
    """The lowest scores are chosen instead of the highest."""
    body = next(f for f in model.functions if f.name == "MoeRouter")
    chosen = next(n for n in body.node if n.op_type == "TopK" and n.input[1] == "top_k")
    chosen.attribute.append(onnx.helper.make_attribute("largest", 0))


def test_wrong_experts_fail(edited):
    done = validate(edited(worst_experts, "decode"), "--json")
    assert done.exit_code == EXIT_ACCURACY, done.output
    brief = json.loads(done.stdout)["backends"][0]
    assert not brief["passed"]
    assert brief["wrong_choices"] > 0


def test_a_changed_weight_fails_by_name(with_changed_weight):
    done = validate(with_changed_weight(LAYER_0_WEIGHT), "--bisect")
    assert done.exit_code == EXIT_ACCURACY
    # the reference has the checkpoint's weights
    assert "first out of tolerance: output projection and residual in layer 0 " in done.stdout
    assert f"{LAYER_0_WEIGHT} (output projection and residual in layer 0) is not what export wrote" in done.stdout


def test_a_backend_that_is_not_there_is_an_error(good, monkeypatch):
    """Before anything has run."""
    monkeypatch.setattr(generation, "check_integrity", None)
    bundle = good("float32").path
    done = validate(bundle, "--backend", "ort", "--backend", "tensorrt")
    assert done.exit_code == 1
    assert "backend tensorrt cannot run here" in done.output
    assert "make it with deepseek-trt build" in done.output
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers is not installed" in validate(bundle, "--backend", "transformers").output
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton" in validate(bundle, "--backend", "kernels").output


def test_the_graphs_as_exported_and_as_they_run_are_compared_by_default(good):
    done = CliRunner().invoke(main, ["validate", str(good("float32").path), "--json", "--threads", "1"])
    assert done.exit_code == 0, done.output
    exported, served = json.loads(done.stdout)["backends"]
    assert (exported["backend"], served["backend"]) == ("exported", "ort")


def test_a_name_of_before_is_refused_with_the_one_of_now(good):
    done = validate(good("float32").path, "--backend", "ort-compiled")
    assert done.exit_code == 1
    assert "'ort-compiled' is now 'ort'; the graphs as exported, once 'ort', are 'exported'" in done.output
    with pytest.raises(RequestError, match="is now 'ort'"):
        validate_bundle(ValidateRequest(good("float32").path, ("ort-compiled",)))


def test_an_older_report_is_refused(good, tmp_path):
    (tmp_path / "report.json").write_text('{"schema_version": 3}')
    done = validate(good("float32").path, "--compare", tmp_path / "report.json")
    assert done.exit_code == 1
    assert "has schema 3, this is 7: validate the old bundle again" in done.output


def test_a_worse_report_exits_with_3(good, tmp_path):
    report, path = tmp_path / "report.json", good("float32").path
    assert validate(path, "--report", tmp_path).exit_code == 0
    old = json.loads(report.read_text())
    assert "nothing moved" in validate(path, "--compare", report).stdout
    for output in old["backends"][0]["outputs"]:
        output["max_relative"] /= 10
    report.write_text(json.dumps(old))
    done = validate(path, "--compare", report)
    assert done.exit_code == EXIT_ACCURACY
    assert "WORSE: exported, logits: max relative" in done.stdout
    assert done.stdout.rstrip().endswith("passed its tolerances, but worse than the earlier report")


def test_the_choices_are_the_backends():
    assert tuple(BACKENDS) == CHOICES
