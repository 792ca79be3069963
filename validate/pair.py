"""One comparison: a candidate and the float32 reference through the same script, by Polygraphy's Comparator."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from polygraphy.comparator import AccuracyResults, Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.validate.backends.probes import Probes
from deepseek_trt.validate.backends.runner import Runner, Stepper, feeds_of
from deepseek_trt.validate.backends.torch_watch import TorchWatcher
from deepseek_trt.validate.numbers.compare import Lines, OutputDifference, ToleranceCompare, differences_of_step
from deepseek_trt.validate.numbers.empty import why_empty
from deepseek_trt.validate.numbers.metrics import closeness
from deepseek_trt.validate.numbers.routing import Flip
from deepseek_trt.validate.numbers.tolerance import Policy
from deepseek_trt.validate.steps import Script

REFERENCE = "torch float32"


@dataclass(frozen=True)
class Pair:
    """What came out. `results` and `reference` hold each step's outputs; probes hold what was seen inside."""

    backend: str
    note: str
    poisoned: bool
    script: Script
    policy: Policy
    results: list[IterationResult]
    reference: list[IterationResult]
    lines: list[Lines]  # whose the reference's are, step by step
    probes: Probes
    reference_probes: Probes
    flips: tuple[Flip, ...]
    config: ModelConfig
    judged: list[IterationResult]  # `results`, but for lines that were set aside (undecided.py)
    set_aside: Mapping[str, int] = field(default_factory=dict)  # lines by output

    @property
    def dtype(self) -> str:
        """That the candidate computed in."""
        return self.policy.dtype

    @functools.cached_property
    def accuracy(self) -> AccuracyResults:
        """Polygraphy's verdicts, of each output of each step."""
        G_LOGGER.module_severity = G_LOGGER.CRITICAL  # it logs to stdout; the report says the same better
        run = RunResults([(self.backend, self.judged), (REFERENCE, self.reference)])
        return Comparator.compare_accuracy(run, compare_func=[ToleranceCompare(self.policy, self.empty)])

    @functools.cached_property
    def empty(self) -> dict[str, str]:
        """The reference's outputs that prove nothing, with the reason."""
        names = dict.fromkeys(name for step in self.reference for name in step)
        reasons = {name: why_empty([step[name] for step in self.reference if name in step]) for name in names}
        return {name: reason for name, reason in reasons.items() if reason}

    @functools.cached_property
    def differences(self) -> tuple[OutputDifference, ...]:
        steps = zip(self.script.steps, self.judged, self.reference, self.lines, strict=True)
        return tuple(
            difference
            for index, (step, ours, theirs, lines) in enumerate(steps)
            for difference in differences_of_step(index, step.label, ours, theirs, lines, self.policy, self.empty)
        )

    @property
    def passed(self) -> bool:
        """All outputs within tolerance, and no router choice that rounding does not explain."""
        return bool(self.accuracy) and all(flip.near_tie for flip in self.flips)

    @property
    def predicts(self) -> bool:
        """Whether the outputs hold logits that are compared as predictions of the next token."""
        return self.script.predicts and "logits" in self.reference[0]

    @property
    def sees_routing(self) -> bool:
        """Whether the candidate's router choices were seen, or there are none to see."""
        if _saw(self.probes, "router_ids"):
            return True
        if self.policy.is_local:
            return not _saw(self.reference_probes, "router_ids")
        return not any(self.config.is_moe_layer(i) for i in range(self.config.num_hidden_layers))

    def judged_by(self, floors: Mapping[str, float]) -> Pair:
        """The same results under tolerances that know the measured rounding floor."""
        policy = dataclasses.replace(self.policy, floors=floors)
        flips = [dataclasses.replace(f, allowed=policy(f"router_logits.{f.layer}").relative) for f in self.flips]
        return dataclasses.replace(self, policy=policy, flips=tuple(flips))


@dataclass(frozen=True)
class Side:
    """How a backend is opened, with the probes that it may fill, and the reference beside it, with who watches it."""

    backend: str
    candidate: Callable[[Probes], Stepper]
    reference: Callable[[TorchWatcher], Stepper]


def compare(
    sides: Sequence[Side], script: Script, config: ModelConfig, places: tuple[str, ...] = (), is_local: bool = False
) -> list[Pair]:
    """Run every backend, then the reference for each, which follows its near-tie router choices where they were seen.

    `places` are probes.PLACES to keep. Raises BackendError where a backend is not there.
    """
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    turns = [_turn(side, script, config, places, is_local) for side in sides]
    runners = [turn.candidate for turn in turns] + [turn.reference for turn in turns]
    results = [found for _, found in Comparator.run(runners, data_loader=feeds_of(script))]
    ours, theirs = results[: len(turns)], results[len(turns) :]
    return [turn.pair(script, config, *found) for turn, *found in zip(turns, ours, theirs, strict=True)]


def _saw(probes: Probes, place: str) -> bool:
    return any(name.startswith(f"{place}.") for seen in probes.steps.values() for name in seen)


def largest_errors(pair: Pair, steps: int) -> dict[str, float]:
    """The largest relative error of each probe but router choices, over the first `steps` steps."""
    errors: dict[str, float] = {}
    for index, seen in pair.probes.steps.items():
        names = seen if index < steps else ()
        for name in (n for n in names if not n.startswith("router_ids")):
            c = closeness(seen[name], pair.reference_probes.steps[index][name], pair.dtype)
            errors[name] = max(errors.get(name, 0.0), c.max_relative)
    return errors


def rounding_floors(pair: Pair, steps: int) -> dict[str, float]:
    """The largest relative error of each output and probe over the first `steps` steps."""
    floors = largest_errors(pair, steps)
    for difference in (d for d in pair.differences if d.step < steps):
        name = difference.output
        floors[name] = max(floors.get(name, 0.0), difference.closeness.max_relative)
    return floors


@dataclass(frozen=True)
class _Turn:
    """A side at work. Nothing refers back to its owner: weights are gone when the last reference to them is."""

    candidate: Runner
    reference: Runner
    seen: Probes
    follower: TorchWatcher
    policy: Callable[[], Policy]  # once the candidate is active

    def pair(
        self, script: Script, config: ModelConfig, ours: list[IterationResult], theirs: list[IterationResult]
    ) -> Pair:
        return Pair(
            backend=self.candidate.name,
            note=self.candidate.note,
            poisoned=self.candidate.poisoned and self.reference.poisoned,
            script=script,
            policy=self.policy(),
            results=ours,
            reference=theirs,
            lines=self.reference.lines,
            probes=self.seen,
            reference_probes=self.follower.probes,
            flips=tuple(self.follower.flips),
            config=config,
            judged=ours,
        )


def _turn(side: Side, script: Script, config: ModelConfig, places: tuple[str, ...], is_local: bool) -> _Turn:
    seen = Probes(places)
    candidate = Runner(side.backend, functools.partial(side.candidate, seen), script)

    def policy() -> Policy:
        return Policy(
            config.hidden_size,
            config.num_hidden_layers,
            candidate.dtype,
            is_local=is_local,
            rounds_tokens=candidate.rounds_tokens,
        )

    def allowed(place: str) -> Callable[[int], float]:
        return lambda layer: policy()(f"{place}.{layer}").relative

    follower = TorchWatcher(Probes(places), seen, allowed("router_logits"), allowed("latents"))
    reference = Runner(REFERENCE, functools.partial(side.reference, follower), script)
    return _Turn(candidate, reference, seen, follower, policy)
