"""PrefillCost: what a chunk of a prompt costs, by count of operations: the later in its prompt, the more a token."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.export.config.model_config import ModelConfig


@dataclass(frozen=True)
class PrefillCost:
    """Multiply-adds of a prefill, all layers together; the head is left out, as only a chunk's last token meets it.

    token: of one token with the weights that it meets, routed experts counted as they are chosen. projection: of one
    cached token's latent with W_UK and W_UV of all heads, and as many of one new token where queries are absorbed
    instead. expanded, absorbed: of one query with one key, itself among them, and with that key's value, in all heads.
    """

    token: int
    projection: int
    expanded: int
    absorbed: int

    @classmethod
    def of_model(cls, config: ModelConfig) -> PrefillCost:
        """Counted from a model's sizes."""
        hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
        nope, rope, value, rank = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.kv_lora_rank,
        )
        query = heads * (nope + rope)
        queries = config.q_lora_rank * (hidden + query) if config.q_lora_rank else hidden * query
        around = queries + hidden * (rank + rope) + heads * value * hidden
        return cls(
            token=layers * around + sum(_feed_forward(config, layer) for layer in range(layers)),
            projection=layers * heads * rank * (nope + value),
            expanded=layers * heads * (nope + rope + value),
            absorbed=layers * heads * (2 * rank + rope),
        )

    def attention(self, tokens: int, past: int) -> int:
        """Of `tokens` new tokens after `past` cached ones: the cheaper form, as the compiled CPU operators take it."""
        pairs = tokens * (2 * past + tokens + 1) // 2
        expanded = (past + tokens) * self.projection + pairs * self.expanded
        return min(expanded, tokens * self.projection + pairs * self.absorbed)

    def of(self, tokens: int, past: int) -> int:
        """Of a chunk of `tokens` tokens after `past` cached ones."""
        return tokens * self.token + self.attention(tokens, past)


def _feed_forward(config: ModelConfig, layer: int) -> int:
    """Of one token in a layer's MLP, or in its router and the experts that it takes."""
    if not config.is_moe_layer(layer):
        return 3 * config.hidden_size * config.intermediate_size
    experts = config.num_experts_per_tok + config.n_shared_experts
    return config.hidden_size * (config.n_routed_experts + 3 * experts * config.moe_intermediate_size)
