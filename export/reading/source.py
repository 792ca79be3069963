"""Source: a checkpoint read for a task, its config completed by its tensors, and every tensor's place planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.export.bundle.interface import CLASSIFICATION, GENERATION, Interface
from deepseek_trt.export.bundle.narrow import KEEP, KEPT, Quantization
from deepseek_trt.export.bundle.recipes import EMBEDDINGS, LM_HEAD, too_large_for_tensorrt
from deepseek_trt.export.config.model_config import ModelConfig, config_notes, read_config
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.mtp.copies import check_alone, check_layer
from deepseek_trt.export.packed.methods import packed_settings
from deepseek_trt.export.packed.opening import open_checkpoint
from deepseek_trt.export.packed.settings import PackedSettings
from deepseek_trt.export.reading.adapter import Adapter
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.classifier import Classifier
from deepseek_trt.export.reading.formats import ADAPTER_CONFIG, check_folder, quantization_notes
from deepseek_trt.export.reading.infer import config_of_tensors, task_of, written_keys
from deepseek_trt.export.reading.narrow_recipe import read_quantization
from deepseek_trt.export.reading.weight_files import CONFIG_FILE
from deepseek_trt.export.text.reading import read_text
from deepseek_trt.export.text.wording import shown, some
from deepseek_trt.export.writing.carried_files import check_carried
from deepseek_trt.export.writing.kept_plan import kept, kept_if_any
from deepseek_trt.export.writing.narrow_plan import narrowed
from deepseek_trt.export.writing.packed_plan import taken
from deepseek_trt.export.writing.weight_plan import WeightPlan, main_dtype, plan_weights

InterfaceOf = Callable[[str], Interface]  # by the task


@dataclass(frozen=True)
class Source:
    """What config.json and the shards' headers say. `config` has the layers that are wanted, `notes` are for people.

    The tensors of `checkpoint` are as the `adapter` leaves them, where there is one.
    """

    checkpoint: Checkpoint
    interface: Interface
    config: ModelConfig
    classifier: Classifier | None
    plan: WeightPlan
    notes: tuple[str, ...]
    adapter: Adapter | None = None
    quantization: Quantization | None = None

    @property
    def num_labels(self) -> int:
        return len(self.classifier.labels) if self.classifier else 0


def read_source(
    folder: Path,
    interface: Interface | InterfaceOf | None = None,
    num_layers: int | None = None,
    adapter: Path | None = None,
    quantize: str | None = None,
    keep: bool = True,
) -> Source:
    """Read all that is known of the checkpoint in `folder` before a weight is read: check and export accept the same.

    Without an interface, or where it is a function of the task, the task is the one that the checkpoint is for.
    `quantize` names what the export narrows; None keeps fp8 where it can be, if `keep`. Raises ConfigError or
    CheckpointError, naming key, file or tensor.
    """
    quantization = None if quantize is None else read_quantization(quantize)
    check_folder(folder)
    check_carried(folder)
    raw = read_config(folder / CONFIG_FILE)
    written = ModelConfig.from_hf(raw)  # before anything else looks at raw
    packed = packed_settings(raw)
    base, merged = _open(folder, packed, adapter)
    if packed is not None and base.is_packed:
        _check_alone(packed.label, adapter, quantize)
    checkpoint = merged.merged_into(base) if merged else base
    if not isinstance(interface, Interface):
        interface = (interface or _default_interface)(task_of(raw, checkpoint))
    if interface.mtp:
        check_alone(num_layers=num_layers, adapter=adapter, quantize=quantization)
        _check_not_packed(packed, base)
    declared, notes = config_of_tensors(written, checkpoint, written_keys(raw, interface.task))
    declared, text_notes = read_text(folder, raw, declared)
    classifier = Classifier.from_hf(raw, checkpoint) if interface.task == CLASSIFICATION else None
    _check_lm_head(interface, raw, checkpoint)
    _check_tied(declared, merged)
    labels = len(classifier.labels) if classifier else 0
    config = _cut(declared, num_layers)
    if interface.mtp:
        check_layer(config, checkpoint)
    plan = plan_weights(config, checkpoint, declared.num_hidden_layers, interface, labels)
    plan = dataclasses.replace(plan, dtype=main_dtype(base))  # an adapter is often kept in float32
    large = _too_large(plan)
    if packed is not None and base.is_packed:
        plan, quantization, narrow_notes = taken(plan, base.tensors, packed.label)
    elif quantization == KEPT:
        plan, quantization, narrow_notes = kept(plan, checkpoint.tensors)
    elif quantize is None and keep and not (interface.mtp or adapter):
        plan, quantization, narrow_notes = kept_if_any(plan, checkpoint.tensors)
    else:
        plan, narrow_notes = narrowed(plan, quantization) if quantization else (plan, ())
    notes = (
        *config_notes(raw),
        *notes,
        *_task_note(interface, raw, checkpoint),
        *base.notes,
        *quantization_notes(raw, base.tensors),
        *(merged.notes(folder) if merged else ()),
        *large,
        *text_notes,
        *narrow_notes,
    )
    return Source(checkpoint, interface, config, classifier, plan, notes, merged, quantization)


def export_dtype(source: Source, wanted: str | None, by_reference: bool) -> str:
    """The dtype of the export; ConfigError where a bundle by reference cannot have it."""
    stored = source.plan.dtype
    if by_reference and source.adapter is not None:
        raise ConfigError("--by-reference and --adapter: merged weights lie in no checkpoint, so leave out one of them")
    if by_reference and source.checkpoint.is_packed:
        raise ConfigError(
            "--by-reference: codes of the checkpoint lie in other shapes than graphs take them in: leave it out, the "
            "bundle then holds them in as many bytes"
        )
    if by_reference and wanted not in (None, stored):
        raise ConfigError(
            f"--by-reference keeps the checkpoint's dtype {stored}: leave out --dtype {wanted}, or export with weights"
        )
    return wanted or stored


def _open(folder: Path, packed: PackedSettings | None, adapter: Path | None) -> tuple[Checkpoint, Adapter | None]:
    """The checkpoint as it is stored, and the adapter."""
    checkpoint = open_checkpoint(folder, packed)
    own = (folder / ADAPTER_CONFIG).exists()
    if own and (adapter is None or adapter.resolve() != folder.resolve()):
        raise CheckpointError(
            f"{folder} holds an adapter beside the model ({ADAPTER_CONFIG}), which transformers would load with it: "
            f"merge it with --adapter {folder}, or take its files away"
        )
    return checkpoint, Adapter.open(adapter) if adapter else None


def _check_alone(label: str, adapter: Path | None, quantize: str | None) -> None:
    """Weights that are packed are taken as they are; ConfigError where an option asks for other numbers."""
    if adapter is not None:
        raise ConfigError(
            f"--adapter {adapter}: the checkpoint is packed ({label}), and sums with codes would be rounded anew: "
            "merge the adapter into the bfloat16 checkpoint that it was made from, and --quantize that"
        )
    if quantize is not None and quantize != KEEP:
        raise ConfigError(
            f"--quantize {shown(quantize)}: the checkpoint is packed already ({label}), and its codes are taken as "
            "they are: leave out --quantize, or give the bfloat16 checkpoint that it was made from"
        )


def _check_not_packed(packed: PackedSettings | None, base: Checkpoint) -> None:
    """ConfigError where the layer of multi-token prediction might be codes."""
    if packed is not None and base.is_packed:
        raise ConfigError(f"--mtp: the checkpoint is packed ({packed.label}), whose layer is not read: leave out --mtp")


def _default_interface(task: str) -> Interface:
    return Interface(task, cache=task != CLASSIFICATION)


def _task_note(interface: Interface, raw: dict[str, Any], checkpoint: Checkpoint) -> tuple[str, ...]:
    if interface.task == GENERATION or interface.task != task_of(raw, checkpoint):
        return ()
    return (f"the checkpoint has no {LM_HEAD}: it is for {interface.task}, and generates no text",)


def _check_tied(config: ModelConfig, adapter: Adapter | None) -> None:
    if adapter and config.tie_word_embeddings and adapter.touched & {EMBEDDINGS, LM_HEAD}:
        raise CheckpointError(
            "the adapter changes the embeddings or lm_head, which config.json ties together (tie_word_embeddings): "
            "merge the adapter with peft (merge_and_unload), and export what that gives"
        )


def _check_lm_head(interface: Interface, raw: dict[str, Any], checkpoint: Checkpoint) -> None:
    """A checkpoint of another class has no lm_head.weight either, but its embeddings are no head."""
    if interface.task != GENERATION or task_of(raw, checkpoint) == GENERATION:
        return
    name = next(iter(raw.get("architectures") or ()), "a classifier")
    raise CheckpointError(
        f"tensor {LM_HEAD} is missing: this is {some([name])}; export it with --task {task_of(raw, checkpoint)}"
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
