"""NarrowCache: latents in the cache as codes of 8 bits, each group of a token's with a scale (docs/narrow.md)."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.export.config.shape import ModelShape

# Formats of the codes, with the largest number that a scale is multiplied with. Pools hold either as int8: of fp8 the
# bits of float8 E4M3FN.
TOPS = {"int8": 127.0, "fp8": 448.0}
CACHE_DTYPES = tuple(TOPS)
GROUP = 128  # numbers of a token's latent that share a scale


@dataclass(frozen=True)
class NarrowCache:
    """A layer's cache in two pools: codes int8 [P, page, rank]; and, in the dtype that graphs compute in, the rotated
    rope part and then the scales, [P, page, rope + groups].
    """

    format: str
    rank: int
    group: int

    @classmethod
    def of(cls, shape: ModelShape, cache_dtype: str) -> NarrowCache | None:
        """None for the name of no format, which keeps the cache whole. Latents that do not divide are one group."""
        if not cache_dtype:
            return None
        rank = shape.kv_lora_rank
        return cls(cache_dtype, rank, GROUP if rank % GROUP == 0 else rank)

    @property
    def groups(self) -> int:
        """Scales of one token."""
        return self.rank // self.group
