"""One comparison: a candidate and the float32 reference through the same script, by Polygraphy's Comparator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from polygraphy.comparator import AccuracyResults, Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.config import ModelConfig
from deepseek_trt.validate.backends.backends import BACKENDS
from deepseek_trt.validate.backends.probes import Probes
from deepseek_trt.validate.backends.runners import SessionRunner, feeds_of
from deepseek_trt.validate.backends.torch_watch import TorchWatcher
from deepseek_trt.validate.cases.cases import Script
from deepseek_trt.validate.numbers.compare import OutputDifference, ToleranceCompare, differences_of_step
from deepseek_trt.validate.numbers.metrics import closeness
from deepseek_trt.validate.numbers.routing import Flip
from deepseek_trt.validate.numbers.tolerance import Tolerance, derive_tolerance, roundings_of, tighten

REFERENCE = "torch float32"


@dataclass(frozen=True)
class TolerancePolicy:
    """Tolerances by output and probe name, for a model computed in `dtype`; floors are measured, where they are."""

    hidden_size: int
    layers: int
    dtype: str
    floors: Mapping[str, float]

    def __call__(self, name: str) -> Tolerance:
        derived = derive_tolerance(self.hidden_size, self.dtype, roundings_of(name, self.layers))
        return tighten(derived, self.floors.get(name))


@dataclass(frozen=True)
class Pair:
    """What came out. `results` and `reference` hold each step's outputs; probes hold what was seen inside."""

    backend: str
    dtype: str  # that the candidate computed in
    note: str
    poisoned: bool
    script: Script
    policy: TolerancePolicy
    results: list[IterationResult]
    reference: list[IterationResult]
    probes: Probes
    reference_probes: Probes
    flips: tuple[Flip, ...]
    config: ModelConfig
    judged: list[IterationResult]  # `results`, but for lines that were set aside (undecided.py)
    set_aside: Mapping[str, int] = field(default_factory=dict)  # lines by output

    @cached_property
    def accuracy(self) -> AccuracyResults:
        """Polygraphy's verdicts, of each output of each step."""
        run = RunResults([(self.backend, self.judged), (REFERENCE, self.reference)])
        return Comparator.compare_accuracy(run, compare_func=[ToleranceCompare(self.policy, self.dtype)])

    @cached_property
    def differences(self) -> tuple[OutputDifference, ...]:
        steps = zip(self.script.steps, self.judged, self.reference, strict=True)
        return tuple(
            difference
            for index, (step, ours, theirs) in enumerate(steps)
            for difference in differences_of_step(index, step, ours, theirs, self.policy, self.dtype)
        )

    @property
    def passed(self) -> bool:
        """All outputs within tolerance, and no router choice that rounding does not explain."""
        return bool(self.accuracy) and all(flip.near_tie for flip in self.flips)

    @property
    def sees_routing(self) -> bool:
        """Whether the candidate's router choices were seen, or there are none to see."""
        layers = range(self.config.num_hidden_layers)
        return bool(self.probes.steps) or not any(self.config.is_moe_layer(i) for i in layers)

    def judged_by(self, floors: Mapping[str, float]) -> Pair:
        """The same results under tolerances that know the measured rounding floor."""
        policy = dataclasses.replace(self.policy, floors=floors)
        flips = [dataclasses.replace(f, allowed=policy(f"router_logits.{f.layer}").relative) for f in self.flips]
        return dataclasses.replace(self, policy=policy, flips=tuple(flips))


def run_pair(
    request: SessionRequest, reference_session: Session, backend: str, script: Script, places: tuple[str, ...]
) -> Pair:
    """Run backend and reference; the reference follows the backend's near-tie router choices where they can be seen.

    Raises BackendError where the backend is not there.
    """
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # it logs failed comparisons, to stdout; the report says them better
    chosen, config = BACKENDS[backend], request.bundle.manifest.model
    probes, reference_probes = Probes(places), Probes(places)
    watcher = chosen.watch(request, probes) if chosen.watch else None
    candidate = SessionRunner(backend, lambda: chosen.make(request), script, watcher)

    def policy() -> TolerancePolicy:
        return TolerancePolicy(config.hidden_size, config.num_hidden_layers, candidate.dtype, {})

    follower = TorchWatcher(reference_probes, probes, lambda layer: policy()(f"router_logits.{layer}").relative)
    reference = SessionRunner(REFERENCE, lambda: reference_session, script, follower)
    run = Comparator.run([candidate, reference], data_loader=feeds_of(script))
    return Pair(
        backend=backend,
        dtype=candidate.dtype,
        note=candidate.note,
        poisoned=candidate.poisoned and reference.poisoned,
        script=script,
        policy=policy(),
        results=run[0][1],
        reference=run[1][1],
        probes=probes,
        reference_probes=reference_probes,
        flips=tuple(follower.flips),
        config=config,
        judged=run[0][1],
    )


def rounding_floors(pair: Pair, steps: int) -> dict[str, float]:
    """The largest relative error of each output and probe over the first `steps` steps."""
    floors = largest_errors(pair, steps)
    for difference in (d for d in pair.differences if d.step < steps):
        name = difference.output
        floors[name] = max(floors.get(name, 0.0), difference.closeness.max_relative)
    return floors


def largest_errors(pair: Pair, steps: int) -> dict[str, float]:
    """Of each probe that both sides saw, over the first `steps` steps; router choices are no numbers."""
    errors: dict[str, float] = {}
    for index, seen in pair.probes.steps.items():
        names = seen if index < steps else ()
        for name in (n for n in names if not n.startswith("router_ids")):
            c = closeness(seen[name], pair.reference_probes.steps[index][name], pair.dtype)
            errors[name] = max(errors.get(name, 0.0), c.max_relative)
    return errors
