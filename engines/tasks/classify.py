"""TextClassifier: a text-classification bundle, texts or tokens in, labels and scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek_trt.engines.sessions.graphs import graph_session
from deepseek_trt.engines.tasks.rows import check_finite, encoder_of, feeds_of, pad_rows, strip_padding
from deepseek_trt.export.arrays import Floats, Int32s, Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BundleError, RequestError

BATCH = 32  # rows computed at once


@dataclass(frozen=True)
class Classification:
    """The best label, and every label with its score, best first.

    Scores are the softmax or sigmoid of the logits, or the logits, as config.json's problem_type wants.
    """

    label: str
    score: float
    scores: tuple[tuple[str, float], ...]


class TextClassifier:
    """Raises BundleError for a bundle of another task."""

    def __init__(self, bundle: Bundle, backend: str = "ort") -> None:
        if bundle.manifest.classifier is None:
            raise BundleError(
                f"{bundle.path} is for {bundle.manifest.task}: export a DeepseekV2ForSequenceClassification checkpoint "
                "with --task text-classification"
            )
        self._bundle, self._classifier = bundle, bundle.manifest.classifier
        self.session = graph_session(bundle, backend)
        self._encode = encoder_of(bundle)

    @classmethod
    def open(cls, bundle: str | Path, *, backend: str = "ort") -> TextClassifier:
        """The bundle at this path."""
        return cls(Bundle.open(Path(bundle)), backend)

    def __repr__(self) -> str:
        return f"TextClassifier({self.session.backend}, labels {', '.join(self._classifier.labels)})"

    def classify(self, texts: Sequence[str | Sequence[int]]) -> list[Classification]:
        """One result a text (or row of token ids), in order."""
        rows = self.encode(texts)
        results: list[Classification] = []
        for start in range(0, len(rows), BATCH):
            ids, lengths = pad_rows(rows[start : start + BATCH], self._bundle.manifest.model.pad_token_id)
            results += map(self._named, scores_of(self.logits(ids, lengths), self._classifier.activation))
        return results

    def logits(self, input_ids: Int64s, sequence_lengths: Int32s | None = None) -> Floats:
        """Float32 [B, num_labels] at each row's last real token, of ids [B, S].

        With sequence_lengths [B] the rows are right-padded; without, pad_token_id tells padding on either side, and a
        batch of a model that has none is a RequestError. A row of padding alone counts as one padding token.
        """
        if sequence_lengths is None:
            input_ids, sequence_lengths = strip_padding(input_ids, self._bundle.manifest.model.pad_token_id)
        made: Floats = self.session.run("model", feeds_of(self._bundle, input_ids, sequence_lengths))["logits"]
        return made

    def encode(self, texts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Token ids of each text. RequestError for one that is longer than the model takes."""
        rows = list(map(self._encode, texts))
        longest = self._bundle.manifest.model.max_position_embeddings
        for index, row in enumerate(rows):
            if len(row) > longest:
                raise RequestError(f"text {index} has {len(row)} tokens, the model takes {longest}: shorten it")
        return rows

    def _named(self, scores: Floats) -> Classification:
        pairs = sorted(zip(self._classifier.labels, scores.tolist(), strict=True), key=lambda pair: -pair[1])
        return Classification(*pairs[0], tuple(pairs))


def scores_of(logits: Floats, activation: str) -> Floats:
    """Scores [B, num_labels] of logits: softmax, sigmoid or none, in float64 and back.

    BackendError for logits that are not finite.
    """
    check_finite(logits, "logits")
    x = logits.astype(np.float64)
    if activation == "softmax":
        e = np.exp(x - x.max(-1, keepdims=True))
        x = e / e.sum(-1, keepdims=True)
    elif activation == "sigmoid":
        x = 1.0 / (1.0 + np.exp(-x))
    return x.astype(np.float32)
