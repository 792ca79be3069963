"""DeepSeek-V2 and V3 in numpy float64, from the papers and the published code's documented behaviour.

Shares no code with the package: it reads config.json's own keys and the published tensor names, has no cache, no pages,
no stacked experts and no absorbed form, and routes token by token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]

V2_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_group": None,
    "topk_group": None,
    "tie_word_embeddings": False,
}


def logits(raw: dict[str, Any], weights: Weights, ids: Array, lengths: Array | None = None) -> Array:
    """Logits [S, vocab] of one sequence. lengths[s]: tokens in the sequence after the call that brought token s."""
    tied = {**V2_DEFAULTS, **raw}["tie_word_embeddings"]
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return hidden_states(raw, weights, ids, lengths)[-1] @ head.T


def hidden_states(raw: dict[str, Any], weights: Weights, ids: Array, lengths: Array | None = None) -> list[Array]:
    """Embeddings, then the output of every layer, the last one normed: [S, hidden] each."""
    c = {**V2_DEFAULTS, **raw}
    lengths = np.full(len(ids), len(ids)) if lengths is None else lengths
    x = weights["model.embed_tokens.weight"][ids]
    found = [x]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{at}.input_layernorm.weight"], c["rms_norm_eps"])
        x = x + attention(c, weights, f"{at}.self_attn", normed, lengths)
        normed = rms_norm(x, weights[f"{at}.post_attention_layernorm.weight"], c["rms_norm_eps"])
        x = x + feed_forward(c, weights, f"{at}.mlp", normed, layer)
        found.append(x)
    return [*found[:-1], rms_norm(x, weights["model.norm.weight"], c["rms_norm_eps"])]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def linear(weights: Weights, at: str, x: Array) -> Array:
    y = x @ weights[f"{at}.weight"].T
    return y + weights[f"{at}.bias"] if f"{at}.bias" in weights else y


# Attention


def attention(c: dict[str, Any], weights: Weights, at: str, x: Array, lengths: Array) -> Array:
    heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    if f"{at}.q_proj.weight" in weights:
        q = linear(weights, f"{at}.q_proj", x)
    else:
        q_a = rms_norm(linear(weights, f"{at}.q_a_proj", x), weights[f"{at}.q_a_layernorm.weight"], 1e-6)
        q = linear(weights, f"{at}.q_b_proj", q_a)
    q = q.reshape(len(x), heads, nope + rope)
    kv = linear(weights, f"{at}.kv_a_proj_with_mqa", x)
    rank = c["kv_lora_rank"]
    latent = rms_norm(kv[:, :rank], weights[f"{at}.kv_a_layernorm.weight"], 1e-6)
    expanded = linear(weights, f"{at}.kv_b_proj", latent).reshape(len(x), heads, nope + c["v_head_dim"])
    angles = rope_angles(c, lengths)  # [S, rope / 2]
    amplitude, scale = amplitudes(c)
    pairs = in_pairs if c.get("rope_interleave", True) is False else lambda x: x
    k_rope = rotate(pairs(kv[:, None, rank:]), angles, amplitude)[:, 0]
    q_rope = rotate(pairs(q[..., nope:]), angles, amplitude)
    scale *= (nope + rope) ** -0.5
    out = np.zeros((len(x), heads, c["v_head_dim"]))
    for head in range(heads):
        keys = np.concatenate([expanded[:, head, :nope], k_rope], axis=1)
        queries = np.concatenate([q[:, head, :nope], q_rope[:, head]], axis=1)
        for s in range(len(x)):
            scores = keys[: s + 1] @ queries[s] * scale
            share = np.exp(scores - scores.max())
            out[s, head] = share / share.sum() @ expanded[: s + 1, head, nope:]
    return linear(weights, f"{at}.o_proj", out.reshape(len(x), -1))


def in_pairs(x: Array) -> Array:
    """x_i and x_(i + rope/2), which rotate together, side by side; scores do not depend on the order."""
    first, second = np.split(x, 2, axis=-1)
    return np.stack([first, second], axis=-1).reshape(x.shape)


def rotate(x: Array, angles: Array, amplitude: float) -> Array:
    """Adjacent pairs of x [S, heads, rope], as complex numbers."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (np.exp(1j * angles) * amplitude)[:, None, :]
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
    return out


def scaling_of(c: dict[str, Any]) -> dict[str, Any]:
    settings = dict(c.get("rope_scaling") or c.get("rope_parameters") or {})
    settings["kind"] = settings.get("rope_type", settings.get("type", "default"))
    return settings


