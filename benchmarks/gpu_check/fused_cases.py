"""Cases of what stands in engines only, MlaQuery, MlaValue and MoeLayer, and of sampling, which no graph holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpu_check import reference
from gpu_check.cases import Place, error_of
from gpu_check.models import Sizes

if TYPE_CHECKING:
    from torch import Tensor

# Scores nearer than this to what is not chosen may be chosen otherwise: float32 sums of some thousand products.
_TIE = 1e-4
EPS = 1e-6


def query(ops: Any, place: Place, sizes: Sizes, tokens: int) -> float:
    """One row of `tokens` tokens, rotated by angles of their own."""
    half, heads = sizes.rope // 2, sizes.heads
    q = place.random(tokens, heads * (sizes.nope + sizes.rope))
    kv = place.random(tokens, sizes.width)
    angles = torch.rand(1, tokens, half, device=place.device) * 6.28
    norm, w_uk = place.random(sizes.rank), place.random(heads, sizes.nope, sizes.rank, scale=sizes.nope**-0.5)
    made, latent = ops["MlaQuery"](q, kv, angles.cos(), angles.sin(), norm, w_uk, EPS)
    turned = reference.rotated(q.view(tokens, heads, -1)[..., sizes.nope :], angles[0, :, None])
    absorbed = torch.einsum("thn,hnl->thl", q.view(tokens, heads, -1)[..., : sizes.nope].double(), w_uk.double())
    cached = reference.rms_norm(kv[:, : sizes.rank], norm, EPS)
    return max(
        error_of(made[0], torch.cat((absorbed, turned), -1), place.dtype),
        error_of(latent[0], torch.cat((cached, reference.rotated(kv[:, sizes.rank :], angles[0])), -1), place.dtype),
    )


def value(ops: Any, place: Place, sizes: Sizes, tokens: int) -> float:
    """One row of `tokens` tokens."""
    attended = place.random(1, tokens, sizes.heads, sizes.rank)
    w_uv = place.random(sizes.heads, sizes.value, sizes.rank, scale=sizes.rank**-0.5)
    expected = torch.einsum("bthl,hvl->bthv", attended.double(), w_uv.double()).flatten(2)
    return error_of(ops["MlaValue"](attended, w_uv), expected, place.dtype)


def layer(ops: Any, place: Place, sizes: Sizes, tokens: int, stacks: tuple[Tensor, Tensor, Tensor]) -> float:
    """Router, routed and shared experts of `tokens` tokens; a token whose choice is nearly a tie is set aside."""
    hidden = place.random(tokens, sizes.hidden)
    router = place.random(sizes.experts, sizes.hidden, scale=sizes.hidden**-0.5)
    bias = place.random(sizes.experts, scale=0.1, dtype=torch.float32)
    width = sizes.shared * sizes.inter
    gate, up = (place.random(width, sizes.hidden, scale=sizes.hidden**-0.5) for _ in range(2))
    down = place.random(sizes.hidden, width, scale=width**-0.5)
    rest = (sizes.top_k, sizes.groups, sizes.topk_groups, int(sizes.normalise), sizes.scale, int(sizes.biased))
    actual = ops["MoeLayer"](hidden, router, bias, *stacks, gate, up, down, *rest)
    scores, choice, groups = reference.scores_of(hidden.double() @ router.double().T, bias, sizes.groups, sizes.biased)
    ids = reference.choose(choice, groups, sizes.topk_groups, sizes.top_k)
    weights = scores.gather(1, ids)
    normalise = sizes.normalise and sizes.top_k > 1
    weights = weights / weights.sum(1, keepdim=True) if normalise else weights
    weights = weights * (sizes.scale if sizes.biased or not normalise else 1.0)
    x = hidden.double()
    inner = torch.nn.functional.silu(x @ gate.double().T) * (x @ up.double().T)
    expected = reference.expert_sum(hidden, weights, ids, *stacks) + inner @ down.double().T
    clear = reference.margin(choice, groups, sizes.topk_groups, sizes.top_k) > _TIE
    if not bool(clear.any()):
        raise ValueError("no token is clear of a tie")
    return error_of(actual[clear], expected[clear], place.dtype)


def sampling(place: Place, vocab: int, rows: int) -> float:
    """0 where the rows' tokens, draws and log-probabilities are those of numpy's sampler; else infinite."""
    from deepseek_trt.engines.generation.params import SamplingParams
    from deepseek_trt.engines.generation.sampling import Sampler, sample_rows
    from deepseek_trt.plugins.kernels.sampling import run as kernels

    kinds = [
        SamplingParams(8),
        SamplingParams(8, temperature=0.8, seed=1, logprobs=5),
        SamplingParams(8, temperature=1.0, top_k=50, top_p=0.9, seed=2),
        SamplingParams(8, temperature=1.5, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.5, seed=3),
        SamplingParams(
            8, temperature=0.7, frequency_penalty=0.4, logit_bias={3: 4.0}, min_tokens=2, seed=4, logprobs=0
        ),
    ]
    both = [[Sampler(kinds[row % len(kinds)], [5, 9, 5], [1], room=8) for row in range(rows)] for _ in range(2)]
    for _ in range(3):
        logits = place.random(rows, vocab, scale=4.0, dtype=torch.float32)
        expected = sample_rows(both[0], logits.cpu().numpy())
        picked = kernels.run([sampler.row for sampler in both[1]], logits)
        if [token for token, *_ in expected] != [token for token, *_ in picked]:
            return float("inf")
        if [sampler.row.draws for sampler in both[0]] != [sampler.row.draws for sampler in both[1]]:
            return float("inf")
    return 0.0
