"""Polygraphy runners over one part of the model: each infer is one Step on the states that enter the part."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.validate.backends.probes import Arrays, Probes
from deepseek_trt.validate.backends.runners import Feed, live_logits
from deepseek_trt.validate.cases.cases import Script, Step
from deepseek_trt.validate.layerwise.parts import Part

# Run of a step: its number, the step, the states that enter the part, the layer's page pool.
RunStep = Callable[[int, Step, npt.NDArray[Any] | None, npt.NDArray[Any] | None], Arrays]
STATES = "states"
# Places whose values are outputs, beside latents and logits. Not what attention gives: its softmax turns the absolute
# errors of scores into relative ones, which a count of roundings does not know; the layer's output holds it.
JUDGED = ("router_logits", "experts", "hidden")


class PartRunner(BaseRunner):  # type: ignore[misc]  # polygraphy is untyped
    """`open_part` loads the part's weights when the runner becomes active; they go when it is done.

    Outputs by name, real tokens only: JUDGED places, "latents.N" where the step compares them, "logits" of the head.
    `left` holds what left the part, step by step, padding included: what enters the next one.
    """

    def __init__(
        self, name: str, open_part: Callable[[], RunStep], part: Part, script: Script, cache: CacheSpec, probes: Probes
    ) -> None:
        super().__init__(name=name)
        self._open, self._part, self._script, self._probes = open_part, part, script, probes
        self._shape = (script.pages, cache.page_size, cache.latent_dim)
        self.left: dict[int, npt.NDArray[Any]] = {}

    def activate_impl(self) -> None:
        self._run_step = self._open()
        self._pools: Arrays = {}  # by case

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        metadata.add("step", np.int64, (None,))
        if not self._part.is_embedding:
            metadata.add(STATES, np.float32, (None, None))
        return metadata

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, npt.NDArray[Any]]:
        index = int(feed_dict["step"][0])
        step = self._script.steps[index]
        start = time.perf_counter()
        values = self._run_step(index, step, feed_dict.get(STATES), self._pool(step))
        self.inference_time = time.perf_counter() - start
        outputs = OrderedDict(self._latents(step, values.pop("present")) if self._part.is_layer else {})
        if self._part.is_head:
            outputs["logits"] = live_logits(values.pop("logits"), step)
        else:
            self.left[index] = values[f"hidden.{self._part.index + 1}"].astype(np.float32)
        for name, value in values.items():
            self._probes.keep(index, step, name, value)
        seen = self._probes.steps.get(index, {})
        outputs.update((name, seen[name]) for place in JUDGED for name in seen if name.startswith(f"{place}."))
        return outputs

    def deactivate_impl(self) -> None:
        del self._run_step, self._pools

    def _pool(self, step: Step) -> npt.NDArray[Any] | None:
        """The case's pool, full of NaN when the case starts, so that a stray read is loud."""
        if not self._part.is_layer:
            return None
        fresh = np.full(self._shape, np.nan, np.float32) if step.starts_case else None
        return self._pools[step.case] if fresh is None else fresh

    def _latents(self, step: Step, present: npt.NDArray[Any]) -> Arrays:
        """Keep the pool, and give the cached latents of all rows: used slots only."""
        self._pools[step.case] = present
        if not step.compares_cache:
            return {}
        rows = [present[pages].reshape(-1, self._shape[-1])[:total] for pages, total in step.cached()]
        return {f"latents.{self._part.index}": np.concatenate(rows).astype(np.float32)}


def by_graph(script: Script) -> Script:
    """The same steps, all prefills before all decodes: only one graph need be loaded. Cases keep their own order."""
    steps = sorted(script.steps, key=lambda step: step.graph != "prefill")
    return Script(tuple(steps), script.pages)
