"""What benchmarks/server.py puts in the place of the runtime's OrtSession: a session whose every call takes 5 ms.

Everything else of the served model is the product's: what is missing of the ideal rate was lost around the engine.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import numpy as np

from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.plugins.cpu.library import cpu_library

STEP_SECONDS = 0.005
_TOKEN = 300  # a piece of text of the demo model, and no stop token
_SET_TIMER_SLACK = 29  # prctl: Linux may round a thread's sleeps up by this many nanoseconds, 50,000 by default
_thread = threading.local()
_SHARE = 1 / 16  # of a call's lateness that the next ones make up for


class OrtSession(Session):
    """Sleeps as an engine on a GPU would let the processor sleep; the likeliest token is always the same.

    A sleep ends late, by 0.2 ms on some machines: each is shorter by what those before were late, so that a call takes
    5 ms on average, and what is missing of the ideal rate was not lost here.
    """

    backend = "stand-in"
    note = "5 ms per step"

    def __init__(self, bundle: Any, pages: int, threads: int = 0, *_: Any, **__: Any) -> None:
        self.cache, self.pages = bundle.manifest.cache, pages
        self.vocab_size = bundle.manifest.model.vocab_size
        self.library = cpu_library(bundle).path  # samples on the CPU, as for every session
        self._logits = np.zeros((1024, self.vocab_size), dtype=np.float32)
        self._logits[:, _TOKEN] = 1.0
        self._late = 0.0  # seconds

    def prefill(self, input_ids: Any, sequence_lengths: Any, past_lengths: Any, page_table: Any) -> Any:
        return self._step(len(input_ids))

    def decode(self, input_ids: Any, sequence_lengths: Any, past_lengths: Any, page_table: Any) -> Any:
        return self._step(input_ids.size).reshape(*input_ids.shape, -1)

    def pool(self, layer: int) -> Any:
        return np.zeros((self.pages, self.cache.page_size, self.cache.latent_dim), dtype=np.float32)

    def _step(self, rows: int) -> Any:
        end = time.perf_counter() + STEP_SECONDS
        if not getattr(_thread, "exact", False):
            _thread.exact = ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1) == 0
        time.sleep(max(end - self._late - time.perf_counter(), 0))
        self._late = min(max(self._late + (time.perf_counter() - end) * _SHARE, 0.0), STEP_SECONDS / 4)
        return self._logits[:rows]
