"""What a report covers stands in its first box, in its file and in the terminal's last lines."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deepseek_trt.cli.main import main
from deepseek_trt.export.bundle.manifest import list_added
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.files import file_sha256
from deepseek_trt.validate.numbers.empty import FLAT
from deepseek_trt.validate.report import scope
from deepseek_trt.validate.report.checkout import commit_of, tool_name
from deepseek_trt.validate.report.digits import apart
from deepseek_trt.validate.report.words import WORDS

pytestmark = pytest.mark.usefixtures("little_greed")
HEAD = "lm_head.weight"
DOCS = Path(__file__).parents[3] / "docs" / "accuracy.md"


def validate(*args):
    return CliRunner().invoke(main, ["validate", *map(str, args), "--threads", "1"], catch_exceptions=False)


def scope_in(folder):
    return json.loads((folder / "report.json").read_text())["scope"]


def test_page_file_and_terminal_say_what_is_covered(good, small_v2, tmp_path):
    bundle = good("float32")
    done = validate(bundle.path, "--backend", "exported", "--backend", "torch", "--report", tmp_path)
    assert done.exit_code == 0, done.output
    found, page = scope_in(tmp_path), (tmp_path / "report.html").read_text()
    box = page[: page.index("</section>")]
    *_, report, verdict = done.stdout.splitlines()
    assert (report, verdict) == (f"report: {tmp_path / 'report.html'}", "passed")
    assert (found["layers"], found["layers_of"], found["experts"], found["experts_of"]) == (3, 3, 32, 32)
    assert found["not_compared"] == ["compiled CPU operators (backend ort): not compared, --backend leaves them out"]
    assert found["tokens"]["exported"] == found["tokens"]["torch"] > 100
    assert found["checkpoint"] == str(small_v2.checkpoint)
    for file in found["checkpoint_files"]:
        assert file["sha256"] == file_sha256(small_v2.checkpoint / file["name"])
    assert found["checkpoint_files"][0]["name"] == "config.json"
    assert 0 < found["margin"]["share"] < 1
    assert found["tool"].startswith("deepseek-trt ")
    for text in ("Layers compared", "3 of 3", "32 of 32", *found["not_compared"], found["machine"], found["tool"]):
        assert text in box
        assert text in done.stdout


def test_plans_that_are_there_and_not_run_are_named(good, monkeypatch, tmp_path):
    copy = shutil.copytree(good("float32").path, tmp_path / "copy")
    for name in ("decode.plan", "decode.plan.json"):
        (copy / name).write_bytes(b"a plan")
    list_added(copy, ["decode.plan", "decode.plan.json"])
    for gpu, reason in ((None, "no GPU is visible"), ("H200", "--backend tensorrt compares them")):
        monkeypatch.setattr(scope, "visible_gpu", lambda gpu=gpu: gpu)
        done = validate(copy, "--backend", "torch")
        assert f"TensorRT plans: not compared, {reason}" in done.stdout


def test_files_that_were_not_hashed_are_said_to_be(good, small_v2, tmp_path):
    """Those of --checkpoint are the ones that count, and not the ones that export read."""
    other = shutil.copytree(small_v2.checkpoint, tmp_path / "other")
    done = validate(good("float32").path, "--backend", "torch", "--checkpoint", other, "--report", tmp_path / "r")
    found = scope_in(tmp_path / "r")
    assert found["checkpoint"] == str(other)
    assert [bool(file["sha256"]) for file in found["checkpoint_files"]] == [True, False, False]
    assert "model-00001-of-000002.safetensors not hashed (" in done.stdout


def _with_head(small, path, change):
    """The checkpoint with another head."""
    shutil.copytree(small.checkpoint, path)
    file = next(file for file in path.glob("*.safetensors") if HEAD in load_file(file))
    save_file({n: change(t) if n == HEAD else t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return path


def test_a_head_that_prefers_nothing_is_no_pass(small_v2, tmp_path):
    path = _with_head(small_v2, tmp_path / "c", lambda head: head[:1].expand_as(head).clone())
    bundle = export_bundle(ExportRequest(path, tmp_path / "out", page_size=8, dtype="float32")).bundle
    done = validate(bundle.path, "--backend", "exported", "--report", tmp_path / "r")
    assert done.exit_code == 3
    logits = json.loads((tmp_path / "r" / "report.json").read_text())["backends"][0]["outputs"][0]
    assert (logits["passed"], logits["reason"]) == (False, FLAT)
    assert math.isinf(float(scope_in(tmp_path / "r")["margin"]["share"]))
    assert FLAT in (tmp_path / "r" / "report.html").read_text()
    assert "FAIL" in done.stdout


@pytest.mark.parametrize("by_reference", [False, True])
def test_a_matrix_of_one_number_is_no_pass(small_v2, tmp_path, by_reference):
    path = _with_head(small_v2, tmp_path / "c", lambda head: torch.full_like(head, 0.5))
    bundle = export_bundle(ExportRequest(path, tmp_path / "out", page_size=8, by_reference=by_reference)).bundle
    done = validate(bundle.path, "--backend", "torch")
    assert done.exit_code == 3
    assert "FAIL weight lm_head.weight holds one number throughout" in done.stdout


@pytest.mark.parametrize(
    ("value", "other", "texts"),
    [
        (1.0, 2.0, ("1", "2")),
        (-10.805991, -10.805977, ("-10.805991", "-10.805977")),
        (0.1, 0.1 + 1e-16, ("0.1", "0.1")),
        (1.0, 1.0, ("1", "1")),
        (math.nan, 1.0, ("nan", "1")),
        (math.inf, -math.inf, ("inf", "-inf")),
    ],
)
def test_numbers_that_differ_look_different(value, other, texts):
    found = apart(value, other)
    assert found[0] != found[1] or value == other or np.isclose(value, other, rtol=1e-15)
    assert [float(x) for x in found] == pytest.approx([float(x) for x in texts], nan_ok=True)


def test_the_commit_is_read_without_git(tmp_path):
    sha, git = "0123456789abcdef" * 2, tmp_path / ".git"
    git.mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(tmp_path) is None
    (git / "packed-refs").write_text(f"# pack-refs\n{sha} refs/heads/main\n")
    assert commit_of(tmp_path) == sha
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "refs" / "heads" / "main").write_text("f" * 40 + "\n")
    assert commit_of(tmp_path) == "f" * 40
    (git / "HEAD").write_text(f"{sha}\n")
    assert commit_of(tmp_path) == sha
    assert commit_of(tmp_path / "nowhere") is None
    assert tool_name().startswith("deepseek-trt ")


def test_the_glossary_is_in_page_and_docs(good, tmp_path):
    docs = DOCS.read_text(encoding="utf-8").partition("## Words")[2]
    text = " ".join(docs.split())
    for word, meaning in WORDS:
        assert f"**{word}**" in text
        assert meaning in text
    assert {word for word, _ in WORDS} == {"windows", "seeded", "near tie", "set aside", "ulps", "margin", "floor"}


def test_what_got_worse_is_in_page_file_and_terminal(good, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    validate(good("float32").path, "--backend", "torch", "--report", first)
    old = json.loads((first / "report.json").read_text())
    old["backends"][0]["tokens"]["top1"] = 2.0
    (first / "report.json").write_text(json.dumps(old))
    options = ("--backend", "torch", "--compare", first / "report.json")
    done = validate(good("float32").path, *options, "--report", second)
    assert done.exit_code == 3
    assert "WORSE: torch, top1: 2 -> 1" in done.stdout
    moved = json.loads((second / "report.json").read_text())["moved"]
    assert [(c["what"], c["worse"]) for c in moved["changes"]] == [("top1", True)]
    assert moved["earlier"] == str(first / "report.json")
    assert "<td>top1</td>" in (second / "report.html").read_text()
    brief = json.loads(validate(good("float32").path, *options, "--json").stdout)
    assert [c["worse"] for c in brief["changes"]] == [True]
