"""What a layer of multi-token prediction shares with the model: checkpoints hold copies, which must be such."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_trt.export.bundle.recipes import EMBEDDINGS, LM_HEAD
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.tensors import StoredTensor

_CHUNK = 2**24


def check_alone(**options: object) -> None:
    """ConfigError naming the option, as ExportRequest calls it, that --mtp does not go with."""
    for name, given in options.items():
        if given:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"--mtp and {option}: the layer is exported in one dtype, beside the whole model that it was trained "
                "with: leave out one of them"
            )


def check_layer(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """CheckpointError where there is no such layer."""
    name = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
    if name not in checkpoint.tensors:
        raise CheckpointError(
            f"--mtp: {checkpoint.root} holds no layer of multi-token prediction ({name} is missing): leave out --mtp"
        )


def original_of(name: str, config: ModelConfig) -> str | None:
    """The model's tensor that a tensor of the layer has to be a copy of; None where it is the layer's own."""
    at = f"model.layers.{config.num_hidden_layers}."
    head = EMBEDDINGS if config.tie_word_embeddings else LM_HEAD
    return {f"{at}embed_tokens.weight": EMBEDDINGS, f"{at}shared_head.head.weight": head}.get(name)


def check_copies(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Compare the copies byte by byte with what they are copies of; CheckpointError naming one that is none."""
    for name, copy in checkpoint.tensors.items():
        original = original_of(name, config)
        if original is not None and not _are_alike(copy, checkpoint.tensors[original]):
            raise CheckpointError(
                f"tensor {name} is no copy of {original}: multi-token prediction with embeddings or a head of its own "
                "is not supported: leave out --mtp"
            )


def _are_alike(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(_chunks(one), _chunks(other), strict=True))


def _chunks(tensor: StoredTensor) -> Iterator[bytes]:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        for at in range(0, tensor.nbytes, _CHUNK):
            yield stream.read(min(_CHUNK, tensor.nbytes - at))
