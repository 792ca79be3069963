"""A bundle's narrow weights, read anew: codes and scales by the safetensors library, unpacked by code of its own.

What export wrote them with, and what everything else reads them with, is not used: a nibble in the wrong half, a scale
beside the wrong group or codes of another tensor differ from what is given here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from deepseek_trt.engines.sessions.torch import Weights, bundle_weights
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.validate.backends.published_weights import PublishedWeights
from deepseek_trt.validate.report.integrity import Integrity, OddWeight

# A group of 32 numbers of which the largest is 1 is at most that far from its codes, whatever the others are: half a
# step each. Numbers of another tensor, or in another order, are further than the weight is large. Of fp8 in half steps.
_MOST_OFF = {"int8": 1.1 * 32**0.5 / 254, "int4": 1.1 * 32**0.5 / 14, "fp8": 1.01}
_LEAST_OFF = 2.0**-40  # where squares of what differs are zero in float32
_BLOCK = 128  # rows and columns that share a scale in fp8


@dataclasses.dataclass(frozen=True)
class NarrowReference:
    """Call it with a parameter's name: narrow weights in float32 as the bundle has them, others of `others`.

    `formats` are those of narrow weights, by name. Where `is_published`, the checkpoint holds the same codes.
    """

    file: Path
    formats: dict[str, str]
    others: Weights
    is_published: bool = False

    @classmethod
    def of(cls, bundle: Bundle, others: Weights) -> NarrowReference:
        records = [weight.recipe for weight in bundle.manifest.weights]
        formats = {r.name: r.narrow.format for r in records if r.narrow is not None and r.narrow.part == "codes"}
        quantization = bundle.manifest.quantization
        is_published = quantization is not None and quantization.is_published
        return cls(bundle.path / WEIGHTS_FILE, formats, others, is_published)

    def __call__(self, name: str) -> Tensor:
        if name not in self.formats:
            return self.others(name)
        with safe_open(str(self.file), framework="pt") as file:
            codes, scales = file.get_tensor(name), file.get_tensor(f"{name}_scale")
        if self.formats[name] == "fp8":
            return _of_blocks(codes, scales)
        numbers: Tensor = codes.float() if self.formats[name] == "int8" else _of_nibbles(codes)
        steps: Tensor = scales.float().repeat_interleave(32, dim=-1)
        return numbers * steps

    def strays(self, published: PublishedWeights, wanted: Callable[[str], bool]) -> Iterator[tuple[str, float]]:
        """Narrow weights that are not those of the checkpoint, and how far they are off, relative to the weight."""
        for name, kind in self.formats.items():
            if not wanted(name):
                continue
            ours, whole = self(name), published.unrounded(name)
            off = float(torch.linalg.vector_norm(ours - whole)) / (float(torch.linalg.vector_norm(whole)) or 1.0)
            if self.is_published:
                is_right = torch.equal(ours, whole)
            else:
                is_right = (_half_steps(ours, whole) if kind == "fp8" else off) <= _MOST_OFF[kind]
            if not is_right:
                yield name, off or _LEAST_OFF


def reference_weights(bundle: Bundle, published: PublishedWeights | None) -> Weights | None:
    """The reference's: published ones where they are at hand, and of a narrow bundle the narrow ones read anew."""
    return NarrowReference.of(bundle, published or bundle_weights(bundle)) if bundle.manifest.is_narrow else published


def with_strays(
    integrity: Integrity,
    bundle: Bundle,
    published: PublishedWeights | None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Integrity:
    """With those of the narrow weights that are `wanted` and not made of the checkpoint's."""
    if published is None or not bundle.manifest.is_narrow or integrity.changed_weights:
        return integrity
    found = NarrowReference.of(bundle, published).strays(published, wanted)
    odd = tuple(OddWeight(name, 0, is_zero=False, off=off) for name, off in found)
    return dataclasses.replace(integrity, odd_weights=integrity.odd_weights + odd)


def _of_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """Sign, exponent and mantissa of float8 E4M3 taken apart, each number times the scale of its block."""
    table, numbers = torch.tensor([_number(code) for code in range(256)]), torch.empty(codes.shape)
    rows, columns = codes.shape[-2:]
    matrices = (t.reshape(-1, *t.shape[-2:]) for t in (numbers, codes.view(torch.uint8), scales))
    for to, of, by in zip(*matrices, strict=True):
        steps = by.repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)[:, :columns]
        torch.mul(table[of.int()], steps, out=to)
    return numbers


def _number(code: int) -> float:
    sign, exponent, mantissa = 1 - code // 128 * 2, code // 8 % 16, code % 8
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def _half_steps(ours: Tensor, whole: Tensor) -> float:
    """By how many half steps of fp8 the farthest number is off: a share of its own size, the smallest ones one of their
    block's largest.
    """
    rows, columns = whole.shape[-2:]
    worst = 0.0
    for one, other in zip(ours.reshape(-1, rows, columns), whole.reshape(-1, rows, columns), strict=True):
        padded = torch.nn.functional.pad(other.abs(), (0, -columns % _BLOCK, 0, -rows % _BLOCK))
        blocks = padded.view(padded.shape[0] // _BLOCK, _BLOCK, -1, _BLOCK)
        least = blocks.amax(dim=(1, 3), keepdim=True) * (2.0**-10 / 448)
        steps = torch.maximum(blocks * 2.0**-4, least).view(padded.shape)[:rows, :columns]
        off = (one - other).abs()
        found = float(torch.where(off == 0, off, off / steps).max())
        worst = found if math.isnan(found) else max(worst, found)
        if math.isnan(worst):
            break
    return worst


def _of_nibbles(codes: Tensor) -> Tensor:
    """Of each byte the four low bits, then the four high ones; 0 to 15 stand for -8 to 7."""
    numbers = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1])
    numbers[..., 0::2] = codes.remainder(16).float() - 8
    numbers[..., 1::2] = codes.div(16, rounding_mode="floor").float() - 8
    return numbers
