"""A bundle's narrow weights, read anew: codes and scales by the safetensors library, unpacked by code of its own.

What export wrote them with, and what everything else reads them with, is not used: a nibble in the wrong half, a scale
beside the wrong group or codes of another tensor differ from what is given here.
"""

from __future__ import annotations

import dataclasses
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
# step each. Numbers of another tensor, or in another order, are further than the weight is large.
_MOST_OFF = {"int8": 1.1 * 32**0.5 / 254, "int4": 1.1 * 32**0.5 / 14}


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
        numbers: Tensor = codes.float() if self.formats[name] == "int8" else _of_nibbles(codes)
        steps: Tensor = scales.float().repeat_interleave(32, dim=-1)
        return numbers * steps

    def strays(self, published: PublishedWeights, wanted: Callable[[str], bool]) -> Iterator[tuple[str, float]]:
        """Narrow weights that are not those of the checkpoint, and how far they are off, relative to the weight."""
        for name, kind in self.formats.items():
            if not wanted(name):
                continue
            whole = published.unrounded(name)
            off = float(torch.linalg.vector_norm(self(name) - whole)) / (float(torch.linalg.vector_norm(whole)) or 1.0)
            if not off <= (0.0 if self.is_published else _MOST_OFF[kind]):
                yield name, off


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


def _of_nibbles(codes: Tensor) -> Tensor:
    """Of each byte the four low bits, then the four high ones; 0 to 15 stand for -8 to 7."""
    numbers = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1])
    numbers[..., 0::2] = codes.remainder(16).float() - 8
    numbers[..., 1::2] = codes.div(16, rounding_mode="floor").float() - 8
    return numbers
