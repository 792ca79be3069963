"""Packed weights of a checkpoint in float32, unpacked by code of its own: nothing of export/packed is used.

A nibble in the wrong place, a zero point of another group or rows in another order differ from what is given here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight neighbours lies
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class PublishedPacked:
    """What config.json's quantization_config says, and the tensors that there are."""

    settings: dict[str, Any]
    names: Collection[str]

    @classmethod
    def of(cls, root: Path, names: Collection[str]) -> PublishedPacked:
        raw = json.loads((root / "config.json").read_text(encoding="utf-8"))
        return cls(raw.get("quantization_config") or {}, names)

    def has(self, weight: str) -> bool:
        """Whether the weight of this name is packed."""
        module = weight.removesuffix(".weight")
        whole = weight in self.names and f"{module}.weight_scale" not in self.names
        return not whole and any(f"{module}.{codes}" in self.names for codes in ("qweight", "weight_packed", "weight"))

    def numbers(self, weight: str, read: Read) -> Tensor:
        """(code - zero point) * scale, [N, K]."""
        module = weight.removesuffix(".weight")
        if f"{module}.qweight" in self.names:
            is_awq = self.settings["quant_method"] == "awq"
            return self._awq(module, read) if is_awq else self._gptq(module, read)
        return self._compressed(module, read)

    def _gptq(self, module: str, read: Read) -> Tensor:
        bits, scales = self.settings["bits"], read(f"{module}.scales").float()  # [G, N]
        codes = _along(read(f"{module}.qweight").T, bits)  # [N, K]
        form = self.settings.get("checkpoint_format") or self.settings.get("format")
        zeros = _along(read(f"{module}.qzeros"), bits)[:, : scales.shape[1]] + (form != "gptq_v2")
        return _widened(codes, zeros.T, scales.T, self._group(codes))

    def _awq(self, module: str, read: Read) -> Tensor:
        codes, zeros = (_along(read(f"{module}.{part}"), 4) for part in ("qweight", "qzeros"))
        codes, zeros = (t.reshape(len(t), -1, 8)[:, :, _AWQ_ORDER].flatten(1) for t in (codes, zeros))
        return _widened(codes.T, zeros.T, read(f"{module}.scales").float().T, self._group(codes.T))

    def _compressed(self, module: str, read: Read) -> Tensor:
        scales = read(f"{module}.weight_scale").float()  # [N, G]
        name = f"{module}.weight_zero_point"
        zeros = read(name) if name in self.names else torch.zeros(scales.shape, dtype=torch.int32)
        if f"{module}.weight" in self.names:
            codes = read(f"{module}.weight").int()
            return _widened(codes, zeros.int(), scales, self._group_of(codes.shape[1], scales.shape[1]))
        words, columns = read(f"{module}.weight_packed"), int(read(f"{module}.weight_shape")[1])
        bits = 32 * words.shape[1] // columns
        codes = _along(words, bits)[:, :columns]
        middle = 1 << (bits - 1)
        if name in self.names:
            zeros = _along(zeros.T, bits)[:, : len(codes)].T - middle
        return _widened(codes - middle, zeros, scales, self._group_of(columns, scales.shape[1]))

    def _group(self, codes: Tensor) -> int:
        found = self.settings.get("group_size") or self.settings.get("q_group_size") or 128
        return codes.shape[1] if found == -1 else int(found)

    def _group_of(self, columns: int, groups: int) -> int:
        """The size of any group of modules that makes so many groups of a row."""
        sizes = [group["weights"].get("group_size") for group in self.settings["config_groups"].values()]
        fitting = {s for s in sizes if s and s > 0 and -(-columns // s) == groups}
        return columns if groups == 1 else max(fitting)


def _along(words: Tensor, bits: int) -> Tensor:
    """[R, W] integers as [R, W * 32 / bits] codes, the lowest bits first."""
    unsigned = words.long() % 2**32
    return torch.stack([unsigned // 2**at % 2**bits for at in range(0, 32, bits)], dim=-1).flatten(1)


def _widened(codes: Tensor, zeros: Tensor, scales: Tensor, group: int) -> Tensor:
    columns = codes.shape[1]
    at = torch.arange(columns) // group  # the group of each column
    numbers: Tensor = (codes - zeros[:, at]).float() * scales[:, at]
    return numbers.contiguous()
