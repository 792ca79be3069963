"""The one Polygraphy runner: each infer is one Step, and the cache carries over from step to step."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from deepseek_trt.export.arrays import Arrays
from deepseek_trt.validate.numbers.compare import Lines
from deepseek_trt.validate.steps import Script, Step


class Stepper(Protocol):
    """A backend that takes a script's steps one after the other; `note` says what a user should know about it."""

    note: str
    dtype: str  # that it computes in

    def start(self, step: Step) -> bool:
        """A case starts: fill the cache with NaN, so that a stray read is loud; False where that cannot be done."""

    def watch(self, index: int, step: Step) -> AbstractContextManager[object]:
        """Entered around run(), which alone is timed."""

    def run(self, index: int, step: Step) -> Arrays:
        """Outputs by name, padding included, as Step.lines takes them."""

    def cached(self, step: Step) -> Arrays:
        """The layers' caches after the step, where it compares them and run() does not give them."""


class Runner(BaseRunner):  # type: ignore[misc]  # polygraphy is untyped
    """Outputs are those of the stepper in float32, a line a real token; `lines` says step by step whose they are.

    `open_stepper` loads the weights when the runner becomes active; they go when it is done.
    """

    def __init__(self, name: str, open_stepper: Callable[[], Stepper], script: Script) -> None:
        super().__init__(name=name)
        self._open, self._script = open_stepper, script
        self.poisoned, self.note, self.dtype, self.rounds_tokens = True, "", "", False  # known once active
        self.lines: list[Lines] = []

    def activate_impl(self) -> None:
        self._stepper = self._open()
        self.note, self.dtype = self._stepper.note, self._stepper.dtype
        self.rounds_tokens = getattr(self._stepper, "rounds_tokens", False)

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("step", np.int64, (1,))

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, npt.NDArray[np.float32]]:
        index = int(feed_dict["step"][0])
        step = self._script.steps[index]
        if step.starts_case:
            self.poisoned &= self._stepper.start(step)
        with self._stepper.watch(index, step):
            start = time.perf_counter()
            outputs = self._stepper.run(index, step)
            self.inference_time = time.perf_counter() - start
        outputs = {**outputs, **self._stepper.cached(step)}
        found = {name: step.lines(name, value) for name, value in outputs.items()}
        self.lines.append({name: owners for name, (_, owners) in found.items()})
        return OrderedDict((name, value.astype(np.float32, copy=False)) for name, (value, _) in found.items())

    def deactivate_impl(self) -> None:
        del self._stepper


def feeds_of(script: Script) -> list[Arrays]:
    """What Polygraphy feeds every runner: which of the script's steps it is."""
    return [{"step": np.array([index])} for index in range(len(script.steps))]
