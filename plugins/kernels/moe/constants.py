"""The constants and tiles of MoeLayer's kernels, beside those that it has in common with MoeExperts. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.plugins.kernels.chips import INTERPRETER
from deepseek_trt.plugins.kernels.constants import Constants, router_constants
from deepseek_trt.plugins.kernels.launches import cdiv, dot_size, next_power_of_2
from deepseek_trt.plugins.kernels.tiles import Tile, tile

ONE_LAUNCH_TOKENS = 64  # up to here one program chooses and sorts
ONE_LAUNCH_LOGITS = 8192  # that it holds in registers at most, 16 a thread; twice as many spill
SPLIT_WIDTH = 512  # of hidden states: what one program of moe_logits reads for few tokens


@dataclass(frozen=True)
class Choice:
    """How a router chooses, as config.json has it; `biased` is V3's."""

    top_k: int
    n_group: int
    topk_group: int
    normalise: int
    biased: bool


@dataclass(frozen=True)
class LayerSizes:
    """What of a model's layer of experts is in the kernels; shared: how many experts all tokens choose."""

    experts: int
    shared: int
    hidden: int
    inter: int
    choice: Choice

    @property
    def slots(self) -> int:
        """Experts that one token goes through."""
        return self.choice.top_k + self.shared


@dataclass(frozen=True)
class RoutingBucket:
    """Constants and tiles of moe_logits and moe_choose for up to max_tokens tokens (0: any count)."""

    max_tokens: int
    logits: tuple[Constants, Tile]
    choose: tuple[Constants, Tile]


def one_launch_tokens(sizes: LayerSizes) -> int:
    """Tokens that one program chooses for and sorts."""
    padded = _choice_constants(sizes, 1)
    return min(ONE_LAUNCH_TOKENS, ONE_LAUNCH_LOGITS // (padded["BLOCK_G"] * padded["BLOCK_E"]))


def routing_buckets(sizes: LayerSizes, sm: int) -> tuple[RoutingBucket, ...]:
    """For few tokens, for more, and for any count; those before the last sort as well.

    Under the interpreter a program costs the same whatever its size, so there tiles are as large as may be.
    """
    most, splits = one_launch_tokens(sizes), cdiv(sizes.hidden, SPLIT_WIDTH)
    few = tile(4, 4, BLOCK_T=16, BLOCK_X=16, BLOCK_K=128)
    many = tile(4, 4, BLOCK_T=32, BLOCK_X=64, BLOCK_K=64)
    if sm == INTERPRETER:
        few = many = tile(BLOCK_T=dot_size(most), BLOCK_X=dot_size(sizes.experts), BLOCK_K=128)
    sorting = [row for row in ((4, 4), (16, 8)) if row[0] < most] + [(most, 16)]  # tokens, warps
    rows = [_bucket(sizes, tokens, splits, few, _choose_tile(tokens, warps, 1)) for tokens, warps in sorting]
    return (*rows, _bucket(sizes, 0, 1, many, _choose_tile(4, 4, 0)))


def _choose_tile(tokens: int, warps: int, sort: int) -> Tile:
    return tile(warps, BLOCK_T=tokens, BLOCK_B=16, SORT=sort)


def _bucket(sizes: LayerSizes, max_tokens: int, splits: int, logits: Tile, choose: Tile) -> RoutingBucket:
    constants = {"E": sizes.experts, "HIDDEN": sizes.hidden, "SPLITS": splits}
    return RoutingBucket(max_tokens, (constants, logits), (_choice_constants(sizes, splits), choose))


def _choice_constants(sizes: LayerSizes, splits: int) -> Constants:
    c = sizes.choice
    routed = router_constants(sizes.experts, c.n_group, c.topk_group, c.top_k, c.normalise)
    apart = {"SHARED": sizes.shared, "SPLITS": splits, "BIASED": int(c.biased)}
    return {**routed, **apart, "BLOCK_K": next_power_of_2(sizes.slots)}


@dataclass(frozen=True)
class LayerConstants:
    """Constants of the grouped GEMMs and the weighted sum."""

    gate_up: Constants
    down: Constants
    combine: Constants


def layer_constants(sizes: LayerSizes) -> LayerConstants:
    """As experts_constants, with the shared experts behind the others."""
    widths = {"E": sizes.experts, "HIDDEN": sizes.hidden, "INTER": sizes.inter}
    return LayerConstants(
        gate_up={**widths, "SLOTS": sizes.slots},
        down={**widths, "SHARED": sizes.shared},
        combine={"HIDDEN": sizes.hidden, "TOPK": sizes.slots},
    )
