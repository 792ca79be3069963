"""The report's files: the same for the same command, and complete."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.findings.baseline import compare_reports, read_report
from deepseek_trt.validate.report.files import write_report
from deepseek_trt.validate.report.html import render_html
from deepseek_trt.validate.request import ValidateRequest


def request_of(good):
    return ValidateRequest(good("float16").path, ("exported", "torch"), threads=1, command="<command> & co")


@pytest.fixture(scope="module")
def validation(good):
    return validate_bundle(request_of(good))


def without_times(report):
    plain = report.to_dict()
    for name in ("started", "seconds"):
        del plain["provenance"][name]
    for backend in plain["backends"]:
        del backend["milliseconds"], backend["reference_milliseconds"]
    return plain


def test_the_same_command_gives_the_same_report(validation, good):
    again = validate_bundle(request_of(good))
    assert without_times(again.report) == without_times(validation.report)


def test_every_number_asked_for_is_there(validation):
    report = validation.report
    for backend in report.backends:
        assert {o.output for o in backend.outputs} == {"logits", "latents.0", "latents.1", "latents.2"}
        assert all(o.tolerance_reason for o in backend.outputs)
        assert [d.layer for d in backend.drift] == [0, 1, 2, 3]
        assert [r.layer for r in backend.routers] == [1, 2]
        assert all(sum(c.tokens) for c in backend.coverage)
        assert all(v.max_relative <= v.tolerance for v in backend.inner)
        assert [g.tokens for g in backend.greedy] == [33] * 4
        assert backend.tokens.kl_max <= backend.tokens.kl_limit
        assert backend.unused_pages_were_nan
    assert len(report.provenance.sha256["weights.safetensors"]) == 64
    parts = report.provenance.checkpoint_files
    assert [len(part.sha256) for part in parts] == [64, 64]
    assert {"torch", "onnx", "polygraphy"} <= report.provenance.versions.keys()


def test_the_measured_floor_is_the_tolerance_of_narrow_dtypes(validation):
    exported, torch = validation.report.backends
    assert any("rounding floor" in o.tolerance_reason for o in exported.outputs)
    assert all(o.tolerance <= t.tolerance for o, t in zip(exported.outputs, torch.outputs, strict=True))


def test_an_unchanged_report_has_not_moved(validation, tmp_path):
    write_report(validation.report, validation.comparisons, tmp_path)
    moved = compare_reports(tmp_path, read_report(tmp_path / "report.json"), validation.report)
    assert (moved.changes, moved.unmatched) == ((), ())


def test_a_larger_error_is_a_regression(validation, tmp_path):
    write_report(validation.report, validation.comparisons, tmp_path)
    old = read_report(tmp_path / "report.json")
    old["backends"][0]["outputs"][0]["max_relative"] /= 3
    old["backends"][1]["outputs"][0]["max_relative"] /= 1.5
    found = compare_reports(tmp_path / "old.json", old, validation.report)
    worse, moved = found.changes
    assert (worse.backend, worse.what, worse.worse) == ("exported", "logits: max relative", True)
    assert (moved.backend, moved.worse) == ("torch", False)
    page = render_html(dataclasses.replace(validation.report, moved=found))
    assert "Passed its tolerances, but WORSE than the earlier report" in page
    assert "2 numbers moved, 1 of them got worse" in page
    assert str(tmp_path / "old.json") in page


def test_what_has_no_counterpart_is_said(validation, tmp_path):
    """Nothing moved where nothing was compared: the sentence would be true, and mislead."""
    old = json.loads(validation.report.to_json())
    del old["backends"][1]
    old["backends"][0]["outputs"][0]["output"] = "other"
    old["dtype"], old["provenance"]["seed"] = "float32", 1
    lines = " ".join(compare_reports(tmp_path, old, validation.report).unmatched)
    for words in (
        "another dtype",
        "another seed",
        "torch: in the new report",
        "other: in the earlier report only",
    ):
        assert words in lines


@pytest.mark.parametrize("change", [{"backends": [1]}, {"backends": None}, {"provenance": []}, {"cases": KeyError}])
def test_a_damaged_report_is_refused(validation, tmp_path, change):
    old = {**json.loads(validation.report.to_json()), **change}
    old = {name: value for name, value in old.items() if value is not KeyError}
    with pytest.raises(RequestError, match="is damaged"):
        compare_reports(tmp_path, old, validation.report)


@pytest.mark.parametrize("content", ["", "[]", '{"schema_version": 0}'])
def test_what_is_no_report_is_refused(tmp_path, content):
    (tmp_path / "old.json").write_text(content)
    with pytest.raises(RequestError):
        read_report(tmp_path / "old.json")


def test_nan_is_written_as_text(validation):
    output = validation.report.backends[0].outputs[0]
    bad = dataclasses.replace(output, max_relative=float("inf"), cosine=float("nan"))
    backend = dataclasses.replace(validation.report.backends[0], outputs=(bad,))
    report = dataclasses.replace(validation.report, backends=(backend,))
    written = json.loads(report.to_json())["backends"][0]["outputs"][0]
    assert (written["max_relative"], written["cosine"]) == ("inf", "nan")


def test_the_page_needs_no_network_and_escapes(validation):
    page = render_html(validation.report)
    assert "&lt;command&gt; &amp; co" in page
    assert not re.search(r"(src|href)=|url\(|@import|https?://", page)
    assert page.count("<svg") == 2 * 6  # drift, errors, routers, coverage, and the times of two graphs
