"""MoeBiasedRouter's kernel against a router written out token by token."""

import math

import pytest
import torch

from deepseek_trt.export.ops.moe_biased_router import moe_biased_router as reference
from deepseek_trt.plugins.kernels import chips, moe_biased_router

CASES = [  # tokens, experts, top_k, groups, topk_groups, normalise, scale, tiles of
    (1, 16, 4, 1, 1, 1, 2.5, chips.INTERPRETER),
    (9, 256, 8, 8, 4, 1, 2.5, chips.INTERPRETER),  # V3, R1
    (5, 256, 8, 8, 4, 1, 2.5, 90),
    (6, 64, 6, 1, 1, 1, 2.446, chips.INTERPRETER),  # Moonlight
    (4, 384, 8, 1, 1, 1, 2.827, chips.INTERPRETER),  # Kimi-K2
    (3, 384, 8, 1, 1, 1, 2.827, 86),
    (7, 18, 3, 3, 2, 0, 16.0, chips.INTERPRETER),
    (4, 18, 1, 3, 1, 1, 2.0, chips.INTERPRETER),  # one expert a token is scaled, never normalised
    (4, 60, 5, 12, 12, 0, 1.0, chips.INTERPRETER),  # all groups may be chosen: no limit
]


def route_one(logits, bias, top_k, groups, topk_groups, normalise, scale):
    """One token in Python's floats: [(expert, weight), ...]."""
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    if topk_groups < groups:
        size = len(scores) // groups
        two = [math.fsum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        best = sorted(range(groups), key=lambda g: (-two[g], g))[:topk_groups]
        biased = [b if e // size in best else -math.inf for e, b in enumerate(biased)]
    chosen = sorted(range(len(scores)), key=lambda e: (-biased[e], e))[:top_k]
    total = math.fsum(scores[e] for e in chosen) + 1e-20 if normalise and top_k > 1 else 1.0
    return [(e, scores[e] / total * scale) for e in chosen]


@pytest.mark.parametrize(("tokens", "experts", "top_k", "groups", "topk_groups", "normalise", "scale", "sm"), CASES)
@pytest.mark.parametrize("bias_scale", [0.01, 3.0], ids=["small bias", "large bias"])
def test_routes_as_written_out(
    tokens, experts, top_k, groups, topk_groups, normalise, scale, sm, bias_scale, device, use_tiles
):
    """A large bias makes biased scores negative, and what the groups are chosen by other than the scores."""
    torch.manual_seed(tokens)
    use_tiles(sm, moe_biased_router)
    logits, bias = torch.randn(tokens, experts), torch.randn(experts) * bias_scale
    given = (top_k, groups, topk_groups, normalise, scale)
    weights, ids = moe_biased_router.run(logits.to(device), bias.to(device), *given)
    expected = [route_one(row, bias.tolist(), *given) for row in logits.tolist()]
    assert ids.tolist() == [[expert for expert, _ in row] for row in expected]
    exact = torch.tensor([[weight for _, weight in row] for row in expected], dtype=torch.float64)
    # exp, two sums of positive terms, three divisions: a few roundings each
    assert ((weights.cpu().double() - exact).abs() / exact).max() <= 8 * torch.finfo(torch.float32).eps
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32


@pytest.mark.parametrize(("experts", "groups", "topk_groups"), [(64, 1, 1), (160, 8, 3), (256, 8, 4)])
def test_ties_go_to_the_lowest_expert(experts, groups, topk_groups, device):
    logits, bias = torch.zeros(3, experts), torch.zeros(experts)
    logits[1, 7] = logits[1, experts - 1] = 1.0
    logits[2] = torch.arange(experts) % 5
    given = (logits.to(device), bias.to(device), 6, groups, topk_groups, 0, 1.0)
    weights, ids = moe_biased_router.run(*given)
    expected_weights, expected_ids = reference(*given)
    assert ids.tolist() == expected_ids.tolist()
    assert ids[0].tolist() == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(weights, expected_weights)


def test_dropped_groups_lose_to_negative_scores(device):
    """They count as -inf: experts of a kept group whose biased scores are all negative still go first."""
    logits, bias = torch.zeros(1, 8, device=device), torch.full((8,), -5.0, device=device)
    bias[4:] = -9.0
    _, ids = moe_biased_router.run(logits, bias, 4, 2, 1, 1, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3]]


def test_when_kept_groups_run_out_the_lowest_others_follow(device):
    logits, bias = torch.zeros(1, 8, device=device), torch.zeros(8, device=device)
    bias[6:] = 1.0
    _, ids = moe_biased_router.run(logits, bias, 4, 4, 1, 1, 1.0)
    assert ids.tolist() == reference(logits, bias, 4, 4, 1, 1, 1.0)[1].tolist() == [[6, 7, 0, 1]]


@pytest.mark.parametrize("logit", [1e30, -1e30, torch.inf, -torch.inf])
def test_saturated_scores(logit, device):
    logits = torch.randn(2, 20, device=device)
    logits[0, 3] = logit
    weights, ids = moe_biased_router.run(logits, torch.zeros(20, device=device), 4, 1, 1, 1, 2.0)
    expected, expected_ids = reference(logits, torch.zeros(20, device=device), 4, 1, 1, 1, 2.0)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(weights, expected)


def test_a_bad_logit_spoils_its_token_only(device):
    torch.manual_seed(0)
    logits = torch.randn(3, 20, device=device)
    logits[1, 11] = torch.nan
    weights, ids = moe_biased_router.run(logits, torch.randn(20, device=device), 4, 1, 1, 0, 1.0)
    assert weights.isnan().all(1).tolist() == [False, True, False]
    assert ids[1].tolist() == [0, 1, 2, 3], "ids must index experts even so"


def test_no_tokens(device):
    weights, ids = moe_biased_router.run(torch.empty(0, 8, device=device), torch.zeros(8, device=device), 2, 1, 1, 0, 1)
    assert weights.shape == ids.shape == (0, 2)
