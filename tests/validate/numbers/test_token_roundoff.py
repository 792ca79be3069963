"""The tolerance of operators that take tokens as 16-bit integers."""

from __future__ import annotations

from deepseek_trt.validate.numbers.tolerance import Policy


def test_tokens_in_16_bits_allow_more_and_say_so() -> None:
    usual, rounded = (Policy(128, 5, "float32", rounds_tokens=rounds)("logits") for rounds in (False, True))
    assert 5 * usual.relative < rounded.relative < 100 * usual.relative
    assert "2^-32 of tokens in 16 bits" in rounded.reason
    assert "16 bits" not in usual.reason


def test_a_floor_that_was_measured_without_it_does_not_judge() -> None:
    policy = Policy(128, 5, "float16", floors={"logits": 1e-9}, rounds_tokens=True)
    assert policy("logits").relative > 1e-4
