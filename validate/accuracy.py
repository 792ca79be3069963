"""From a bundle to an AccuracyReport: every backend against torch in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate.backends.backends import BACKENDS, make_reference
from deepseek_trt.validate.backends.probes import GAP, PLACES, ROUTING
from deepseek_trt.validate.backends.published_weights import PublishedWeights, published_weights
from deepseek_trt.validate.cases.cases import Script
from deepseek_trt.validate.cases.coverage import cover_experts
from deepseek_trt.validate.cases.inputs import Inputs, read_inputs
from deepseek_trt.validate.findings.undecided import set_aside
from deepseek_trt.validate.pair import Pair, rounding_floors, run_pair
from deepseek_trt.validate.report.files import Comparison
from deepseek_trt.validate.report.integrity import check_integrity
from deepseek_trt.validate.report.provenance import collect_provenance
from deepseek_trt.validate.report.report import AccuracyReport, backend_report

Progress = Callable[[str], None]
DEFAULT_BACKENDS = ("ort", "ort-compiled")


@dataclass(frozen=True)
class ValidateRequest:
    """What to validate. `text` None takes the text that ships with the package; threads 0 lets backends choose.

    No backends stand for DEFAULT_BACKENDS. `layers` ("0-3,26") names the layers to compare, one in memory at a time;
    None compares the whole model. The reference reads its weights in the folder `checkpoint`; None stands for the one
    that the manifest names.
    """

    bundle: Path
    backends: tuple[str, ...] = ("ort",)
    text: Path | None = None
    seed: int = 0
    bisect: bool = False
    threads: int = 0
    command: str = ""
    layers: str | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Validation:
    """The report, and each backend's comparison as Polygraphy has it."""

    report: AccuracyReport
    pairs: tuple[Comparison, ...]


def validate_bundle(request: ValidateRequest, progress: Progress = lambda text: None) -> Validation:
    """Compare every backend asked for with the reference.

    Raises BundleError, BackendError or RequestError; a bad result is no error, but `report.passed` False.
    """
    if request.layers is not None:
        from deepseek_trt.validate.layerwise.layerwise import validate_layers  # it imports this file

        return validate_layers(request, request.layers, progress)
    started = time.time()
    bundle, names = Bundle.open(request.bundle), request.backends or DEFAULT_BACKENDS
    backends = _in_order(names)
    if bundle.manifest.interface.why_no_generation:
        raise RequestError(f"{bundle.path} cannot be validated: {bundle.manifest.interface.why_no_generation}")
    progress("hashing the bundle and its checkpoint")
    integrity = check_integrity(bundle)
    inputs = read_inputs(bundle, request.text, request.seed)
    weights = published_weights(bundle, request.checkpoint)
    runs = _Runs(SessionRequest(bundle, inputs.pages, request.threads), inputs, weights, request.bisect, progress)
    reports = {}
    for backend in backends:
        pair, floor = runs.pair(backend)
        reports[backend] = backend_report(pair, floor)
    source = "checkpoint" if weights else "bundle"
    provenance = collect_provenance(bundle, integrity, request.seed, source, request.command, started)
    report = AccuracyReport(
        passed=integrity.passed and all(r.passed for r in reports.values()),
        model=bundle.manifest.model,
        dtype=bundle.manifest.dtype,
        changed_weights=integrity.changed_weights,
        changed_files=integrity.changed_files,
        cases=inputs.sources,
        reference=_reference_note(weights, runs.reference.is_slow),
        backends=tuple(reports[name] for name in names),
        provenance=provenance,
    )
    return Validation(report, tuple(runs.pairs[name] for name in names))


class _Runs:
    """The reference, the scripts, and every comparison made with them."""

    def __init__(
        self,
        session: SessionRequest,
        inputs: Inputs,
        weights: PublishedWeights | None,
        bisect: bool,
        progress: Progress,
    ) -> None:
        progress("loading torch in float32")
        self.reference = make_reference(session, weights)
        self.pairs: dict[str, Pair] = {}
        self._session, self._progress = session, progress
        self._places = (*PLACES, GAP) if bisect else ("hidden", *ROUTING)
        self._short = cover_experts(self.reference, inputs.script(), session.bundle.manifest.model, inputs.seed)
        self._whole = self._short if self.reference.is_slow else inputs.with_long_cases(self._short, self.reference)

    def pair(self, backend: str) -> tuple[Pair, Pair | None]:
        """The backend's comparison, and in a narrow dtype the one that measures its rounding floor."""
        self._progress(f"comparing {backend} with torch in float32")
        pair = self._run(backend, self._short if BACKENDS[backend].is_slow else self._whole)
        floor = self._floor() if pair.dtype != "float32" and backend != "torch" else None
        if floor is not None:
            pair = pair.judged_by(rounding_floors(floor, len(pair.script.steps)))
        self.pairs[backend] = pair = set_aside(pair)
        return pair, floor

    def _floor(self) -> Pair:
        if "torch" not in self.pairs:
            self._progress("measuring the rounding floor: torch in the bundle's dtype")
            self.pairs["torch"] = self._run("torch", self._whole)
        return self.pairs["torch"]

    def _run(self, backend: str, script: Script) -> Pair:
        return run_pair(self._session, self.reference, backend, script, self._places)


def _reference_note(weights: PublishedWeights | None, is_streamed: bool) -> str:
    source = weights.note if weights else "the bundle's own weights"
    return f"{source}, computed in float32" + (", one layer in memory at a time" if is_streamed else "")


def _in_order(backends: Sequence[str]) -> list[str]:
    """Put torch first: it measures the rounding floor of the others."""
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise RequestError(f"backend {unknown[0]!r} is unknown; use: {', '.join(BACKENDS)}")
    return sorted(dict.fromkeys(backends), key=lambda name: name != "torch")
