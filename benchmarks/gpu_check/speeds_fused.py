"""Speeds of what stands in engines only, the MoE layer as a whole, and of sampling, which follows a graph."""

from __future__ import annotations

import functools
import statistics
from typing import TYPE_CHECKING, Any

import torch

from gpu_check import cases
from gpu_check.items import Gpu, NotRunError
from gpu_check.launching import Launch
from gpu_check.models import Sizes
from gpu_check.speeds import Named, Points, Work, recorded
from gpu_check.timing import copies_for

if TYPE_CHECKING:
    from torch import Tensor

LAYER_TOKENS = (1, 8, 32, 128)
BATCHES = (1, 8, 32, 128)  # of sampling
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "top-k 50, top-p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9}}


def layer_works(place: cases.Place, sizes: Sizes, points: Points, journal: list[Launch], gpu: Gpu) -> Named:
    """Router, routed and shared experts of one layer: all kernels."""
    product, shared, width = 3 * sizes.hidden * sizes.inter, sizes.shared * sizes.inter, place.dtype.itemsize
    always = (sizes.experts * sizes.hidden + 3 * sizes.hidden * shared) * width
    needed = sizes.experts * product * width * 1.1 + always + 2**30
    held: list[tuple[Tensor, ...]] = []

    def make(tokens: int) -> Work:
        if not held:
            if gpu.free_bytes() < needed:
                raise NotRunError(f"{needed / 1e9:.1f} GB do not fit")
            held.append((*_router(place, sizes), *cases.expert_stacks(place, sizes), *_shared(place, sizes, shared)))
        hit_bytes = min(sizes.experts, tokens * sizes.top_k) * product * width
        copies = copies_for(hit_bytes, gpu.cache_bytes(), gpu.free_bytes() / 4)
        inputs = [place.random(tokens, sizes.hidden) for _ in range(copies)]
        calls = [_layer_call(sizes, hidden, held[0], journal) for hidden in inputs]
        hit = statistics.mean(_experts_hit(hidden, held[0][0], sizes) for hidden in inputs)
        flops = 2.0 * tokens * (sizes.top_k * product + sizes.experts * sizes.hidden + 3 * sizes.hidden * shared)
        return Work(hit * product * width + always + 2 * tokens * sizes.hidden * width, flops, calls)

    for tokens in LAYER_TOKENS if points.full else LAYER_TOKENS[:1]:
        yield f"MoE layer, {tokens} tokens", functools.partial(make, tokens)


def _router(place: cases.Place, sizes: Sizes) -> tuple[Tensor, Tensor]:
    weight = place.random(sizes.experts, sizes.hidden, scale=sizes.hidden**-0.5)
    return weight, place.random(sizes.experts, scale=0.1, dtype=torch.float32)


def _shared(place: cases.Place, sizes: Sizes, width: int) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = (place.random(width, sizes.hidden, scale=sizes.hidden**-0.5) for _ in range(2))
    return gate, up, place.random(sizes.hidden, width, scale=width**-0.5)


def _layer_call(sizes: Sizes, hidden: Tensor, weights: tuple[Tensor, ...], journal: list[Launch]) -> list[Launch]:
    from deepseek_trt.plugins.kernels import FUSED_KERNEL_OPS

    rest = (sizes.top_k, sizes.groups, sizes.topk_groups, int(sizes.normalise), sizes.scale, int(sizes.biased))
    return recorded(journal, lambda: FUSED_KERNEL_OPS["MoeLayer"](hidden, *weights, *rest))


def _experts_hit(hidden: Tensor, router: Tensor, sizes: Sizes) -> int:
    """About: by the logits alone, groups and bias aside, which only move the choice among as many."""
    return len((hidden.float() @ router.float().T).topk(sizes.top_k).indices.unique())


def sampling_works(place: cases.Place, sizes: Sizes, points: Points, journal: list[Launch], gpu: Gpu) -> Named:
    """A token for each row of logits, by the kernels alone: what is packed for them and read back is not timed."""
    from deepseek_trt.engines.generation.params import SamplingParams
    from deepseek_trt.engines.generation.sampling import Sampler
    from deepseek_trt.plugins.kernels.sampling import run as kernels

    def make(batch: int, options: dict[str, Any]) -> Work:
        nbytes = batch * sizes.vocab * 4
        copies = copies_for(nbytes, gpu.cache_bytes(), gpu.free_bytes() / 4)
        calls = []
        for _ in range(copies):
            rows = [Sampler(SamplingParams(8, seed=row, **options), [5, 9], [1], room=8).row for row in range(batch)]
            logits = place.random(batch, sizes.vocab, scale=4.0, dtype=torch.float32)
            calls.append(recorded(journal, functools.partial(kernels.run, rows, logits)))
        return Work(nbytes, 0.0, calls)

    for batch in BATCHES if points.full else BATCHES[:1]:
        for way, options in WAYS.items():
            what = f"sampling of {sizes.vocab:,} logits, {way}, batch {batch}"
            yield what, functools.partial(make, batch, options)
