"""Source: a checkpoint read for a task, its config completed by its tensors, and every tensor's place planned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.export.bundle.interface import CLASSIFICATION, GENERATION, Interface
from deepseek_trt.export.bundle.recipes import LM_HEAD, too_large_for_tensorrt
from deepseek_trt.export.config.model_config import ModelConfig, config_notes, read_config
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.classifier import Classifier
from deepseek_trt.export.reading.infer import config_of_tensors, task_of, written_keys
from deepseek_trt.export.text.reading import read_text
from deepseek_trt.export.writing.weight_plan import WeightPlan, plan_weights


@dataclass(frozen=True)
class Source:
    """What config.json and the shards' headers say. `config` has the layers that are wanted, `notes` are for people."""

    checkpoint: Checkpoint
    interface: Interface
    config: ModelConfig
    classifier: Classifier | None
    plan: WeightPlan
    notes: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        return len(self.classifier.labels) if self.classifier else 0


def read_source(folder: Path, interface: Interface | None = None, num_layers: int | None = None) -> Source:
    """Read the headers of the checkpoint in `folder`; without an interface, for the task that it says it is for.

    Raises ConfigError or CheckpointError, naming key or tensor.
    """
    checkpoint, raw = Checkpoint.open(folder), read_config(folder / "config.json")
    written = ModelConfig.from_hf(raw)  # before anything else looks at raw
    interface = interface or Interface(task_of(raw, checkpoint))
    declared, notes = config_of_tensors(written, checkpoint, written_keys(raw, interface.task))
    declared, text_notes = read_text(folder, raw, declared)
    classifier = Classifier.from_hf(raw, checkpoint) if interface.task == CLASSIFICATION else None
    _check_lm_head(interface, raw, checkpoint)
    config = _cut(declared, num_layers)
    labels = len(classifier.labels) if classifier else 0
    plan = plan_weights(config, checkpoint, declared.num_hidden_layers, interface, labels)
    notes = config_notes(raw) + notes + text_notes + _too_large(plan)
    return Source(checkpoint, interface, config, classifier, plan, notes)


def _check_lm_head(interface: Interface, raw: dict[str, Any], checkpoint: Checkpoint) -> None:
    """A checkpoint of another class has no lm_head.weight either, but its embeddings are no head."""
    if interface.task != GENERATION or task_of(raw, checkpoint) == GENERATION:
        return
    name = next(iter(raw.get("architectures") or ()), "a classifier")
    raise CheckpointError(
        f"tensor {LM_HEAD} is missing: this is {name}; export it with --task {task_of(raw, checkpoint)}"
    )


def _cut(config: ModelConfig, num_layers: int | None) -> ModelConfig:
    if num_layers is None:
        return config
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ConfigError(f"--num-layers {num_layers}: the model has {config.num_hidden_layers} layers")
    return dataclasses.replace(config, num_hidden_layers=num_layers)


def _too_large(plan: WeightPlan) -> tuple[str, ...]:
    large = too_large_for_tensorrt(plan.recipes)
    if not large:
        return ()
    return (f"{len(large)} tensors hold 2^31 numbers or more, e.g. {large[0].name}: TensorRT cannot take them",)
