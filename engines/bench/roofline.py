"""What a decode step must read and write, from the manifest alone: the floor that memory bandwidth sets."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_trt.export.bundle.folder import Manifest, WeightRecord
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.dtypes import dtype_bytes


def decode_traffic(
    manifest: Manifest,
    cache: CacheSpec,
    lengths: Sequence[int],
    weights_dtype: str,
    experts_hit: float,
    widens: bool = False,
) -> dict[str, int]:
    """Bytes that one decode step moves: one token a row after `lengths` cached tokens each, which hit `experts_hit`
    routed experts per layer.

    weights: what every step reads whatever the tokens are. experts: of the routed experts that are hit. cache: the
    latents read and written.

    `cache` and `weights_dtype` are what the session computes in, which may be wider than the bundle; `widens` says
    that it holds narrow weights in that dtype, too. What drafts beside the step is left out. Each weight counts once
    however many rows use it, and of the embedding one row a token.
    """
    model, batch = manifest.model, len(lengths)
    routed = [w for w in manifest.main_weights if _is_routed(w)]
    each = sum(_nbytes(w, weights_dtype, widens) for w in routed) / max(model.n_routed_experts, 1)
    rest = (w for w in manifest.main_weights if not _is_routed(w) and not _is_table(w, model))
    always = sum(_nbytes(w, weights_dtype, widens) for w in rest)
    embedded = batch * model.hidden_size * dtype_bytes(weights_dtype)
    return {
        "weights": always + embedded,
        "experts": round(each * experts_hit),
        "cache": cache.bytes_per_token * model.num_hidden_layers // cache.layers * (sum(lengths) + batch),
    }


def distinct_experts(model: ModelConfig, tokens: int) -> float:
    """Routed experts of a layer that `tokens` tokens are expected to hit, were all experts equally likely:
    n (1 - (1 - k/n)^tokens), as each token picks k of n distinct ones.
    """
    n, k = model.n_routed_experts, model.num_experts_per_tok
    return n * (1 - (1 - k / n) ** tokens) if n else 0.0


def _is_routed(weight: WeightRecord) -> bool:
    return ".mlp.experts." in weight.recipe.name


def _is_table(weight: WeightRecord, model: ModelConfig) -> bool:
    """The embedding, where it is not the output matrix too."""
    return weight.recipe.name == "model.embed_tokens.weight" and not model.tie_word_embeddings


def _nbytes(weight: WeightRecord, dtype: str, widens: bool) -> int:
    """Tensors that are float32 in any model stay so, and narrow ones are read as they are stored unless it widens."""
    if weight.recipe.narrow is not None:
        return weight.recipe.numbers * dtype_bytes(dtype) if widens else weight.recipe.size * dtype_bytes(weight.dtype)
    return weight.recipe.size * dtype_bytes("float32" if weight.dtype == "float32" else dtype)
