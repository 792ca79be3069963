"""Memory that each way to run a model on a CPU takes: formulas of its sizes, held against measured peaks by a test.

They are of one sequence of CONTEXT tokens that is prefilled as the scheduler does it, CHUNK tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.export.bundle.recipes import Recipe
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.dtypes import computed_in

CONTEXT, CHUNK = 4096, 512
_MIB = 2**20
# Measured: what a process holds before it has weights, and the files (libraries) that it maps.
_ORT, _ORT_FILES = 76 * _MIB, 45 * _MIB
_TORCH, _TORCH_FILES = 250 * _MIB, 170 * _MIB
# Measured: how many arrays of that size torch holds at once in the attention of a prefill.
_SCORES, _EXPANDED = 4.5, 3.0
# Of the compiled operators: latents that are expanded at a time, and what a thread holds beside its share of weights.
_BLOCK, _THREAD, _THREADS = 256, 2**20, 2
_STREAMS = 4  # residual streams of a chunk that ONNX Runtime holds at once


@dataclass(frozen=True)
class Footprint:
    """Bytes: `anonymous` memory must exist, `file` pages are mapped from files, and dropped where memory is short."""

    anonymous: int
    file: int


def generate_mapped(config: ModelConfig, dtype: str, recipes: Sequence[Recipe], cache_dtype: str = "") -> Footprint:
    """ONNX Runtime, weights mapped from the bundle's file. `cache_dtype` is Interface's, here and below."""
    weights = sum(recipe.nbytes(dtype) for recipe in recipes)
    return Footprint(_ORT + _working(config, dtype, cache_dtype), _ORT_FILES + weights)


def generate_copied(config: ModelConfig, dtype: str, recipes: Sequence[Recipe], cache_dtype: str = "") -> Footprint:
    """ONNX Runtime, weights copied to huge pages."""
    weights = sum(recipe.nbytes(dtype) for recipe in recipes)
    return Footprint(_ORT + weights + _working(config, dtype, cache_dtype), _ORT_FILES)


def generate_by_reference(
    config: ModelConfig,
    dtype: str,
    recipes: Sequence[Recipe],
    assembled: Sequence[Recipe],
    cache_dtype: str = "",
) -> Footprint:
    """ONNX Runtime, the `assembled` weights in memory and the others mapped from the checkpoint."""
    made, every = (sum(recipe.nbytes(dtype) for recipe in some) for some in (assembled, recipes))
    return Footprint(_ORT + made + _working(config, dtype, cache_dtype), _ORT_FILES + every - made)


def generate_torch(config: ModelConfig, dtype: str, recipes: Sequence[Recipe], cache_dtype: str = "") -> Footprint:
    """Eager torch in float32; the largest tensor is there in both dtypes while it is converted."""
    weights = 4 * sum(recipe.numbers for recipe in recipes)
    read = [recipe.nbytes(dtype) for recipe in recipes if dtype != "float32" or recipe.narrow is not None]
    converted = max(read, default=0)
    working = max(converted, _activations(config)) + _cache(config, "float32", cache_dtype)
    return Footprint(_TORCH + weights + working, _TORCH_FILES)


def _working(config: ModelConfig, dtype: str, cache_dtype: str) -> int:
    """What steps take beside the weights as they are stored: the cache, and what the compiled operators hand on."""
    return _cache(config, computed_in(dtype), cache_dtype) + _scratch(config)


def _scratch(config: ModelConfig) -> int:
    """Of a chunk in the larger half of a layer: numbers of each token, and a block of expanded latents.

    It grows with the tokens of a chunk and not with those that are cached.
    """
    c, heads = config, config.num_attention_heads
    latent, head = c.kv_lora_rank + c.qk_rope_head_dim, c.qk_nope_head_dim + c.v_head_dim
    attention = heads * (head + c.qk_rope_head_dim + c.v_head_dim) + latent + (c.q_lora_rank or 0)
    experts = (c.num_experts_per_tok + c.n_shared_experts) * c.moe_intermediate_size if c.n_routed_experts else 0
    tokens = _STREAMS * c.hidden_size + max(attention, experts, c.intermediate_size)
    return 4 * (CHUNK * tokens + _BLOCK * (heads * head + 4 * latent)) + _THREADS * _THREAD


def _cache(config: ModelConfig, dtype: str, cache_dtype: str) -> int:
    cache = CacheSpec.of(config, dtype, cache_dtype=cache_dtype)
    return cache.pages_for(CONTEXT) * cache.page_size * cache.bytes_per_token


def _activations(config: ModelConfig) -> int:
    """Of a chunk's attention to all cached tokens, in float32: scores, and keys and values expanded from latents."""
    scores = CHUNK * CONTEXT * config.num_attention_heads
    expanded = CONTEXT * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return int(4 * (_SCORES * scores + _EXPANDED * expanded))
