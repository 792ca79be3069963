"""PrefillCost: counted by shapes of products, and by pairs one at a time; what docs/performance.md says of a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_trt.engines.generation.chunking.cost import PrefillCost
from deepseek_trt.export.config.model_config import ModelConfig

LITE = {"q_lora_rank": None, "hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16}
LITE |= {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1}
V2_LITE = ModelConfig(**LITE, num_hidden_layers=27, max_position_embeddings=163840)


def weights_met(config):
    """Numbers of every weight that one token meets, [out, in] by [out, in]."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    shapes = []
    for layer in range(config.num_hidden_layers):
        shapes += [(rank, hidden), (query, rank)] if rank else [(query, hidden)]
        shapes += [(config.latent_dim, hidden), (hidden, heads * config.v_head_dim)]
        if config.is_moe_layer(layer):
            shapes.append((config.n_routed_experts, hidden))
            width = config.moe_intermediate_size
            experts = config.num_experts_per_tok + config.n_shared_experts
        else:
            width, experts = config.intermediate_size, 1
        shapes += [(width, hidden), (width, hidden), (hidden, width)] * experts
    return sum(rows * columns for rows, columns in shapes)


@pytest.mark.parametrize("changed", [{}, {"q_lora_rank": 1536}, {"n_routed_experts": 0}, {"moe_layer_freq": 2}])
def test_a_token_meets_every_weight_once(changed):
    config = ModelConfig(**{**LITE, **changed}, num_hidden_layers=27)
    assert PrefillCost.of_model(config).token == weights_met(config)


@given(st.integers(1, 40), st.integers(0, 60))
def test_attention_is_counted_pair_by_pair(tokens, past):
    cost = PrefillCost(token=7, projection=50, expanded=3, absorbed=11)
    keys = [past + own + 1 for own in range(tokens)]  # of each new token: all before it, and itself
    expanded = 50 * (past + tokens) + sum(3 * count for count in keys)
    absorbed = 50 * tokens + sum(11 * count for count in keys)
    assert cost.attention(tokens, past) == min(expanded, absorbed)
    assert cost.of(tokens, past) == 7 * tokens + min(expanded, absorbed)


def test_more_tokens_and_more_before_them_cost_more():
    cost = PrefillCost.of_model(V2_LITE)
    for past in (0, 63, 4096, 32768):
        costs = [cost.of(tokens, past) for tokens in range(1, 700)]
        assert costs == sorted(set(costs))
        assert cost.of(512, past + 1) > cost.of(512, past)


def test_as_docs_performance_counts_the_model_there():
    """178 GFLOP for 512 tokens, 10.7 TFLOP for 8,192 in chunks of 512 and 7.9 in chunks of 2,048."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "q_lora_rank": None, "n_routed_experts": 32}
    sizes |= {"moe_intermediate_size": 256, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
    cost = PrefillCost.of_model(ModelConfig(**sizes, intermediate_size=1536, num_hidden_layers=27))

    def tera(length, chunk):
        return 2e-12 * sum(cost.of(chunk, past) for past in range(0, length, chunk))

    assert tera(512, 512) == pytest.approx(0.178, rel=0.02)
    assert tera(8192, 512) == pytest.approx(10.7, rel=0.01)
    assert tera(8192, 2048) == pytest.approx(7.9, rel=0.01)