def rope_angles(c: dict[str, Any], lengths: Array) -> Array:
    s, dim = scaling_of(c), c["qk_rope_head_dim"]
    theta = s.get("rope_theta", c["rope_theta"])
    positions = np.arange(len(lengths), dtype=np.float64)[:, None]
    pairs = np.arange(0, dim, 2) / dim
    if s["kind"] == "linear":
        return positions / s["factor"] * theta**-pairs
    if s["kind"] == "dynamic":
        longest = c["max_position_embeddings"]
        seen = np.maximum(lengths, longest)[:, None]
        stretched = theta * (s["factor"] * seen / longest - (s["factor"] - 1)) ** (dim / (dim - 2))
        return positions * stretched**-pairs
    if s["kind"] == "yarn":
        return positions * yarn_frequencies(s, theta, dim)
    return positions * theta**-pairs


def yarn_frequencies(s: dict[str, Any], theta: float, dim: int) -> Array:
    original = s.get("original_max_position_embeddings", 4096)

    def dim_at(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_at(s.get("beta_fast", 32))), 0)
    high = min(math.ceil(dim_at(s.get("beta_slow", 1))), dim - 1)
    if low == high:
        high += 0.001
    stretched_share = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    plain = theta ** -(np.arange(0, dim, 2) / dim)
    return plain / s["factor"] * stretched_share + plain * (1 - stretched_share)


def amplitudes(c: dict[str, Any]) -> tuple[float, float]:
    """Of cos and sin, and of the softmax scale."""
    s = scaling_of(c)
    if s["kind"] == "default":
        return 1.0, 1.0
    m = lambda x: 0.1 * x * math.log(s["factor"]) + 1 if s["factor"] > 1 else 1.0  # noqa: E731
    mscale, all_dim = s.get("mscale", 1), s.get("mscale_all_dim", 0)
    turning = s.get("attention_factor", m(mscale) / m(all_dim)) if s["kind"] == "yarn" else 1.0
    return turning, m(all_dim) ** 2 if all_dim else 1.0


# Feed-forward


def feed_forward(c: dict[str, Any], weights: Weights, at: str, x: Array, layer: int) -> Array:
    sparse = c["n_routed_experts"] and c["num_experts_per_tok"]
    if not (sparse and layer >= c["first_k_dense_replace"] and layer % c["moe_layer_freq"] == 0):
        return mlp(c, weights, at, x)
    out = mlp(c, weights, f"{at}.shared_experts", x) if c["n_shared_experts"] else np.zeros_like(x)
    route = route_v3 if c["topk_method"] == "noaux_tc" else route_v2
    for s, token in enumerate(x):
        for expert, share in route(c, weights, at, token):
            out[s] += share * mlp(c, weights, f"{at}.experts.{expert}", token)
    return out


def mlp(c: dict[str, Any], weights: Weights, at: str, x: Array) -> Array:
    gate = activation(c["hidden_act"], linear(weights, f"{at}.gate_proj", x))
    return linear(weights, f"{at}.down_proj", gate * linear(weights, f"{at}.up_proj", x))


def activation(name: str, x: Array) -> Array:
    if name in ("silu", "swish"):
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    assert name in ("gelu_new", "gelu_pytorch_tanh")
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def route_v2(c: dict[str, Any], weights: Weights, at: str, token: Array) -> list[tuple[int, float]]:
    scores = weights[f"{at}.gate.weight"] @ token
    scores = np.exp(scores - scores.max())
    scores /= scores.sum()
    allowed = scores
    if c["topk_method"] == "group_limited_greedy":
        groups = scores.reshape(c["n_group"], -1)
        kept = best(groups.max(1), c["topk_group"])
        allowed = np.where(np.isin(np.arange(c["n_group"]), kept)[:, None], groups, 0.0).ravel()
    chosen = best(allowed, c["num_experts_per_tok"])
    shares = allowed[chosen]
    if c["norm_topk_prob"] and len(chosen) > 1:
        return list(zip(chosen, shares / (shares.sum() + 1e-20), strict=True))
    return list(zip(chosen, shares * c["routed_scaling_factor"], strict=True))


def route_v3(c: dict[str, Any], weights: Weights, at: str, token: Array) -> list[tuple[int, float]]:
    scores = 1 / (1 + np.exp(-(weights[f"{at}.gate.weight"] @ token)))
    biased = scores + weights[f"{at}.gate.e_score_correction_bias"]
    groups = biased.reshape(c["n_group"] or 1, -1)
    kept = best(np.sort(groups, axis=1)[:, -2:].sum(1), c["topk_group"] or 1)
    biased = np.where(np.isin(np.arange(len(groups)), kept)[:, None], groups, -np.inf).ravel()
    chosen = best(biased, c["num_experts_per_tok"])
    shares = scores[chosen]
    if c["norm_topk_prob"] and len(chosen) > 1:
        shares = shares / (shares.sum() + 1e-20)
    return list(zip(chosen, shares * c["routed_scaling_factor"], strict=True))


def best(scores: Array, count: int) -> list[int]:
    """The indices of the highest scores; of equal ones the lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
