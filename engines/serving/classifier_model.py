"""TritonPythonModel of a classifier: the server batches the texts of several requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from deepseek_trt.engines.serving.beating import METRICS, Beating
from deepseek_trt.engines.serving.triton_board import MetricBoard
from deepseek_trt.engines.tasks.classify import TextClassifier, scores_of
from deepseek_trt.engines.tasks.rows import pad_rows
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import DeepseekTrtError
from deepseek_trt.export.text.valid import printable, text_of_bytes

MOST_TOGETHER = 32768  # tokens computed at once, padding counted: a long text makes all beside it as long


class TritonPythonModel:
    """What the Python backend calls: initialize once, execute for each batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        path = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._bundle = Bundle.open(path, judges_weights=True)  # as model.py of the repository has just hashed them
        self._classifier = TextClassifier(self._bundle)
        pb_utils.Logger.log_info(f"{args['model_name']}: {self._bundle.manifest.classifier}")
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._beating = Beating(MetricBoard(labels, METRICS))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request; a request that the model cannot take gets an error, the others their labels."""
        with self._beating.work():
            given = [self._rows(request) for request in requests]
            together = self._logits([row for each in given if isinstance(each, list) for row in each])
            return [self._answer(each, together) if isinstance(each, list) else each for each in given]

    def finalize(self) -> None:
        self._beating.close()

    def _rows(self, request: Any) -> list[list[int]] | Any:
        """The request's texts as tokens, or the response that refuses it."""
        texts = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)
        try:
            return self._classifier.encode([text_of_bytes(text, "text_input") for text in texts])
        except DeepseekTrtError as error:
            return _refusal(error, pb_utils.TritonError.INVALID_ARG)

    def _logits(self, rows: list[list[int]]) -> Iterator[Any] | None:
        """Of all rows at once, in their order; None where one would cost the others too much, or spoils them."""
        if not rows or len(rows) * max(map(len, rows)) > MOST_TOGETHER:
            return None
        try:
            made: Iterator[Any] = iter(self._computed(rows))
            return made
        except Exception:  # whose it is shows when each request is computed by itself
            return None

    def _computed(self, rows: list[list[int]]) -> Any:
        self._beating.step()
        return self._classifier.logits(*pad_rows(rows, self._bundle.manifest.model.pad_token_id))

    def _answer(self, rows: list[list[int]], together: Iterator[Any] | None) -> Any:
        """The request's answer, from the logits of all, or computed by itself, text by text."""
        try:
            made = [next(together) for _ in rows] if together else [self._computed([row])[0] for row in rows]
            return _answer(made, self._bundle)
        except Exception as error:  # of this request alone
            return _refusal(error, pb_utils.TritonError.INTERNAL)


def _refusal(error: Exception, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(printable(str(error))[:1000], code))


def _answer(logits: list[Any], bundle: Bundle) -> Any:
    """Label, score and all scores of each text, in the order of the manifest's labels."""
    classifier = bundle.manifest.classifier
    assert classifier is not None
    scores = scores_of(np.stack(logits), classifier.activation)
    best = scores.argmax(1)
    labels = np.array([[classifier.labels[i].encode()] for i in best], dtype=np.object_)
    arrays = {"label": labels, "score": scores.max(1, keepdims=True), "scores": scores, "logits": np.stack(logits)}
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])
