"""Layer by layer: right bundles pass, and a fault in one layer is named there and nowhere else."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from polygraphy.comparator import AccuracyResults

from deepseek_trt.cli.main import main
from deepseek_trt.cli.validate import EXIT_ACCURACY
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.bundle.folder import MANIFEST_FILE, Manifest
from deepseek_trt.plugins.cpu.library import CpuLibrary
from deepseek_trt.validate.backends.published_weights import published_weights
from deepseek_trt.validate.backends.sessions import run_step
from deepseek_trt.validate.cases.inputs import read_inputs
from deepseek_trt.validate.layerwise.compare import Setting, compare_part
from deepseek_trt.validate.layerwise.inputs import Stream
from deepseek_trt.validate.layerwise.layerwise import parts_of

PAGE = 8
BOTH = ("--backend", "exported", "--backend", "torch")
WEIGHT = "model.layers.1.self_attn.o_proj.weight"
OUTPUTS = ["hidden.0", "latents.0", "hidden.1", "latents.1", "router_logits.1", "experts.1", "hidden.2", "logits"]


def validate(*args):
    return CliRunner().invoke(main, ["validate", *map(str, args), "--threads", "1"], catch_exceptions=False)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def verdicts(report, backend="exported"):
    return {part["part"]: part["passed"][backend] for part in report["parts"]}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_right_bundles_pass(good, dtype, tmp_path):
    done = validate(good(dtype).path, "--layers", "0-1", *BOTH, "--report", tmp_path)
    assert done.exit_code == 0, done.output
    report = report_of(tmp_path)
    assert "Part by part" in (tmp_path / "report.html").read_text()
    assert verdicts(report) == dict.fromkeys(("embedding", "layer 0", "layer 1", "last norm and head"), True)
    for backend in report["backends"]:
        names = [output["output"] for output in backend["outputs"]]
        assert names == OUTPUTS
        assert AccuracyResults.load(str(tmp_path / f"{backend['backend']}.polygraphy.json")).output_names() == names
        assert [d["layer"] for d in backend["drift"]] == [0, 1, 2]
        assert [r["layer"] for r in backend["routers"]] == [1]
    assert report["provenance"]["reference_weights"] == "checkpoint"


def test_by_reference_gives_the_same_numbers(small_v2, bundle_of, tmp_path):
    reports = []
    for by_reference in (True, False):
        bundle = bundle_of(small_v2.checkpoint, page_size=PAGE, by_reference=by_reference)
        done = validate(bundle.path, "--layers", "0,2", "--report", tmp_path / str(by_reference))
        assert done.exit_code == 0, done.output
        reports.append(report_of(tmp_path / str(by_reference)))
    assert reports[0]["backends"][0]["outputs"] == reports[1]["backends"][0]["outputs"]
    assert "drawn" in reports[0]["parts"][2]["inputs"]
    assert "drawn" not in reports[0]["parts"][3]["inputs"]


def test_the_same_command_gives_the_same_report(good, tmp_path):
    for name in "ab":
        validate(good("float32").path, "--layers", "0,2", "--report", tmp_path / name)
    first, second = (report_of(tmp_path / name) for name in "ab")
    for report in (first, second):
        for field in ("started", "seconds", "command"):
            del report["provenance"][field]
        for backend in report["backends"]:
            del backend["milliseconds"], backend["reference_milliseconds"]
    assert first == second


def test_a_changed_weight_fails_in_its_layer(with_changed_weight, tmp_path):
    done = validate(with_changed_weight(WEIGHT), "--layers", "0-2", "--report", tmp_path)
    assert done.exit_code == EXIT_ACCURACY
    assert WEIGHT in done.stdout
    assert "layer 1: failed" in done.stdout
    report = report_of(tmp_path)
    assert [part for part, passed in verdicts(report).items() if not passed] == ["layer 1"]
    fault = report["backends"][0]["first_fault"]
    assert (fault["layer"], fault["op"]) == (1, "output projection and residual")


def test_other_layers_are_not_read(with_changed_weight):
    assert validate(with_changed_weight(WEIGHT), "--layers", "0,2").exit_code == 0


def test_experts_stacked_in_the_wrong_order_are_named(small_v2, bundle_of, tmp_path):
    """Whoever reads the weights by the bundle's recipes sees nothing wrong."""
    copy = shutil.copytree(bundle_of(small_v2.checkpoint, page_size=PAGE, by_reference=True).path, tmp_path / "copy")
    manifest = Manifest.read(copy)
    name = "model.layers.2.mlp.experts.down_proj"
    records = tuple(_two_swapped(w) if w.recipe.name == name else w for w in manifest.weights)
    (copy / MANIFEST_FILE).write_text(dataclasses.replace(manifest, weights=records).to_json())
    for options in (("--layers", "1-2"), ("--bisect",)):
        done = validate(copy, *options, "--json", "--backend", "exported")
        assert done.exit_code == EXIT_ACCURACY
        assert json.loads(done.stdout)["backends"][0]["first_fault"].startswith("MoeExperts in layer 2")


