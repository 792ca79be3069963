"""transformers as a second oracle: agrees with the reference, and refuses what it cannot compare."""

from __future__ import annotations

import shutil

import pytest

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BackendError, BundleError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.request import ValidateRequest

pytest.importorskip("transformers", reason="transformers is the test extra's")


@pytest.mark.filterwarnings("default")  # other people's
def test_it_agrees_within_float32s_tolerance(small, bundle_of):
    bundle = bundle_of(small.checkpoint, dtype="float32", page_size=8)
    backend = validate_bundle(ValidateRequest(bundle.path, ("transformers",), threads=1)).report.backends[0]
    assert backend.passed
    assert [o.output for o in backend.outputs] == ["logits"]


@pytest.mark.filterwarnings("default")  # other people's
def test_it_agrees_on_the_logits_of_all_tokens(small_v2, bundle_of):
    bundle = bundle_of(small_v2.checkpoint, dtype="float32", page_size=8, all_logits=True)
    both = validate_bundle(ValidateRequest(bundle.path, ("ort", "transformers"), threads=1)).report.backends
    assert [backend.passed for backend in both] == [True, True]
    assert both[1].tokens.steps[0].predictions == 13 + 6 + 2 + 1


def test_rounded_weights_are_refused(good):
    with pytest.raises(BackendError, match="rounded the weights to float16"):
        validate_bundle(ValidateRequest(good("float16").path, ("transformers",), threads=1))


def test_another_checkpoint_is_refused(small_v2, tmp_path):
    moved = tmp_path / "checkpoint"
    shutil.copytree(small_v2.checkpoint, moved)
    bundle = export_bundle(ExportRequest(moved, tmp_path / "out", dtype="float32", page_size=8)).bundle
    (moved / bundle.manifest.sources[0].name).touch()
    with pytest.raises(BundleError, match="has changed since export"):
        validate_bundle(ValidateRequest(Bundle.open(tmp_path / "out").path, ("transformers",), threads=1))
