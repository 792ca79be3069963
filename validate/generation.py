"""Bundles that generate: logits and cached latents, step by step, with everything that can be seen inside."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.engines.sessions.torch import TorchSession, Weights
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.validate.backends.backends import BACKENDS, check_backend, make_reference
from deepseek_trt.validate.backends.narrow_weights import reference_weights, with_strays
from deepseek_trt.validate.backends.probes import GAP, PLACES, ROUTING
from deepseek_trt.validate.backends.published_weights import published_weights
from deepseek_trt.validate.backends.sessions import SessionStepper
from deepseek_trt.validate.backends.torch import StreamedTorchSession
from deepseek_trt.validate.backends.torch_watch import TorchWatcher
from deepseek_trt.validate.cases.coverage import cover_experts
from deepseek_trt.validate.cases.inputs import Inputs, read_inputs
from deepseek_trt.validate.drafting import compare_drafting, drafting_script, with_drafting
from deepseek_trt.validate.findings.narrowing import Limits, Narrowing, narrowed, narrowing
from deepseek_trt.validate.findings.undecided import set_aside
from deepseek_trt.validate.independent.check import Check
from deepseek_trt.validate.pair import Pair, Side, compare, rounding_floors
from deepseek_trt.validate.report.integrity import check_integrity
from deepseek_trt.validate.report.report import Compared, Comparison, backend_report
from deepseek_trt.validate.request import DEFAULT_BACKENDS, DRAFTING, Progress, ValidateRequest
from deepseek_trt.validate.steps import Script

NO_WHOLE = "the checkpoint with the whole weights is gone or has changed: give it with --checkpoint"


def compare_generation(bundle: Bundle, request: ValidateRequest, progress: Progress) -> Compared:
    """Compare the whole model. In narrow dtypes, torch's own run measures the rounding floor of the others."""
    refusal = f"backend {{name!r}} is unknown; use: {', '.join(BACKENDS)}"
    names = request.chosen(BACKENDS, DEFAULT_BACKENDS, refusal)
    for name in names:
        check_backend(name, bundle)
    check = Check.of(bundle, request)
    progress("hashing the bundle and its checkpoint")
    integrity = check_integrity(bundle)
    weights = published_weights(bundle, request.checkpoint)
    integrity = with_strays(integrity, bundle, weights)
    inputs = read_inputs(bundle, request.text, request.seed)
    session = SessionRequest(bundle, inputs.pages, request.threads)
    runs = _Runs(session, inputs, reference_weights(bundle, weights), request.bisect, progress)
    whole = _whole_reference(session, weights)
    check = check if whole or not bundle.manifest.is_narrow else check.without(NO_WHOLE)
    independent = check.of_generation(whole or runs.reference, inputs, progress)
    cost = None if whole is None else runs.cost(whole, Limits(request.max_kl, request.max_perplexity_increase))
    reports = {}
    for name in sorted(names, key=lambda name: name != "torch"):  # torch first
        reports[name] = backend_report(*runs.pair(name))
    drafting = runs.drafting(names) if bundle.manifest.speculation else {}
    reports |= {name: with_drafting(reports[name], pair) for name, pair in drafting.items()}
    source = weights.note if weights else "the bundle's own weights"
    source += ", narrow ones as the bundle holds them, read anew" if bundle.manifest.is_narrow else ""
    streamed = ", one layer in memory at a time" if runs.is_streamed else ""
    return Compared(
        integrity=integrity,
        independent=independent,
        cases=inputs.sources,
        reference=f"{source}, computed in float32{streamed}",
        weights=weights,
        backends=tuple(reports[name] for name in names),
        comparisons=(
            *(Comparison(name, runs.pairs[name].accuracy) for name in names),
            *(Comparison(f"{name}-mtp", pair.accuracy) for name, pair in drafting.items()),
        ),
        narrowing=cost,
    )


def _whole_reference(session: SessionRequest, weights: Weights | None) -> TorchSession | None:
    """Torch with whole weights and a whole cache, where the bundle has either otherwise and they are at hand."""
    manifest = session.bundle.manifest
    if manifest.is_narrow:
        return make_reference(session, weights, whole_cache=True) if weights else None
    return make_reference(session, weights, whole_cache=True) if manifest.cache.narrow else None


class _Runs:
    """The reference, the scripts, and every comparison made with them."""

    def __init__(
        self,
        session: SessionRequest,
        inputs: Inputs,
        weights: Weights | None,
        bisect: bool,
        progress: Progress,
    ) -> None:
        progress("loading torch in float32")
        self.reference = make_reference(session, weights)
        self.pairs: dict[str, Pair] = {}
        self._session, self._progress, self._inputs = session, progress, inputs
        self._places = (*PLACES, GAP) if bisect else ("hidden", *ROUTING)
        self._short = cover_experts(self.reference, inputs.script(), session.bundle.manifest.model, inputs.seed)
        self.is_streamed = isinstance(self.reference, StreamedTorchSession)
        self._whole = self._short if self.is_streamed else inputs.with_long_cases(self._short, self.reference)

    def pair(self, backend: str) -> tuple[Pair, Pair | None]:
        """The backend's comparison, and in a narrow dtype the one that measures its rounding floor."""
        self._progress(f"comparing {backend} with torch in float32")
        pair = self._run(backend, self._short if BACKENDS[backend].is_slow else self._whole)
        floor = self._floor() if pair.dtype != "float32" and backend != "torch" else None
        if floor is not None:
            pair = pair.judged_by(rounding_floors(floor, len(pair.script.steps)))
        self.pairs[backend] = pair = set_aside(pair)
        return pair, floor

    def drafting(self, names: Sequence[str]) -> dict[str, Pair]:
        """Of those backends that run the layer that drafts, its comparison with the reference's."""
        self._progress("comparing the layer that drafts")
        script = drafting_script(self.reference, self._inputs)
        made = (name for name in names if name in DRAFTING)
        return {name: compare_drafting(name, self._session, self.reference, script) for name in made}

    def cost(self, whole: TorchSession, limits: Limits) -> Narrowing:
        """What the narrow weights, or the narrow cache, cost, beside a session with whole ones."""
        self._progress("measuring what narrow numbers cost")
        side = Side(
            "narrow",
            lambda seen: SessionStepper(self.reference, TorchWatcher(seen)),
            lambda follower: SessionStepper(whole, TorchWatcher(follower.probes)),  # which follows no choices
        )
        manifest = self._session.bundle.manifest
        (pair,) = compare([side], self._whole, manifest.model, ("hidden", *ROUTING))
        return narrowing(pair, narrowed(manifest), limits)

    def _floor(self) -> Pair:
        if "torch" not in self.pairs:
            self._progress("measuring the rounding floor: torch in the bundle's dtype")
            self.pairs["torch"] = self._run("torch", self._whole)
        return self.pairs["torch"]

    def _run(self, backend: str, script: Script) -> Pair:
        chosen = BACKENDS[backend]
        side = Side(
            backend,
            lambda seen: SessionStepper(chosen.make(self._session), chosen.watch(seen) if chosen.watch else None, seen),
            lambda follower: SessionStepper(self.reference, follower),
        )
        (pair,) = compare([side], script, self._session.bundle.manifest.model, self._places)
        return pair
