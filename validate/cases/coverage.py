"""Expert coverage: which experts the inputs reach, and more inputs where some are not reached."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.validate.backends.probes import Probes, all_steps
from deepseek_trt.validate.backends.sessions import run_step
from deepseek_trt.validate.backends.torch_watch import TorchWatcher
from deepseek_trt.validate.cases.cases import prefill_case
from deepseek_trt.validate.steps import Script, Step

MAX_EXTRA_CASES = 8


@dataclass(frozen=True)
class Coverage:
    """Tokens that each expert of a layer received in the reference; `missed` are those that received none."""

    layer: int
    tokens: tuple[int, ...]
    missed: tuple[int, ...]


def coverage(probes: Probes, config: ModelConfig) -> tuple[Coverage, ...]:
    """Count the tokens of each expert, in the layers that have a router."""
    found = []
    for layer in range(config.num_hidden_layers):
        ids = all_steps(probes, f"router_ids.{layer}")
        if ids is not None:
            counts = [int(n) for n in np.bincount(ids.reshape(-1), minlength=config.n_routed_experts)]
            found.append(Coverage(layer, tuple(counts), tuple(e for e, n in enumerate(counts) if not n)))
    return tuple(found)


def cover_experts(reference: Session, script: Script, config: ModelConfig, seed: int) -> Script:
    """Add prefill cases over drawn tokens until the reference has reached every expert, or MAX_EXTRA_CASES were added.

    Only prefill steps are run for this, as decode steps add few tokens.
    """
    probes = Probes(("router_ids",))
    steps = list(script.steps)
    _watch(reference, probes, [(i, step) for i, step in enumerate(steps) if step.graph == "prefill"])
    for extra in range(MAX_EXTRA_CASES):
        if not any(layer.missed for layer in coverage(probes, config)):
            break
        more = prefill_case(f"coverage {extra}", reference.cache, config.vocab_size, seed + 1 + extra)
        _watch(reference, probes, list(enumerate(more, start=len(steps))))
        steps += more
    return dataclasses.replace(script, steps=tuple(steps))


def _watch(reference: Session, probes: Probes, steps: list[tuple[int, Step]]) -> None:
    watcher = TorchWatcher(probes)
    for index, step in steps:
        with watcher.watch(reference, index, step):
            run_step(reference, step, step.feeds)
