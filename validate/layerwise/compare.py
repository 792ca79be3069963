"""One part of the model: every backend beside float32 torch with the checkpoint's weights, fed the same states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.comparator import Comparator, IterationResult
from polygraphy.logger import G_LOGGER

from deepseek_trt.engines.sessions.torch import Weights
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.validate.backends.probes import GAP, PLACES, Arrays, Probes
from deepseek_trt.validate.backends.runners import Feed
from deepseek_trt.validate.backends.torch_watch import TorchWatcher
from deepseek_trt.validate.cases.cases import Script, Step
from deepseek_trt.validate.layerwise.inputs import States
from deepseek_trt.validate.layerwise.ort import OrtPart
from deepseek_trt.validate.layerwise.parts import Part
from deepseek_trt.validate.layerwise.runner import STATES, PartRunner, RunStep
from deepseek_trt.validate.layerwise.torch import TorchPart
from deepseek_trt.validate.layerwise.weights import BundleWeights
from deepseek_trt.validate.numbers.tolerance import (
    ROUNDINGS_OF_LOGITS,
    Tolerance,
    derive_tolerance,
    roundings_of,
    tighten,
)
from deepseek_trt.validate.pair import REFERENCE, Pair, TolerancePolicy

Array = npt.NDArray[Any]
OpenTorch = Callable[[], TorchPart]


@dataclass(frozen=True)
class PartPolicy(TolerancePolicy):
    """Tolerances of what a part computes: roundings count from the states that enter it, which are rounded once."""

    def __call__(self, name: str) -> Tolerance:
        place, _, layer = name.rpartition(".")
        if name == "logits":
            roundings = 1 + ROUNDINGS_OF_LOGITS
        else:
            local = min(int(layer), 1) if place == "hidden" else 0  # hidden.N is what layer N - 1 made
            roundings = roundings_of(f"{place}.{local}", self.layers)
        return tighten(derive_tolerance(self.hidden_size, self.dtype, roundings), self.floors.get(name))


@dataclass(frozen=True)
class Setting:
    """What all parts have in common; `weights` are the reference's."""

    bundle: Bundle
    weights: Weights
    script: Script
    threads: int

    def torch_part(self, part: Part, weights: Weights, dtype: str) -> TorchPart:
        manifest = self.bundle.manifest
        return TorchPart(manifest.model, part, weights, dtype, manifest.all_logits)

    def candidate(self, backend: str, part: Part) -> RunStep:
        """Load the part for a backend, with the bundle's weights."""
        if backend == "ort":
            loaded: OrtPart | TorchPart = OrtPart(self.bundle, part, self.threads)
        else:
            loaded = self.torch_part(part, BundleWeights(self.bundle).tensor, self.bundle.manifest.dtype)
        return lambda index, step, states, pool: loaded.run(step, states, pool)

    def computed_in(self, backend: str) -> str:
        dtype = self.bundle.manifest.dtype
        return "float32" if backend == "ort" and dtype == "bfloat16" else dtype


def compare_part(
    setting: Setting, part: Part, backends: Sequence[str], states: States
) -> tuple[dict[str, Pair], States]:
    """Each backend's comparison, and the states that leave the part in the reference.

    Where near ties of the router were followed, those states are the ones that followed the first backend. Candidates
    run first, one after the other; the reference's weights are loaded when theirs are gone.
    """
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # it logs failed comparisons, to stdout; the report says them better
    reference = functools.cache(lambda: setting.torch_part(part, setting.weights, "float32"))
    sides = [_side(setting, part, backend, reference) for backend in backends]
    runners = [side.candidate for side in sides] + [side.reference for side in sides]
    run = Comparator.run(runners, data_loader=_feeds(setting.script, states))
    results = [found for _, found in run]
    pairs = {
        side.backend: side.pair(ours, theirs)
        for side, ours, theirs in zip(sides, results, results[len(sides) :], strict=False)
    }
    return pairs, sides[0].reference.left


@dataclass(frozen=True)
class _Side:
    """One backend: its runner, and the reference's that follows its near-tie router choices."""

    setting: Setting
    backend: str
    policy: PartPolicy
    follower: TorchWatcher
    seen: Probes
    candidate: PartRunner
    reference: PartRunner

    def pair(self, ours: list[IterationResult], theirs: list[IterationResult]) -> Pair:
        manifest = self.setting.bundle.manifest
        same = manifest.dtype == self.policy.dtype
        return Pair(
            backend=self.backend,
            dtype=self.policy.dtype,
            note="" if same else f"{manifest.dtype} weights, computed in {self.policy.dtype}",
            poisoned=True,
            script=self.setting.script,
            policy=self.policy,
            results=ours,
            reference=theirs,
            probes=self.seen,
            reference_probes=self.follower.probes,
            flips=tuple(self.follower.flips),
            config=manifest.model,
            judged=ours,
        )


def _side(setting: Setting, part: Part, backend: str, reference: OpenTorch) -> _Side:
    """Nothing here refers back to its owner: weights are gone when the last reference to them is."""
    config, cache = setting.bundle.manifest.model, setting.bundle.manifest.cache
    policy = PartPolicy(config.hidden_size, config.num_hidden_layers, setting.computed_in(backend), {})
    seen, expected = Probes((*PLACES, GAP)), Probes((*PLACES, GAP))
    follower = TorchWatcher(expected, seen, lambda layer: policy(f"router_logits.{layer}").relative)
    runner = functools.partial(PartRunner, part=part, script=setting.script, cache=cache)
    candidate = runner(backend, lambda: setting.candidate(backend, part), probes=seen)
    followed = runner(REFERENCE, lambda: _following(reference(), follower), probes=expected)
    return _Side(setting, backend, policy, follower, seen, candidate, followed)


def _following(part: TorchPart, follower: TorchWatcher) -> RunStep:
    def run(index: int, step: Step, states: Array | None, pool: Array | None) -> Arrays:
        return part.run(step, states, pool, lambda *choice: follower.route(index, step, *choice))

    return run


def _feeds(script: Script, states: States) -> list[Feed]:
    return [
        {"step": np.array([index]), **({STATES: states[index]} if states else {})} for index in range(len(script.steps))
    ]
