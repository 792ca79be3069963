"""Polygraphy runners over Sessions: each infer is one Step, and the page pools carry over from step to step."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from deepseek_trt.engines.sessions.session import Session, row_latents
from deepseek_trt.export.arrays import Floats
from deepseek_trt.validate.backends.probes import Watcher
from deepseek_trt.validate.cases.cases import Script, Step

Feed = dict[str, npt.NDArray[Any]]
_INPUTS = {"step": (np.int64, 1), "input_ids": (np.int64, 2), "sequence_lengths": (np.int32, 1)}
_INPUTS |= {"past_lengths": (np.int32, 1), "page_table": (np.int32, 2)}


def feeds_of(script: Script) -> list[Feed]:
    """What every runner is fed; "step" says which of the script's steps it is."""
    return [{"step": np.array([index]), **feed_of(step)} for index, step in enumerate(script.steps)]


def feed_of(step: Step) -> Feed:
    """The step's inputs by name."""
    return {name: getattr(step, name) for name in ("input_ids", "sequence_lengths", "past_lengths", "page_table")}


class SessionRunner(BaseRunner):  # type: ignore[misc]  # polygraphy is untyped
    """A Session as a Polygraphy runner. Outputs: logits [tokens, vocab], and latents.N [tokens, D] where asked for."""

    def __init__(self, name: str, make: Callable[[], Session], script: Script, watcher: Watcher | None = None) -> None:
        super().__init__(name=name)
        self._make, self._script, self._watcher = make, script, watcher
        self.poisoned, self.note, self.dtype = True, "", ""  # known once active

    def activate_impl(self) -> None:
        self.session = self._make()
        self.note, self.dtype = self.session.note, self.session.cache.dtype

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name, (dtype, rank) in _INPUTS.items():
            metadata.add(name, dtype, (None,) * rank)
        return metadata

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, npt.NDArray[Any]]:
        index = int(feed_dict["step"][0])
        step = self._script.steps[index]
        if step.starts_case:
            self.poisoned &= poison(self.session)
        with self._watcher.watch(self.session, index, step) if self._watcher else nullcontext():
            start = time.perf_counter()
            logits = run_step(self.session, step, feed_dict)
            self.inference_time = time.perf_counter() - start
        outputs = OrderedDict(logits=live_logits(logits, step))
        if step.compares_cache:
            outputs.update(cached_latents(self.session, step))
        return outputs

    def deactivate_impl(self) -> None:
        del self.session


def poison(session: Session) -> bool:
    """Fill all pages with NaN, so that a stray read is loud; False where the session gives no way to."""
    session.fill(float("nan"))
    return all(bool(np.isnan(session.pool(layer).astype(np.float32)).all()) for layer in range(session.cache.layers))


def live_logits(logits: Floats, step: Step) -> Floats:
    """The logits that mean something: [rows, vocab] at last tokens, or [tokens, vocab] where the graph gives all."""
    return logits[step.live] if logits.ndim == 3 else logits[step.sequence_lengths > 0]


def cached_latents(session: Session, step: Step) -> dict[str, Floats]:
    """Each layer's latents of all rows, one after the other: used slots only."""
    return {
        f"latents.{layer}": np.concatenate([row_latents(session, layer, *row) for row in step.cached()])
        for layer in range(session.cache.layers)
    }


def run_step(session: Session, step: Step, feed: Feed) -> Floats:
    """Logits of the step, fed with `feed`."""
    if step.graph == "decode":
        return session.decode(feed["input_ids"], feed["past_lengths"], feed["page_table"])
    return session.prefill(feed["input_ids"], feed["sequence_lengths"], feed["past_lengths"], feed["page_table"])
