"""The demo's checkpoint with the numbers of a bundle's narrow weights in the place of its own, for transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_check.narrow_reference import numbers_of

if TYPE_CHECKING:
    from torch import Tensor

# Of all of a weight, relative to it: int4 is off by a tenth, and other rows or another tensor by 1.4.
_NEAR = 0.3


def write_checkpoint(source: Path, bundle: Path, folder: Path) -> None:
    """Write it in `folder`, in float32. ValueError where a narrow weight is not near one of the same name."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    found = 0
    for name, numbers in _narrow(load_file(bundle / "weights.safetensors")):
        own = tensors.get(name)
        if own is None or own.shape != numbers.shape or (numbers - own).norm() > _NEAR * own.norm():
            raise ValueError(f"{bundle}: {name} is not the checkpoint's")
        tensors[name] = numbers.to(torch.float32).contiguous()
        found += 1
    if not found:
        raise ValueError(f"{bundle} has no narrow weights")
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _narrow(parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names as a checkpoint spells them, and numbers [N, K] in float64, an expert at a time."""
    import torch

    formats = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}
    for name, codes in parts.items():
        scales = parts.get(f"{name}_scale")
        if scales is None:
            continue
        numbers = numbers_of(formats[codes.dtype], codes.view(torch.uint8), scales)
        if name.endswith(".weight"):
            yield name, numbers
            continue
        experts, projection = name.rsplit(".", 1)
        for expert, own in enumerate(numbers):
            yield f"{experts}.{expert}.{projection}.weight", own