def _two_swapped(record):
    first, second, *rest = record.recipe.pieces
    return dataclasses.replace(record, recipe=dataclasses.replace(record.recipe, pieces=(second, first, *rest)))


def test_a_graph_that_points_elsewhere_is_seen(edited, tmp_path):
    def wrong_weight(model):
        found = {t.name: t for t in model.graph.initializer}
        ours, theirs = found[WEIGHT], found[WEIGHT.replace(".1.", ".2.")]
        del ours.external_data[:]
        ours.external_data.extend(theirs.external_data)

    done = validate(edited(wrong_weight, "decode"), "--layers", "1", "--report", tmp_path)
    assert done.exit_code == EXIT_ACCURACY
    assert report_of(tmp_path)["backends"][0]["first_fault"]["graph"] == "decode"


def test_the_reference_is_the_whole_models(good):
    """Part by part, all steps of a part at once, gives what the whole model gives step by step."""
    bundle = good("float32")
    script = read_inputs(bundle, None, 0).script()
    setting = Setting(bundle, published_weights(bundle, None), script, 1, CpuLibrary(None))
    stream = Stream(script, 0)
    for part in parts_of("0-2", 3):
        pairs, left = compare_part(setting, part, ("exported",), stream.entering(part)[0])
        stream.advance(part, left)
    whole = TorchSession(bundle, script.pages, "float32")
    for index, step in enumerate(script.steps):
        logits, _ = step.lines("logits", run_step(whole, step, step.feeds))
        np.testing.assert_allclose(pairs["exported"].reference[index]["logits"], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0-3", "there is no layer 3; the bundle has layers 0 to 2"),
        ("2-1", "2-1 runs backwards; write 1-2"),
        ("0,,1", "'' is no layer; name layers 0 to 2"),
        ("all", "'all' is no layer"),
        ("-1", "'-1' is no layer"),
    ],
)
def test_layers_that_are_not_there(good, layers, message):
    done = validate(good("float32").path, f"--layers={layers}")
    assert done.exit_code == 1
    assert message in done.output


def test_layers_are_sorted_and_named_once():
    assert [part.index for part in parts_of("2, 0-1,1", 4)] == [-1, 0, 1, 2, 4]


def test_the_checkpoint_is_needed(good, small_v2, tmp_path):
    bundle = good("bfloat16")
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    gone = dataclasses.replace(bundle.manifest, checkpoint=str(tmp_path / "gone"))
    (copy / MANIFEST_FILE).write_text(gone.to_json())
    done = validate(copy, "--layers", "0")
    assert done.exit_code == 1
    assert "give it with --checkpoint" in done.output
    assert validate(copy, "--layers", "0", "--checkpoint", small_v2.checkpoint).exit_code == 0


def test_the_whole_model_without_its_checkpoint(good, tmp_path):
    """The reference then takes the bundle's weights, and says so."""
    bundle = good("float32")
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    gone = dataclasses.replace(bundle.manifest, checkpoint=str(tmp_path / "gone"))
    (copy / MANIFEST_FILE).write_text(gone.to_json())
    for path, source in ((bundle.path, "checkpoint"), (copy, "bundle")):
        assert validate(path, "--backend", "torch", "--report", tmp_path / source).exit_code == 0
        assert report_of(tmp_path / source)["provenance"]["reference_weights"] == source


def test_other_backends_are_refused(good):
    done = validate(good("float32").path, "--layers", "0", "--backend", "transformers")
    assert done.exit_code == 1
    assert "leave out --backend transformers" in done.output
