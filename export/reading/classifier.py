"""Classifier: what a sequence classification checkpoint calls its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.text.valid import flaw_of
from deepseek_trt.export.text.wording import shown

SCORE = "score.weight"  # [num_labels, hidden], no bias
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class Classifier:
    """The labels in order of the logits, and config.json's problem_type, which says how logits become scores."""

    labels: tuple[str, ...]
    problem_type: str | None = None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], checkpoint: Checkpoint) -> Classifier:
        """Read config.json's id2label and problem_type; labels that it does not name are LABEL_0, LABEL_1, ...

        Raises CheckpointError where there is no score head, ConfigError where config.json contradicts it.
        """
        score = checkpoint.tensors.get(SCORE)
        if score is None:
            raise CheckpointError(
                f"tensor {SCORE} is missing: the checkpoint has no classification head; "
                "export it with --task text-generation or feature-extraction"
            )
        if len(score.shape) != 2:
            raise CheckpointError(
                f"tensor {SCORE} has shape {list(score.shape)}, a matrix is needed: download it again"
            )
        count, named = score.shape[0], raw.get("id2label") or {}
        for written in (len(named) or count, raw.get("num_labels") or count):
            if written != count:
                raise ConfigError(f"config.json names {written} labels, {SCORE} has {count} rows: download both again")
        other = sorted(named.keys() - set(map(str, range(count))))
        if other:
            raise ConfigError(f"id2label names the class {shown(other[0])}, which is none of 0 to {count - 1}: mend it")
        problem = raw.get("problem_type")
        if problem is not None and problem not in PROBLEM_TYPES:
            raise ConfigError(f"problem_type {shown(problem)} is not one of {', '.join(PROBLEM_TYPES)}")
        labels = tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(count))
        for i, flaw in enumerate(map(flaw_of, labels)):
            if flaw:
                raise ConfigError(f"id2label {i} in config.json {flaw}: give valid Unicode text")
        return cls(labels, problem)

    @property
    def activation(self) -> str:
        """The function from logits to scores, as transformers' pipeline chooses it: softmax, sigmoid or none."""
        if self.problem_type == "regression":
            return "none"
        if self.problem_type == "multi_label_classification" or len(self.labels) == 1:
            return "sigmoid"
        return "softmax"
