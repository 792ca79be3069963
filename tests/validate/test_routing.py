"""Near ties: told from errors, followed, and set aside where choices cannot be seen."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from deepseek_trt.export.config import ModelConfig
from deepseek_trt.export.ops.moe_router import moe_router
from deepseek_trt.validate import accuracy, backends
from deepseek_trt.validate.accuracy import ValidateRequest, validate_bundle
from deepseek_trt.validate.routing import differing_tokens, margin, weights_of
from deepseek_trt.validate.undecided import closest_gap

GREEDY = (2, 1, 1, 0, 1.5)  # top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor
LIMITED = (2, 2, 1, 0, 1.5)
LOGITS = torch.tensor([4.0, 3.0, 2.9, 1.0])


def test_the_margin_is_half_the_gap_relative_to_the_largest():
    assert margin(LOGITS, torch.tensor([0, 2]), GREEDY) == pytest.approx(0.05 / 4, rel=1e-3)
    assert margin(LOGITS, torch.tensor([0, 1]), GREEDY) < 1e-5


def test_a_choice_across_groups_that_are_refused_has_no_margin():
    assert margin(LOGITS, torch.tensor([0, 2]), LIMITED) == math.inf
    assert margin(LOGITS, torch.tensor([2, 3]), LIMITED) == pytest.approx(0.55 / 4, rel=1e-3)


@pytest.mark.parametrize("attributes", [GREEDY, LIMITED, (2, 1, 1, 1, 1.5)])
def test_weights_of_the_own_choice_are_the_routers(attributes):
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    weights, ids = moe_router(logits, *attributes)
    assert torch.equal(weights_of(logits, ids, attributes), weights)


def test_order_does_not_make_a_difference():
    ours, theirs = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [3, 5]])
    assert differing_tokens(ours, theirs) == [1]


def test_the_gap_covers_experts_and_groups():
    config = ModelConfig(n_routed_experts=4, num_experts_per_tok=1, n_group=2, topk_group=1)
    logits = np.array([[4.0, 3.0, 3.9, 1.0]])
    assert closest_gap(logits, config)[0] == pytest.approx(0.1 / 4)
    limited = dataclasses.replace(config, topk_method="group_limited_greedy", num_experts_per_tok=2)
    assert closest_gap(logits, limited)[0] == pytest.approx(0.1 / 4)  # between the groups; in its group both are taken


@pytest.fixture
def opaque(monkeypatch):
    """ONNX Runtime, but for its choices, which are hidden."""
    hidden = dataclasses.replace(backends.BACKENDS["ort"], watch=None)
    monkeypatch.setitem(accuracy.BACKENDS, "ort", hidden)


def test_a_backend_whose_choices_are_hidden_can_pass(good, opaque):
    report = validate_bundle(ValidateRequest(good("float16").path, threads=1)).report
    assert report.passed
    assert not report.backends[0].follows_routing
    assert report.backends[0].routers == ()


def test_hidden_choices_excuse_no_fault(edited, opaque):
    def wrong_scale(model):
        body = next(f for f in model.functions if f.name == "MoeRouter")
        next(n for n in body.node if n.output[0] == "factor").attribute[0].f *= 1.01

    report = validate_bundle(ValidateRequest(edited(wrong_scale, "prefill", "decode"), threads=1)).report
    assert not report.passed
    assert report.backends[0].first_fault is not None
