"""SessionStepper: a Session, prefill and decode over its own page pools, as a runner steps it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np

from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Arrays, Floats
from deepseek_trt.export.bundle.graph import LAST_HIDDEN
from deepseek_trt.validate.backends.probes import Watcher
from deepseek_trt.validate.steps import Step


class SessionStepper:
    """Outputs: "logits", where the bundle drafts "last_hidden_state", and where the step compares them "latents.N"."""

    def __init__(self, session: Session, watcher: Watcher | None = None) -> None:
        self.note, self.dtype = session.note, session.cache.dtype
        self.rounds_tokens = session.rounds_tokens
        self._session, self._watcher = session, watcher

    def start(self, step: Step) -> bool:
        return poison(self._session)

    def watch(self, index: int, step: Step) -> AbstractContextManager[object]:
        return self._watcher.watch(self._session, index, step) if self._watcher else nullcontext()

    def run(self, index: int, step: Step) -> Arrays:
        logits = run_step(self._session, step, step.feeds)
        return {"logits": logits, LAST_HIDDEN: self._session.hidden} if self._session.drafts else {"logits": logits}

    def cached(self, step: Step) -> Arrays:
        layers = range(self._session.cache.layers - self._session.drafts) if step.slots is not None else ()
        return {f"latents.{layer}": self._session.pool(layer) for layer in layers}


def poison(session: Session) -> bool:
    """Fill all pages with NaN; False where the session gives no way to."""
    session.fill(float("nan"))
    return all(bool(np.isnan(session.pool(layer).astype(np.float32)).all()) for layer in range(session.cache.layers))


def run_step(session: Session, step: Step, feeds: Arrays) -> Floats:
    """Logits of the step, fed with `feeds`."""
    run = session.decode if step.graph == "decode" else session.prefill
    return run(feeds["input_ids"], feeds["sequence_lengths"], feeds["past_lengths"], feeds["page_table"])
