"""GraphStepper: a GraphSession, tensors in and tensors out, as a runner steps it; the cache is kept here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np

from deepseek_trt.engines.sessions.graphs import GraphSession
from deepseek_trt.export.arrays import Arrays, numpy_dtype
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.validate.steps import Step


class GraphStepper:
    """Outputs are all of the graph's. The cache starts as NaN: `pages` pages, or contiguous without a slot."""

    def __init__(self, session: GraphSession, bundle: Bundle, pages: int) -> None:
        self.note, self.dtype = session.note, session.dtype
        self._session, self._bundle, self._pages = session, bundle, pages

    def start(self, step: Step) -> bool:
        past = [t for t in self._bundle.graph(step.graph).inputs if t.name.startswith("past_key_values.")]
        sizes = {"pages": self._pages, "past_sequence_length": 0, "batch_size": len(step.live)}
        shapes = {t.name: [sizes[d] if isinstance(d, str) else d for d in t.dims] for t in past}
        self._cache = {name: np.full(shape, np.nan, numpy_dtype(self.dtype)) for name, shape in shapes.items()}
        return True

    def watch(self, index: int, step: Step) -> AbstractContextManager[object]:
        return nullcontext()

    def run(self, index: int, step: Step) -> Arrays:
        kind = numpy_dtype(self.dtype)
        feeds = {name: a.astype(kind) if a.dtype == np.float32 else a for name, a in step.feeds.items()}
        out = self._session.run(step.graph, {**feeds, **self._cache})
        self._cache = {name: out[name.replace("past_key_values", "present")] for name in self._cache}
        return out

    def cached(self, step: Step) -> Arrays:
        return {}
