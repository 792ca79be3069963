"""A checkpoint opened as its config.json says that its weights are packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.packed.settings import ADVICE, PackedSettings
from deepseek_trt.export.packed.sources import with_packed
from deepseek_trt.export.packed.unpack import check_order
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.formats import check_tensors, is_packed_number
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.text.wording import some


def open_checkpoint(folder: Path, settings: PackedSettings | None) -> Checkpoint:
    """The checkpoint, packed weights as tensors of their own shapes; headers are read, and where config.json says that
    columns may lie in any order, that order.

    Raises CheckpointError, with the format's name, for tensors that are packed in another way.
    """
    checkpoint = Checkpoint.open(folder)
    if settings is not None:
        checkpoint = with_packed(checkpoint, settings)
        if not checkpoint.is_packed:
            _check_whole(checkpoint.tensors, settings)
    check_tensors(checkpoint.tensors)
    if settings is not None and any(scheme.ordered for scheme in settings.schemes):
        for tensor in checkpoint.tensors.values():
            check_order(tensor, _read)
    return checkpoint


def _check_whole(tensors: Mapping[str, StoredTensor], settings: PackedSettings) -> None:
    """CheckpointError where numbers are packed, and not as the settings say."""
    found = next((tensor for tensor in tensors.values() if is_packed_number(tensor)), None)
    if found is not None:
        endings = some(list(dict.fromkeys(f"*.{scheme.stored}" for scheme in settings.schemes)))
        raise CheckpointError(
            f"quantization_config says {settings.label}, whose codes are in {endings}: there is none, and tensor "
            f"{some([found.name])} is {found.dtype}; {ADVICE}"
        )


def _read(tensor: StoredTensor, at: int, length: int) -> bytes:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset + at)
        data = stream.read(length)
    if len(data) != length:
        raise CheckpointError(f"{tensor.file} ends inside {some([tensor.name])}; download it again")
    return data
