"""From a bundle to an AccuracyReport, whatever the bundle is for: every backend against torch in float32."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.reading.hub import checkpoint_folder
from deepseek_trt.validate.backends.published_weights import published_weights
from deepseek_trt.validate.findings.baseline import compare_reports, read_report
from deepseek_trt.validate.generation import NO_WHOLE, compare_generation
from deepseek_trt.validate.heads import compare_heads
from deepseek_trt.validate.layerwise.layerwise import compare_layers
from deepseek_trt.validate.report.provenance import collect_provenance
from deepseek_trt.validate.report.report import AccuracyReport, Compared, Comparison
from deepseek_trt.validate.report.scope import scope_of
from deepseek_trt.validate.request import Progress, ValidateRequest
from deepseek_trt.validate.threads import torch_threads


@dataclass(frozen=True)
class Validation:
    """The report, and each backend's comparison as Polygraphy has it."""

    report: AccuracyReport
    comparisons: tuple[Comparison, ...]


def validate_bundle(request: ValidateRequest, progress: Progress = lambda text: None) -> Validation:
    """Compare every backend asked for with the reference.

    Raises BundleError, CheckpointError, BackendError or RequestError; a bad result is no error, but `report.passed`
    False, or `report.moved.worse`.
    """
    started, bundle = time.time(), Bundle.open(request.bundle, judges_weights=True)
    if request.checkpoint is not None:
        request = dataclasses.replace(request, checkpoint=checkpoint_folder(request.checkpoint))
    _check_limits(bundle, request)
    earlier = read_report(request.earlier) if request.earlier else None
    with torch_threads(bundle.manifest.parameters, request.threads):
        found = _compare(bundle, request, progress)
    report = AccuracyReport(
        passed=found.integrity.passed
        and found.independent.passed
        and all(backend.passed for backend in found.backends),
        scope=scope_of(bundle, request, found),
        independent=found.independent,
        interface=bundle.manifest.interface,
        model=bundle.manifest.model,
        dtype=bundle.manifest.dtype,
        changed_weights=found.integrity.changed_weights,
        changed_files=found.integrity.changed_files,
        odd_weights=found.integrity.odd_weights,
        cases=found.cases,
        reference=found.reference,
        backends=found.backends,
        parts=found.parts,
        narrowing=found.narrowing,
        provenance=collect_provenance(
            bundle, found.integrity, request.seed, "checkpoint" if found.weights else "bundle", request.command, started
        ),
    )
    if request.earlier and earlier:
        report = dataclasses.replace(report, moved=compare_reports(request.earlier, earlier, report))
    return Validation(report, found.comparisons)


def _check_limits(bundle: Bundle, request: ValidateRequest) -> None:
    """RequestError where it cannot be said what narrow weights cost, and a limit is given."""
    name = next(iter(request.limits), None)
    if name is None:
        return
    if not (bundle.manifest.is_narrow or bundle.manifest.cache.narrow):
        raise RequestError(f"{name}: {bundle.path} has no narrow weights, which cost nothing: leave it out")
    if request.layers is not None or bundle.manifest.generation_refusal:
        what = "--layers compares parts of the model" if request.layers else f"it is for {bundle.manifest.task}"
        raise RequestError(f"{name} is of a whole model that generates, and {what}: leave it out")
    if bundle.manifest.is_narrow and published_weights(bundle, request.checkpoint) is None:
        raise RequestError(f"{name}: {NO_WHOLE}")
    if request.max_perplexity_increase is not None and bundle.tokenizer_path is None:
        raise RequestError(f"--max-perplexity-increase: {bundle.path} has no tokenizer.json, so that no text is scored")


def _compare(bundle: Bundle, request: ValidateRequest, progress: Progress) -> Compared:
    if bundle.manifest.generation_refusal:
        return compare_heads(bundle, request, progress)
    if request.layers is not None:
        return compare_layers(bundle, request, request.layers, progress)
    return compare_generation(bundle, request, progress)
