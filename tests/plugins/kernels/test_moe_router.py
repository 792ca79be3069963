"""MoeRouter's kernel against a router written out token by token."""

import math

import pytest
import torch

from deepseek_trt.export.ops.moe_router import moe_router as reference
from deepseek_trt.plugins.kernels import chips, moe_router

CASES = [  # tokens, experts, top_k, groups, topk_groups, normalise, scale, tiles of
    (1, 16, 4, 1, 1, 0, 1.0, chips.INTERPRETER),
    (9, 64, 6, 1, 1, 0, 1.0, chips.INTERPRETER),
    (5, 64, 6, 1, 1, 0, 1.0, 90),
    (33, 160, 6, 8, 3, 0, 16.0, chips.INTERPRETER),
    (7, 160, 6, 8, 3, 0, 16.0, 86),
    (16, 256, 8, 8, 4, 1, 2.5, chips.INTERPRETER),
    (5, 256, 8, 1, 1, 1, 2.5, chips.INTERPRETER),
    (4, 18, 1, 3, 1, 1, 2.0, chips.INTERPRETER),  # one expert a token is scaled, never normalised
    (4, 60, 5, 12, 12, 0, 1.0, chips.INTERPRETER),  # all groups may be chosen: no limit
]


def route_one(logits, top_k, groups, topk_groups, normalise, scale):
    """One token in Python's floats: [(expert, weight), ...]."""
    largest = max(logits)
    powers = [math.exp(x - largest) for x in logits]
    scores = [p / math.fsum(powers) for p in powers]
    if topk_groups < groups:
        size = len(scores) // groups
        best = sorted(range(groups), key=lambda g: (-max(scores[g * size : (g + 1) * size]), g))[:topk_groups]
        scores = [s if e // size in best else 0.0 for e, s in enumerate(scores)]
    chosen = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]
    total = math.fsum(scores[e] for e in chosen)
    factor = 1.0 / (total + 1e-20) if normalise and top_k > 1 else scale
    return [(e, scores[e] * factor) for e in chosen]


@pytest.mark.parametrize(("tokens", "experts", "top_k", "groups", "topk_groups", "normalise", "scale", "sm"), CASES)
def test_routes_as_written_out(tokens, experts, top_k, groups, topk_groups, normalise, scale, sm, device, use_tiles):
    torch.manual_seed(tokens)
    use_tiles(sm, moe_router)
    logits = torch.randn(tokens, experts)
    weights, ids = moe_router.run(logits.to(device), top_k, groups, topk_groups, normalise, scale)
    expected = [route_one(row, top_k, groups, topk_groups, normalise, scale) for row in logits.tolist()]
    assert ids.tolist() == [[expert for expert, _ in row] for row in expected]
    exact = torch.tensor([[weight for _, weight in row] for row in expected], dtype=torch.float64)
    # exp, a sum of positive terms, two divisions: a few roundings each
    assert ((weights.cpu().double() - exact).abs() / exact).max() <= 8 * torch.finfo(torch.float32).eps
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32


@pytest.mark.parametrize(("experts", "groups", "topk_groups"), [(64, 1, 1), (160, 8, 3), (256, 8, 4)])
def test_ties_go_to_the_lowest_expert(experts, groups, topk_groups, device):
    logits = torch.zeros(3, experts)
    logits[1, 7] = logits[1, experts - 1] = 1.0
    logits[2] = torch.arange(experts) % 5
    logits = logits.to(device)
    weights, ids = moe_router.run(logits, 6, groups, topk_groups, 0, 1.0)
    expected_weights, expected_ids = reference(logits, 6, groups, topk_groups, 0, 1.0)
    assert ids.tolist() == expected_ids.tolist()
    assert ids[0].tolist() == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(weights, expected_weights)


def test_when_kept_groups_run_out_zeros_are_chosen(device):
    """A softmax that underflows outside one expert: the remaining choices are zeros, lowest ids first."""
    logits = torch.full((1, 16), -200.0, device=device)
    logits[0, 13] = 0.0
    weights, ids = moe_router.run(logits, 4, 4, 2, 0, 1.0)
    assert ids.tolist() == [[13, 0, 1, 2]]
    assert weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_logit_spoils_its_token_only(bad, device):
    torch.manual_seed(0)
    logits = torch.randn(3, 20, device=device)
    logits[1, 11] = bad
    weights, ids = moe_router.run(logits, 4, 1, 1, 0, 1.0)
    assert weights.isnan().all(1).tolist() == [False, True, False]
    assert ids[1].tolist() == [0, 1, 2, 3], "ids must index experts even so"


def test_no_tokens(device):
    weights, ids = moe_router.run(torch.empty(0, 8, device=device), 2, 1, 1, 0, 1.0)
    assert weights.shape == ids.shape == (0, 2)
