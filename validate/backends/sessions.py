"""SessionStepper: a Session, prefill and decode over its own page pools, as a runner steps it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np

from deepseek_trt.engines.sessions.pools import numbers_of
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Array, Arrays, Floats
from deepseek_trt.export.bundle.graph import LAST_HIDDEN
from deepseek_trt.validate.backends.probes import Probes, Watcher
from deepseek_trt.validate.steps import Step


class SessionStepper:
    """Outputs: "logits", where the bundle drafts "last_hidden_state", and where the step compares them "latents.N"."""

    def __init__(self, session: Session, watcher: Watcher | None = None, seen: Probes | None = None) -> None:
        """`seen` is to hold what a narrow cache makes of new tokens."""
        self.note, self.dtype = session.note, session.cache.dtype
        self.rounds_tokens = session.rounds_tokens
        self._session, self._watcher, self._seen = session, watcher, seen

    def start(self, step: Step) -> bool:
        return poison(self._session)

    def watch(self, index: int, step: Step) -> AbstractContextManager[object]:
        return self._watcher.watch(self._session, index, step) if self._watcher else nullcontext()

    def run(self, index: int, step: Step) -> Arrays:
        logits = run_step(self._session, step, step.feeds)
        if self._seen is not None and self._session.cache.narrow is not None:
            for layer in range(self._session.cache.layers):
                self._seen.cached[index, layer] = new_latents(self._session, step, layer)
        return {"logits": logits, LAST_HIDDEN: self._session.hidden} if self._session.drafts else {"logits": logits}

    def cached(self, step: Step) -> Arrays:
        layers = range(self._session.cache.layers - self._session.drafts) if step.slots is not None else ()
        return {f"latents.{layer}": self._session.pool(layer) for layer in layers}


def new_latents(session: Session, step: Step, layer: int) -> Array:
    """What a narrow cache holds of the step's real tokens, [tokens, L], in float32."""
    cache, (_, width) = session.cache, step.input_ids.shape
    positions = step.past_lengths[:, None] + np.arange(width)  # [B, S]
    logical = np.minimum(positions // cache.page_size, step.page_table.shape[1] - 1)
    slots = np.take_along_axis(step.page_table, logical, 1), positions % cache.page_size
    assert cache.narrow is not None
    found = numbers_of(cache, [pool[slots][step.live] for pool in session.pools(layer)])
    return found[:, : cache.narrow.rank].astype(np.float32)


def poison(session: Session) -> bool:
    """Fill all pages with NaN; False where the session gives no way to."""
    session.fill(float("nan"))
    return all(bool(np.isnan(session.pool(layer).astype(np.float32)).all()) for layer in range(session.cache.layers))


def run_step(session: Session, step: Step, feeds: Arrays) -> Floats:
    """Logits of the step, fed with `feeds`."""
    run = session.decode if step.graph == "decode" else session.prefill
    return run(feeds["input_ids"], feeds["sequence_lengths"], feeds["past_lengths"], feeds["page_table"])
