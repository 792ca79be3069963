"""PartStepper: one part of the model as a runner steps it, each time on the states that enter the part."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from deepseek_trt.export.arrays import Array, Arrays
from deepseek_trt.validate.backends.probes import Probes
from deepseek_trt.validate.steps import Part, Step

States = dict[int, Array]  # by step: [B * S, hidden], padding included
# Gives values by probe name, "present" (the new pool) of a layer and "logits" of the head, for a step, its number, the
# states that enter the part and the case's page pool.
RunStep = Callable[[int, Step, Array | None, Array | None], Arrays]
# Places whose values are outputs, beside latents and logits. Not what attention gives: its softmax turns the absolute
# errors of scores into relative ones, which a count of roundings does not know; the layer's output holds it.
JUDGED = ("router_logits", "experts", "hidden")


class PartStepper:
    """Outputs: "latents.N" where the step compares them, "logits" of the head, and JUDGED places.

    `probes` receives what was seen inside, `left` what leaves the part, which is what enters the next one; `pool` is
    the shape of a layer's page pool.
    """

    def __init__(
        self,
        run_step: RunStep,
        dtype: str,
        note: str,
        part: Part,
        pool: tuple[int, ...],
        entering: States,
        left: States,
        probes: Probes,
    ) -> None:
        self.dtype, self.note, self.rounds_tokens = dtype, note, False
        self._run_step, self._part, self._shape, self._probes = run_step, part, pool, probes
        self._entering, self._left = entering, left
        self._pools: Arrays = {}  # by case: a script may turn to another before it comes back

    def start(self, step: Step) -> bool:
        if self._part.is_layer:
            self._pools[step.case] = np.full(self._shape, np.nan, np.float32)
        return True

    def watch(self, index: int, step: Step) -> AbstractContextManager[object]:
        return nullcontext()

    def run(self, index: int, step: Step) -> Arrays:
        values = self._run_step(index, step, self._entering.get(index), self._pools.get(step.case))
        outputs: Arrays = {}
        if self._part.is_layer:
            self._pools[step.case] = values.pop("present")
            outputs = {f"latents.{self._part.index}": self._pools[step.case]} if step.slots is not None else {}
        if self._part.is_head:
            outputs = {"logits": values.pop("logits")}
        else:
            self._left[index] = values[f"hidden.{self._part.index + 1}"].astype(np.float32)
        for name, value in values.items():
            self._probes.keep(index, step, name, value)
        judged = [name for place in JUDGED for name in values if name.startswith(f"{place}.")]
        return outputs | {name: values[name].reshape(*step.input_ids.shape, -1) for name in judged}

    def cached(self, step: Step) -> Arrays:
        return {}
