"""Embedder: texts to vectors, with a feature-extraction bundle that has no cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from deepseek_trt.engines.sessions.graphs import graph_session
from deepseek_trt.engines.tasks.rows import check_finite, encoder_of, feeds_of, pad_rows
from deepseek_trt.export.arrays import Floats, Int32s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import FEATURES
from deepseek_trt.export.errors import BundleError, RequestError

Pooling = Literal["mean", "last"]


class Embedder:
    """Raises BundleError for a bundle of another task, or with a cache."""

    def __init__(self, bundle: Bundle, backend: str = "ort") -> None:
        if bundle.manifest.task != FEATURES or bundle.manifest.interface.cache:
            raise BundleError(
                f"{bundle.path} is for {bundle.manifest.task}: export the checkpoint with --task {FEATURES} --no-cache"
            )
        self._bundle, self.session = bundle, graph_session(bundle, backend)
        self._encode = encoder_of(bundle)

    @classmethod
    def open(cls, bundle: str | Path, *, backend: str = "ort") -> Embedder:
        """The bundle at this path."""
        return cls(Bundle.open(Path(bundle)), backend)

    def __repr__(self) -> str:
        return f"Embedder({self.session.backend}, {self._bundle.manifest.model.hidden_size} numbers a text)"

    def embed(self, texts: Sequence[str | Sequence[int]], pooling: Pooling = "mean", unit: bool = True) -> Floats:
        """Float32 [n, hidden], a row a text: the mean of its tokens' hidden states, or the last one's; of length one
        where `unit`.
        """
        rows = list(map(self._encode, texts))
        if not all(len(row) for row in rows):
            raise RequestError("a text without tokens has no embedding: leave it out")
        ids, lengths = pad_rows(rows)
        hidden = self.session.run("model", feeds_of(self._bundle, ids, lengths))["last_hidden_state"]
        pooled = pool(hidden, lengths, pooling)
        check_finite(pooled, "hidden states")
        return pooled / np.linalg.norm(pooled, axis=-1, keepdims=True) if unit else pooled


def pool(hidden: Floats, lengths: Int32s, pooling: Pooling) -> Floats:
    """One vector a row of right-padded hidden states [B, S, hidden]."""
    if pooling == "last":
        last: Floats = hidden[np.arange(len(hidden)), lengths - 1]
        return last
    real = np.arange(hidden.shape[1]) < lengths[:, None]
    mean: Floats = (np.where(real[:, :, None], hidden, 0.0).sum(1) / lengths[:, None]).astype(np.float32)
    return mean
