"""DeepSeek-V2 in plain torch, top to bottom: what every graph, kernel and engine is compared with.

Sizes: B batch, S tokens, T = B * S tokens side by side, H heads, N/R/V widths of a head's nope, rope and value parts,
L kv_lora_rank, D = L + R, E experts, K experts a token. Tokens travel as [T, hidden]; attention alone sees [B, S, ...].
Parameters carry the published names; w_uk and w_uv are the two halves of kv_b_proj, and experts are stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import rotary_embedding

from deepseek_trt.export.bundle.graph import DEFAULT_PAGE_SIZE
from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.config.rope import RopeConfig
from deepseek_trt.export.ops.activations import activate
from deepseek_trt.export.ops.torch_ops import (
    mla_decode,
    mla_decode_narrow,
    mla_prefill,
    mla_prefill_narrow,
    moe_biased_router,
    moe_experts,
    moe_router,
)

Pools = Tensor | tuple[Tensor, ...]  # of a layer: latents; or codes, and rope parts with scales
# A layer's cache before and after, paged or contiguous.
Past = TypeVar("Past")
New = TypeVar("New")
LATENT_NORM_EPS = 1e-6  # q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Module):
    """x W^T + b, uninitialised: weights come from a checkpoint."""

    def __init__(self, width_in: int, width_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width_out), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Rope(nn.Module):
    """cos and sin of every position, in float32."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies = config.rope.inverse_frequencies(config.qk_rope_head_dim)
        speeds = torch.tensor(frequencies, dtype=torch.float32)  # [R/2]
        self.register_buffer("inv_freq", speeds, persistent=False)
        self.amplitude = config.rope.rotation_amplitude
        self.dynamic = config.rope if config.rope.kind == "dynamic" else None

    def forward(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Give cos and sin [B, S, R/2] at positions [B, S] of rows that hold lengths [B, 1] tokens with the new ones.

        lengths [B, S] gives each new token its own.
        """
        frequencies = self.inv_freq if self.dynamic is None else self.stretched(lengths, self.dynamic)
        angles = positions.unsqueeze(2).float() * frequencies  # [B, S, R/2]
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.amplitude == 1.0 else (cos * self.amplitude, sin * self.amplitude)

    def stretched(self, lengths: Tensor, rope: RopeConfig) -> Tensor:
        """Dynamic NTK's frequencies [B, 1, R/2] of each row by its own length; what is cached keeps its rotation.

        Of lengths [B, S] they are [B, S, R/2].

        theta becomes theta * ratio^(R/(R-2)) for ratio = factor * length / trained - (factor - 1), at least 1.
        """
        trained, half = rope.original_max_position_embeddings, self.inv_freq.shape[0]
        ratio = lengths.float().clamp(min=trained) * (rope.factor / trained) - (rope.factor - 1.0)  # [B, 1]
        exponents = torch.arange(half, device=lengths.device).float() * (-2.0 / (2 * half - 2))  # [R/2]
        return self.inv_freq * ratio[:, :, None] ** exponents


class Attention(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434, section 2.1)."""

    narrow: NarrowCache | None = None  # how the cache holds latents; None is whole

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.rank = c.num_attention_heads, c.kv_lora_rank
        self.nope, self.rope_dim = c.qk_nope_head_dim, c.qk_rope_head_dim
        self.scale = c.softmax_scale
        width_q = self.heads * c.qk_head_dim
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, width_q)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, c.attention_bias)
            self.q_a_layernorm = RmsNorm(c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(c.q_lora_rank, width_q)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.latent_dim, c.attention_bias)
        self.kv_a_layernorm = RmsNorm(self.rank, LATENT_NORM_EPS)
        self.w_uk = nn.Parameter(torch.empty(self.heads, self.nope, self.rank), requires_grad=False)
        self.w_uv = nn.Parameter(torch.empty(self.heads, c.v_head_dim, self.rank), requires_grad=False)
        self.o_proj = Linear(self.heads * c.v_head_dim, c.hidden_size, c.attention_bias)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [T, hidden] to q_nope [B, S, H, N], rotated q_rope [B, S, H, R] and the row to cache [B, S, D]."""
        batch, seq = cos.shape[:2]
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(batch, seq, self.heads, self.nope + self.rope_dim)
        q_nope, q_rope = q[..., : self.nope], q[..., self.nope :]
        kv = self.kv_a_proj_with_mqa(x).view(batch, seq, self.rank + self.rope_dim)
        c, k_rope = kv[..., : self.rank], kv[..., self.rank :]
        q_rope = self.rotate(q_rope.flatten(2), cos, sin, self.heads).unflatten(2, (self.heads, self.rope_dim))
        k_rope = self.rotate(k_rope, cos, sin, 1)
        return q_nope, q_rope, torch.cat([self.kv_a_layernorm(c), k_rope], dim=-1)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """Rotate the adjacent pairs of each head of x [B, S, heads * R], in float32.

        Weights whose halves are rotated (rope_interleave false) are brought into this order when they are read.
        """
        return rotary_embedding(x.float(), cos, sin, interleaved=True, num_heads=heads).to(x.dtype)

    def prefill(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: Pools | None,
        page_table: Tensor,
        past_lengths: Tensor,
        sequence_lengths: Tensor,
    ) -> tuple[Tensor, Pools]:
        """Expanded: keys and values of all cached tokens are made from their latents. past None keeps no cache."""
        q_nope, q_rope, latent = self.project(x, cos, sin)
        past = scratch_pool(latent, page_table) if past is None else past
        query = torch.cat([q_nope, q_rope], dim=-1)  # [B, S, H, N + R]
        constants = page_table, past_lengths, sequence_lengths, self.w_uk, self.w_uv, self.scale
        present: Pools
        if self.narrow is None:
            attended, present = mla_prefill(query, latent, past, *constants)  # [B, S, H * V]
        else:
            kind = self.narrow.format, self.narrow.group
            attended, *pools = mla_prefill_narrow(query, latent, *past, *constants, *kind)
            present = tuple(pools)
        return self.o_proj(attended.flatten(0, 1)), present

    def decode(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: Pools,
        page_table: Tensor,
        past_lengths: Tensor,
        sequence_lengths: Tensor,
    ) -> tuple[Tensor, Pools]:
        """Absorbed: W_UK moves to the query and W_UV to the output, so that attention reads latents only."""
        q_nope, q_rope, latent = self.project(x, cos, sin)
        absorbed = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), self.w_uk)  # [H, T, L]
        query = torch.cat([absorbed.transpose(0, 1), q_rope.flatten(0, 1)], dim=-1).view(
            *cos.shape[:2], self.heads, self.rank + self.rope_dim
        )  # [B, S, H, D]
        constants = page_table, past_lengths, sequence_lengths, self.scale, self.rank
        present: Pools
        if self.narrow is None:
            attended, present = mla_decode(query, latent, past, *constants)  # [B, S, H, L]
        else:
            kind = self.narrow.format, self.narrow.group
            attended, *pools = mla_decode_narrow(query, latent, *past, *constants, *kind)
            present = tuple(pools)
        value = torch.bmm(attended.flatten(0, 1).transpose(0, 1), self.w_uv.transpose(1, 2))  # [H, T, V]
        return self.o_proj(value.transpose(0, 1).flatten(1)), present


def scratch_pool(latent: Tensor, page_table: Tensor) -> Tensor:
    """A pool [B * M + 1, page, D] for one pass. Its numbers mean nothing: nobody reads what was not written.

    It comes from the layer's own numbers, as TensorRT writes pools in place, so that no two layers can share one.
    """
    pages = page_table.shape[0] * page_table.shape[1] + 1
    return latent[:1, :1, :1].expand(pages, DEFAULT_PAGE_SIZE, latent.shape[2])


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x))"""

    def __init__(self, c: ModelConfig, width: int) -> None:
        super().__init__()
        self.activation = c.hidden_act
        self.gate_proj = Linear(c.hidden_size, width, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, width, c.mlp_bias)
        self.down_proj = Linear(width, c.hidden_size, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activate(self.activation, self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts' weights, stacked."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        E, inner, hidden = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(E, inner, hidden), requires_grad=False)
        self.up_proj = nn.Parameter(torch.empty(E, inner, hidden), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(E, hidden, inner), requires_grad=False)


class Gate(nn.Module):
    """The router's weights; the V3 family's correction bias stays float32 whatever the model's dtype."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size), requires_grad=False)
        bias = torch.empty(c.n_routed_experts, dtype=torch.float32) if c.biased_routing else None
        self.e_score_correction_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


class Moe(nn.Module):
    """Routed experts plus the shared ones (arXiv:2405.04434, section 2.2); the router works in float32."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.groups = c.num_experts_per_tok, c.routing_groups
        self.norm_topk_prob, self.scaling = int(c.norm_topk_prob), float(c.routed_scaling_factor)
        self.activation = c.hidden_act
        self.gate = Gate(c)
        self.experts = Experts(c)
        width = c.n_shared_experts * c.moe_intermediate_size
        self.shared_experts = Mlp(c, width) if width else None

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x.float(), self.gate.weight.float())  # [T, E]
        choice = (self.top_k, *self.groups, self.norm_topk_prob, self.scaling)
        bias = self.gate.e_score_correction_bias
        routed_to = moe_router(logits, *choice) if bias is None else moe_biased_router(logits, bias, *choice)
        weights, ids = routed_to  # [T, K]
        e = self.experts
        routed = moe_experts(x, weights, ids, e.gate_proj, e.up_proj, e.down_proj, self.activation)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp: nn.Module = Moe(c) if c.is_moe_layer(index) else Mlp(c, c.intermediate_size)


class Backbone(nn.Module):
    """The layers between tokens and head. Without embeddings it takes the tokens' embeddings instead of their ids."""

    def __init__(self, c: ModelConfig, embeddings: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size) if embeddings else None
        if self.embed_tokens is not None:
            self.embed_tokens.weight.requires_grad_(False)
        self.rope = Rope(c)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RmsNorm(c.hidden_size, c.rms_norm_eps)

    def blocks(self) -> list[Layer]:
        """The layers, as what they are."""
        return cast("list[Layer]", list(self.layers))

    def cache_as(self, narrow: NarrowCache | None) -> None:
        """Have all layers cache latents in this form."""
        for layer in self.blocks():
            layer.self_attn.narrow = narrow

    def by_layer(self, pools: Sequence[Tensor | None]) -> list[Any]:
        """The pools as each layer takes them: alone, or where it has two, both."""
        each = len(pools) // len(self.layers)
        return list(pools) if each == 1 else [tuple(pools[i : i + each]) for i in range(0, len(pools), each)]

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens side by side [T, hidden], of ids [B, S] or of embeddings [B, S, hidden]."""
        x: Tensor = tokens if tokens.is_floating_point() else cast(nn.Embedding, self.embed_tokens)(tokens)
        return x.flatten(0, 1)

    def through(
        self, tokens: Tensor, caches: Iterable[Past], attend: Callable[[Attention, Tensor, Past], tuple[Tensor, New]]
    ) -> tuple[Tensor, list[New]]:
        """The last layer's output [T, hidden], and each layer's cache with the new tokens, as `attend` gives it."""
        x, present = self.embed(tokens), []
        for layer, past in zip(self.blocks(), caches, strict=True):
            h, cache = attend(layer.self_attn, layer.input_layernorm(x), past)
            x = x + h
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            present.append(cache)
        return x, present

    def prefill(
        self,
        tokens: Tensor,
        sequence_lengths: Tensor,
        past_lengths: Tensor,
        page_table: Tensor,
        latents: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """The last layer's output [B, S, hidden], before the norm, and the pools with the new tokens."""
        batch, seq = tokens.shape[:2]
        positions = past_lengths.unsqueeze(1) + torch.arange(seq, device=tokens.device)  # [B, S]
        cos, sin = self.rope(positions, (past_lengths + sequence_lengths).unsqueeze(1))

        def attend(attention: Attention, x: Tensor, past: Pools | None) -> tuple[Tensor, Pools]:
            return attention.prefill(x, cos, sin, past, page_table, past_lengths, sequence_lengths)

        x, present = self.through(tokens, self.by_layer(latents), attend)
        return x.view(batch, seq, -1), side_by_side(present)

    def decode(
        self,
        tokens: Tensor,
        sequence_lengths: Tensor,
        past_lengths: Tensor,
        page_table: Tensor,
        latents: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """As prefill, for few tokens a row, each rotated as if it came alone."""
        batch, seq = tokens.shape[:2]
        positions = past_lengths.unsqueeze(1) + torch.arange(seq, device=tokens.device)  # [B, S]
        cos, sin = self.rope(positions, positions + 1)

        def attend(attention: Attention, x: Tensor, past: Pools) -> tuple[Tensor, Pools]:
            return attention.decode(x, cos, sin, past, page_table, past_lengths, sequence_lengths)

        x, present = self.through(tokens, self.by_layer(latents), attend)
        return x.view(batch, seq, -1), side_by_side(present)


class DeepseekV2(nn.Module):
    """The causal language model. Prefill and decode read and write the page pools `latents`, one [P, page, D] a layer,
    or where the cache is narrow the two of each, layer by layer.

    Each gives float32 logits and the pools with the new tokens (new tensors; the given ones are not changed).
    """

    def __init__(self, config: ModelConfig, all_logits: bool = False, embeddings: bool = True) -> None:
        super().__init__()
        self.config, self.all_logits = config, all_logits
        self.model = Backbone(config, embeddings)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    def prefill(
        self,
        input_ids: Tensor,
        sequence_lengths: Tensor,
        past_lengths: Tensor,
        page_table: Tensor,
        latents: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """input_ids int64 [B, S], right-padded. Logits [B, vocab] at each row's last real token, or [B, S, vocab]."""
        x, present = self.model.prefill(input_ids, sequence_lengths, past_lengths, page_table, latents)
        return self.logits(self.kept(x, sequence_lengths)), present

    def kept(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Those of x [B, S, hidden] that get logits after a prefill."""
        return x if self.all_logits else last_tokens(x, lengths)[:, 0]

    def decode(
        self,
        input_ids: Tensor,
        sequence_lengths: Tensor,
        past_lengths: Tensor,
        page_table: Tensor,
        latents: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """input_ids int64 [B, S], right-padded, from position past_lengths of each row on. Logits [B, S, vocab]."""
        x, present = self.model.decode(input_ids, sequence_lengths, past_lengths, page_table, latents)
        return self.logits(x.flatten(0, 1)).view(*x.shape[:2], -1), present

    def logits(self, x: Tensor) -> Tensor:
        x = self.model.norm(x)
        head = cast(nn.Embedding, self.model.embed_tokens) if self.lm_head is None else self.lm_head
        return F.linear(x, head.weight).float()


def side_by_side(present: Sequence[Pools]) -> list[Tensor]:
    """All layers' pools in one list."""
    return [pool for pools in present for pool in ([pools] if isinstance(pools, Tensor) else pools)]


def last_tokens(x: Tensor, lengths: Tensor, count: int = 1) -> Tensor:
    """The last `count` [B, count, hidden] of each row's `lengths` [B] tokens; what lies before the first repeats it."""
    at = lengths.long()[:, None] - torch.arange(count, 0, -1, device=x.device)  # [B, count]
    return x.gather(1, at.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[-1]))
