"""What narrow weights or a narrow cache cost: torch with them beside torch with whole ones, both in float32."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek_trt.export.arrays import Array
from deepseek_trt.export.bundle.manifest import Manifest
from deepseek_trt.validate.backends.probes import all_steps
from deepseek_trt.validate.findings.text_score import losses_of
from deepseek_trt.validate.findings.tokens import token_agreement
from deepseek_trt.validate.numbers.metrics import closeness
from deepseek_trt.validate.pair import Pair


@dataclass(frozen=True)
class LayerCost:
    """How far off what leaves a layer is, the mean, relative to its largest number; and the router's choices.

    same_experts is the share of these that are the same, None for a layer without a router.
    """

    layer: int
    mean_relative: float
    same_experts: float | None


@dataclass(frozen=True)
class Narrowing:
    """The cost, over `predictions` next tokens and the `scored` tokens of a text (perplexities None without one).

    KL is in nats, of whole to narrow. `same_experts` is the share of all router choices, None where there are none.
    `max_kl` (of the mean) and `max_perplexity_increase` (in percent) are what was allowed, None where nothing was said:
    then nothing is judged.
    """

    formats: tuple[str, ...]  # of the weights; none where they are whole
    weight_bytes: int
    whole_bytes: int
    cache: str  # the format of the latents in the cache, or the dtype where they are whole
    cache_bytes: int  # a token
    whole_cache_bytes: int
    predictions: int
    kl_mean: float
    kl_max: float
    top1: float
    top5: float
    same_experts: float | None
    scored: int
    perplexity: float | None
    whole_perplexity: float | None
    layers: tuple[LayerCost, ...]
    max_kl: float | None
    max_perplexity_increase: float | None

    @property
    def perplexity_increase(self) -> float | None:
        """In percent."""
        if self.perplexity is None or self.whole_perplexity is None:
            return None
        return 100 * (self.perplexity / self.whole_perplexity - 1)

    @property
    def too_much(self) -> tuple[str, ...]:
        """What is beyond what was allowed."""
        found = []
        if self.max_kl is not None and not self.kl_mean <= self.max_kl:
            found.append(f"KL {self.kl_mean:.3g} nats, --max-kl {self.max_kl:g}")
        most, increase = self.max_perplexity_increase, self.perplexity_increase
        if most is not None and increase is not None and not increase <= most:
            found.append(f"perplexity {increase:+.3g} %, --max-perplexity-increase {most:g}")
        return tuple(found)

    @property
    def sentence(self) -> str:
        """For people."""
        said = f"KL {self.kl_mean:.2e} nats, top-1 {self.top1:.2%} of {self.predictions} predictions"
        if self.same_experts is not None:
            said += f", the same experts for {self.same_experts:.2%} of choices"
        if self.perplexity_increase is not None:
            said += f", perplexity {self.perplexity:.4f} ({self.perplexity_increase:+.2f} %) over {self.scored} tokens"
        what = []
        if self.formats:
            what.append(f"{' and '.join(self.formats)}, {self.weight_bytes / self.whole_bytes:.0%} of the bytes")
        if self.cache_bytes < self.whole_cache_bytes:
            share = self.cache_bytes / self.whole_cache_bytes
            what.append(f"cache {self.cache}, {share:.0%} of the bytes a token")
        return f"{'; '.join(what)}: {said}"


@dataclass(frozen=True)
class Limits:
    """What narrowing may cost; None where that is not judged."""

    max_kl: float | None
    max_perplexity_increase: float | None


def narrowed(manifest: Manifest) -> dict[str, Any]:
    """What of a bundle is narrow, as Narrowing has it."""
    cache = manifest.cache
    return {
        "formats": manifest.narrow_formats,
        "weight_bytes": sum(w.recipe.nbytes(manifest.dtype) for w in manifest.weights),
        "whole_bytes": manifest.whole_bytes,
        "cache": cache.format,
        "cache_bytes": cache.bytes_per_token,
        "whole_cache_bytes": dataclasses.replace(cache, narrow=None).bytes_per_token,
    }


def narrowing(pair: Pair, what: Mapping[str, Any], limits: Limits) -> Narrowing:
    """The cost of a `pair` whose candidate has narrow numbers and whose reference has whole ones; `what` is of
    narrowed().
    """
    tokens, losses = token_agreement(pair), losses_of(pair, pair.script)
    assert tokens is not None
    layers = tuple(_layer(pair, layer) for layer in range(pair.config.num_hidden_layers))
    choices = [layer.same_experts for layer in layers if layer.same_experts is not None]
    return Narrowing(
        **what,
        predictions=tokens.predictions,
        kl_mean=tokens.kl_mean,
        kl_max=tokens.kl_max,
        top1=tokens.top1,
        top5=tokens.top5,
        same_experts=float(np.mean(choices)) if choices else None,
        scored=len(losses.ours) if losses else 0,
        perplexity=math.exp(float(losses.ours.mean())) if losses else None,
        whole_perplexity=math.exp(float(losses.theirs.mean())) if losses else None,
        layers=layers,
        max_kl=limits.max_kl,
        max_perplexity_increase=limits.max_perplexity_increase,
    )


def _layer(pair: Pair, layer: int) -> LayerCost:
    ours, theirs = (all_steps(probes, f"hidden.{layer + 1}") for probes in (pair.probes, pair.reference_probes))
    assert ours is not None
    assert theirs is not None
    off = closeness(ours, theirs, "float32").mean_relative
    chosen = [all_steps(probes, f"router_ids.{layer}") for probes in (pair.probes, pair.reference_probes)]
    return LayerCost(layer, off, None if chosen[0] is None or chosen[1] is None else _alike(chosen[0], chosen[1]))


def _alike(ours: Array, theirs: Array) -> float:
    """The share of the experts [T, K] that the other names for the same token."""
    return float((ours[:, :, None] == theirs[:, None, :]).any(-1).mean())
