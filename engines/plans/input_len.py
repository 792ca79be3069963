"""How many tokens of a prompt an engine takes at once, where nobody says: what keeps the chip's matrix units busy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.dtypes import dtype_bytes
from deepseek_trt.plugins.kernels.chips import ChipClass, chip_class

# A step reads every expert, and computes two flops a weight of 2 bytes for each token that an expert gets. An H100 has
# about 300 flops a byte of memory's speed, and gives of 64 experts 6 to a token: 3,200 tokens until its matrix units
# are the limit. Small chips and the A100 have at most about 200: 2,100 tokens.
BUSY: dict[ChipClass, int] = {"small": 2048, "ampere": 2048, "hopper": 4096, "blackwell": 4096}
LEAST = 512  # the CPU's chunk
ALL_LOGITS = 1024  # where an engine gives logits of every token, which are large
# GB of the smallest card that models of this size are run on, by SM version: a build for a chip need not see one.
MEMORY = {80: 40, 86: 24, 89: 24, 90: 80, 100: 180, 103: 270, 120: 32, 121: 128}
SHARE = 8  # of the memory, for what a prefill works on


def with_input_len(spec: BuildSpec, bundle: Bundle, chips: Sequence[int], memory: int | None = None) -> BuildSpec:
    """The spec with a max_input_len, where it says 0: the most that suits the least of the chips, 4,096 or 2,048.

    It is halved while max_batch_size prompts of that length would work on more than an eighth of the memory: `memory`
    bytes, or the smallest card's. Sequences are at least that long.
    """
    if spec.max_input_len:
        return spec
    length = min(BUSY[chip_class(sm)] for sm in chips)
    room = min(memory or MEMORY[sm] * 10**9 for sm in chips) // SHARE
    token = token_bytes(bundle.manifest.model, bundle.manifest.dtype)
    while length > LEAST and spec.max_batch_size * length * token > room:
        length //= 2
    length = min(length, ALL_LOGITS) if bundle.manifest.all_logits else length
    return dataclasses.replace(spec, max_input_len=max(min(length, spec.max_seq_len), 1))


def token_bytes(config: ModelConfig, dtype: str) -> int:
    """About what prefill holds of a token: residuals, queries, keys and values, a dense and a sparse layer at once."""
    heads = config.num_attention_heads
    keys = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    experts = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    numbers = 4 * config.hidden_size + 2 * heads * keys + experts + 2 * config.intermediate_size
    return numbers * dtype_bytes(dtype)
