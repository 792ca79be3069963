"""Coverage: inputs are added until every expert is reached, and a gap is reported."""

from __future__ import annotations

import numpy as np

from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.validate.backends.backends import make_reference
from deepseek_trt.validate.backends.probes import Probes
from deepseek_trt.validate.cases import coverage
from deepseek_trt.validate.cases.cases import case_plan, prefill_case
from deepseek_trt.validate.steps import Script


def test_cases_are_added_until_every_expert_is_reached(good):
    bundle = good("float32")
    cache, config = bundle.manifest.cache, bundle.manifest.model
    pages = case_plan(cache.page_size).pages(cache)
    reference = make_reference(SessionRequest(bundle, pages, 1))
    first = prefill_case("first", cache, config.vocab_size, seed=0)[1:]  # seven tokens: too few for 16 experts twice
    covered = coverage.cover_experts(reference, Script(first, pages), config, seed=0)
    assert len(covered.steps) > len(first)
    assert covered.steps[: len(first)] == first


def test_experts_that_nobody_chose_are_named():
    probes = Probes(("router_ids",), {0: {"router_ids.1": np.array([[0, 1], [1, 2]], dtype=np.int32)}})
    config = ModelConfig(num_hidden_layers=2, n_routed_experts=5, num_experts_per_tok=2)
    assert coverage.coverage(probes, config) == (coverage.Coverage(layer=1, tokens=(1, 2, 1, 0, 0), missed=(3, 4)),)
