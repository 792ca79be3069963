"""The constants each kernel takes from the model's dimensions, tiles apart. No Triton here.

BLOCK_* here is a dimension padded to what Triton can hold: a power of two, at least 16 where it enters tl.dot.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.plugins.kernels.launches import (
    DECODE_MAX_PROGRAMS,
    DECODE_MIN_TILES,
    DECODE_NEW_TOKENS,
    DECODE_ROWS,
    DISPATCH_CHUNK,
    SAMPLING_TOPS,
    dot_size,
    next_power_of_2,
)

Constants = dict[str, int]


def write_constants(latent_dim: int, page: int) -> Constants:
    """Constants of latent_write, for pages of `page` tokens."""
    return {"D": latent_dim, "PAGE": page, "BLOCK_D": next_power_of_2(latent_dim)}


@dataclass(frozen=True)
class DecodeConstants:
    """Constants of mla_decode_split and mla_decode_combine."""

    split: Constants
    combine: Constants


def decode_constants(heads: int, rank: int, rope: int, page: int) -> DecodeConstants:
    """For `heads` query heads over latents of `rank` and rope keys of `rope`, in pages of `page` tokens."""
    shared = {"H": heads, "LAT": rank, "BLOCK_B": DECODE_ROWS, "MIN_TILES": DECODE_MIN_TILES}
    padded = {"BLOCK_L": dot_size(rank), "BLOCK_R": dot_size(rope), "BLOCK_S": DECODE_NEW_TOKENS}
    return DecodeConstants(
        split={**shared, **padded, "ROPE": rope, "PAGE": page},
        combine={**shared, "MAX_PIECES": next_power_of_2(DECODE_MAX_PROGRAMS)},
    )


@dataclass(frozen=True)
class PrefillConstants:
    """Constants of mla_prefill_expand and mla_prefill_attend."""

    expand: Constants
    attend: Constants


def prefill_constants(heads: int, rank: int, rope: int, nope: int, value: int, page: int) -> PrefillConstants:
    """For `heads` heads with keys of `nope` + `rope` and values of `value`, expanded from latents of `rank`.

    The latents lie in pages of `page` tokens.
    """
    shared = {"ROPE": rope, "NOPE": nope, "VALUE": value}
    padded = {"BLOCK_NOPE": dot_size(nope), "BLOCK_R": dot_size(rope), "BLOCK_V": dot_size(value)}
    return PrefillConstants(
        expand={**shared, **padded, "LAT": rank, "PAGE": page}, attend={**shared, **padded, "H": heads}
    )


def router_constants(experts: int, groups: int, topk_groups: int, top_k: int, normalise: int) -> Constants:
    """Constants of moe_router and moe_biased_router; without group limits all experts are one group."""
    limited = topk_groups < groups
    used = groups if limited else 1
    return {
        "E": experts,
        "GROUPS": used,
        "TOPK_GROUPS": topk_groups if limited else 1,
        "TOPK": top_k,
        "NORMALISE": int(bool(normalise) and top_k > 1),
        "BLOCK_G": next_power_of_2(used),
        "BLOCK_E": next_power_of_2(experts // used),
        "BLOCK_K": next_power_of_2(top_k),
    }


@dataclass(frozen=True)
class DispatchConstants:
    """Constants of the three kernels of the counting sort."""

    count: Constants
    offsets: Constants
    scatter: Constants


def dispatch_constants(experts: int) -> DispatchConstants:
    """For ids below `experts`."""
    padded = {"E": experts, "BLOCK_E": next_power_of_2(experts)}
    return DispatchConstants(
        count={**padded, "CHUNK": DISPATCH_CHUNK}, offsets=padded, scatter={"E": experts, "CHUNK": DISPATCH_CHUNK}
    )


@dataclass(frozen=True)
class ExpertsConstants:
    """Constants of the grouped GEMMs and the weighted sum."""

    gate_up: Constants
    down: Constants
    combine: Constants


def experts_constants(hidden: int, inter: int, top_k: int) -> ExpertsConstants:
    """For experts of width `inter` on tokens of width `hidden`, top_k of them a token."""
    return ExpertsConstants(
        gate_up={"HIDDEN": hidden, "INTER": inter, "TOPK": top_k},
        down={"HIDDEN": hidden, "INTER": inter},
        combine={"HIDDEN": hidden, "TOPK": top_k},
    )


@dataclass(frozen=True)
class SamplingConstants:
    """Constants of sample_adjust and sample_pick."""

    adjust: Constants
    pick: Constants


def sampling_constants(vocab: int) -> SamplingConstants:
    """For logits of `vocab` tokens."""
    return SamplingConstants(adjust={"VOCAB": vocab}, pick={"VOCAB": vocab, "MOST": SAMPLING_TOPS})
