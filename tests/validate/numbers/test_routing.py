"""Near ties: told from errors, followed, and set aside where choices cannot be seen."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.backends.backends import BACKENDS
from deepseek_trt.validate.numbers.routing import Router, closest_gap, differing_tokens, margin
from deepseek_trt.validate.request import ValidateRequest

GREEDY = Router((2, 1, 1, 0, 1.5))  # top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor
LIMITED = Router((2, 2, 1, 0, 1.5))
BIAS = torch.tensor([0.0, 0.0, 0.5, 0.0])
LOGITS = torch.tensor([4.0, 3.0, 2.9, 1.0])


def test_the_margin_is_half_the_gap_relative_to_the_largest():
    assert margin(LOGITS, torch.tensor([0, 2]), GREEDY) == pytest.approx(0.05 / 4, rel=1e-3)
    assert margin(LOGITS, torch.tensor([0, 1]), GREEDY) < 1e-5


def test_a_choice_across_groups_that_are_refused_has_no_margin():
    assert margin(LOGITS, torch.tensor([0, 2]), LIMITED) == math.inf
    assert margin(LOGITS, torch.tensor([2, 3]), LIMITED) == pytest.approx(0.55 / 4, rel=1e-3)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["softmax", "biased"])
@pytest.mark.parametrize("attributes", [(2, 1, 1, 0, 1.5), (2, 2, 1, 0, 1.5), (2, 1, 1, 1, 1.5), (1, 1, 1, 1, 1.5)])
def test_weights_of_the_own_choice_are_the_routers(attributes, bias):
    router, logits = Router(attributes, bias), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    weights, ids = router.route(logits)
    assert torch.equal(router.weights_of(logits, ids), weights)


def test_order_does_not_make_a_difference():
    ours, theirs = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [3, 5]])
    assert differing_tokens(ours, theirs) == [1]


@pytest.mark.parametrize(
    ("logits", "attributes", "gap"),
    [
        ([4.0, 3.0, 3.9, 1.0], (1, 1, 1, 0, 1.0), 0.1),
        ([4.0, 3.0, 3.9, 1.0], (2, 2, 1, 0, 1.0), 0.1),  # between the groups; in its group both are taken
        ([4.0, 3.0, 2.9, 1.0], (1, 2, 1, 0, 1.0), 1.0),  # the best of the other group is out of reach, 1.1 away
    ],
)
def test_the_gap_covers_experts_and_groups(logits, attributes, gap):
    assert float(closest_gap(torch.tensor([logits]), Router(attributes))) == pytest.approx(gap / 4)


@pytest.mark.parametrize("attributes", [(2, 1, 1, 0, 1.5), (1, 2, 1, 1, 1.5), (3, 4, 2, 1, 1.5)])
@pytest.mark.parametrize("biased", [False, True])
def test_half_the_gap_changes_the_choice(attributes, biased):
    """A gap is right when a move of a little less changes no choice, and the margin of some other choice is near it."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    router = Router(attributes, 0.2 * torch.randn(8, generator=generator) if biased else None)
    gaps, (_, ids) = closest_gap(logits, router), router.route(logits)
    half = (gaps * logits.abs().amax(-1) / 2)[:, None]
    close = torch.flatten(half < 0.05)  # where biased scores are as good as linear
    assert close.any()
    for sign in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8):
        _, chosen = router.route(logits + 0.9 * half * sign)
        assert not differing_tokens(ids[close], chosen[close])
    toward = torch.full_like(logits, 1.0).scatter(1, ids.long(), -1.0)
    _, chosen = router.route(logits + 1.1 * half * toward)
    assert differing_tokens(ids[close], chosen[close])


@pytest.fixture
def opaque(monkeypatch):
    """ONNX Runtime, but for its choices, which are hidden."""
    hidden = dataclasses.replace(BACKENDS["exported"], watch=None)
    monkeypatch.setitem(BACKENDS, "exported", hidden)


def test_a_backend_whose_choices_are_hidden_can_pass(good, opaque):
    report = validate_bundle(ValidateRequest(good("float16").path, ("exported",), threads=1)).report
    assert report.passed
    assert not report.backends[0].follows_routing
    assert report.backends[0].routers == ()


def test_hidden_choices_excuse_no_fault(edited, opaque):
    def wrong_scale(model):
        body = next(f for f in model.functions if f.name == "MoeRouter")
        next(n for n in body.node if n.output[0] == "factor").attribute[0].f *= 1.01

    report = validate_bundle(ValidateRequest(edited(wrong_scale, "prefill", "decode"), ("exported",), threads=1)).report
    assert not report.passed
    assert report.backends[0].first_fault is not None
