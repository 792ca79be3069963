"""Requests of all kinds: an error to the sender, or the parameters that were sent."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.export.errors import RequestError

FAST, PART, PARTS = 60, 1000, 2
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.text(max_size=2), st.booleans()), max_size=3),
)
FIELDS = list(SamplingParams.__dataclass_fields__)
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def test_requests(campaign):
    campaign("request", range(FAST))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_requests_for_longer(campaign, part):
    campaign("request", range(FAST + part * PART, FAST + (part + 1) * PART))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_sampling_params(fields):
    """Refused with the field's name, or in range and of its type."""
    try:
        params, sentence = SamplingParams(**fields), ""
    except RequestError as error:
        params, sentence = None, str(error)
    if params is None:
        assert sentence.isprintable()
        named = [name.replace("max_tokens", "max_new_tokens") for name in fields]
        assert any(name in sentence for name in named) or "max_tokens" in fields
        return
    assert all(type(getattr(params, name)) in (int, float) and math.isfinite(getattr(params, name)) for name in FLOATS)
    for name in ("max_new_tokens", "top_k", "seed", "min_tokens"):
        assert isinstance(getattr(params, name), int)
        assert not isinstance(getattr(params, name), bool)
        assert getattr(params, name) >= 0
