"""One part of the model: every backend beside float32 torch with the checkpoint's weights, fed the same states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_trt.engines.sessions.torch import Weights
from deepseek_trt.export.arrays import Array, Arrays
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.dtypes import computed_in
from deepseek_trt.plugins.cpu.library import CpuLibrary
from deepseek_trt.validate.backends.probes import GAP, PLACES, Probes
from deepseek_trt.validate.backends.torch_watch import TorchWatcher
from deepseek_trt.validate.layerwise.fused import FusedDecode, FusedPart
from deepseek_trt.validate.layerwise.ort import OrtPart
from deepseek_trt.validate.layerwise.stepper import PartStepper, RunStep, States
from deepseek_trt.validate.layerwise.torch import TorchPart
from deepseek_trt.validate.layerwise.weights import BundleWeights
from deepseek_trt.validate.pair import Pair, Side, compare
from deepseek_trt.validate.steps import Part, Script, Step


@dataclass(frozen=True)
class Setting:
    """What all parts have in common; `weights` are the reference's."""

    bundle: Bundle
    weights: Weights
    script: Script
    threads: int
    library: CpuLibrary

    @functools.cached_property
    def fused(self) -> FusedDecode:
        return FusedDecode.of(self.bundle, self.library, self.threads)

    def torch_part(self, part: Part, weights: Weights, dtype: str) -> TorchPart:
        manifest = self.bundle.manifest
        return TorchPart(manifest.model, part, weights, dtype, manifest.all_logits)

    def candidate(self, backend: str, part: Part) -> RunStep:
        """Load the part for a backend, with the bundle's weights."""
        if backend == "exported":
            loaded: OrtPart | TorchPart = OrtPart(self.bundle, part, self.threads)
        elif backend == "ort":
            loaded = FusedPart(self.bundle, part, self.threads, self.fused)
        else:
            loaded = self.torch_part(part, self._own, self.bundle.manifest.dtype)
        return lambda index, step, states, pool: loaded.run(step, states, pool)

    def _own(self, name: str) -> Tensor:
        """The bundle's weight in its dtype, a narrow one rounded to it."""
        weights, dtype = BundleWeights(self.bundle), self.bundle.manifest.dtype
        tensor = weights.tensor(name)
        return tensor if weights.records[name].recipe.narrow is None else tensor.to(getattr(torch, dtype))

    def computed_in(self, backend: str) -> str:
        dtype = self.bundle.manifest.dtype
        return dtype if backend == "torch" else computed_in(dtype)

    def note(self, backend: str) -> str:
        own, dtype = self.bundle.manifest.dtype, self.computed_in(backend)
        widened = "" if own == dtype else f"{own} weights, computed in {dtype}"
        return "; ".join(filter(None, (widened, self.fused.note if backend == "ort" else "")))

    def stepper(
        self, run_step: RunStep, dtype: str, note: str, part: Part, entering: States, left: States, probes: Probes
    ) -> PartStepper:
        cache = self.bundle.manifest.cache
        pool = (self.script.pages, cache.page_size, cache.latent_dim)
        return PartStepper(run_step, dtype, note, part, pool, entering, left, probes)


def compare_part(
    setting: Setting, part: Part, backends: Sequence[str], states: States
) -> tuple[dict[str, Pair], States]:
    """Each backend's comparison, and the states that leave the part in the reference.

    Where near ties of the router were followed, those states are the ones that followed the first backend. Candidates
    run first, one after the other; the reference's weights are loaded when theirs are gone.
    """
    reference = functools.cache(lambda: setting.torch_part(part, setting.weights, "float32"))
    left: dict[str, States] = {name: {} for name in backends}
    sides = [_side(setting, part, name, reference, states, left[name]) for name in backends]
    pairs = compare(sides, setting.script, setting.bundle.manifest.model, (*PLACES, GAP), is_local=True)
    return {pair.backend: pair for pair in pairs}, left[backends[0]]


def _side(
    setting: Setting, part: Part, backend: str, reference: Callable[[], TorchPart], entering: States, left: States
) -> Side:
    """Nothing here refers back to its owner: weights are gone when the last reference to them is."""

    def candidate(seen: Probes) -> PartStepper:
        run = setting.candidate(backend, part)
        made = setting.stepper(run, setting.computed_in(backend), setting.note(backend), part, entering, {}, seen)
        made.rounds_tokens = backend == "ort" and setting.fused.rounds_tokens
        return made

    def followed(follower: TorchWatcher) -> PartStepper:
        loaded = reference()

        def run(index: int, step: Step, states: Array | None, pool: Array | None) -> Arrays:
            return loaded.run(step, states, pool, functools.partial(follower.route, index, step))

        return setting.stepper(run, "float32", "", part, entering, left, follower.probes)

    return Side(backend, candidate, followed)
