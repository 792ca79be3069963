"""The numbers, on arrays small enough to check by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deepseek_trt.validate.numbers.metrics import closeness, kl_divergence, negative_log_likelihood, top_overlap


def test_errors_are_relative_to_the_largest_reference():
    c = closeness(np.array([[1.0, -4.0], [2.0, 3.5]]), np.array([[1.0, -4.0], [2.0, 3.0]]), "float32")
    assert (c.max_absolute, c.max_relative) == (0.5, 0.125)
    assert c.worst == (1, 1)
    assert (c.worst_value, c.worst_reference) == (3.5, 3.0)


@pytest.mark.parametrize(("dtype", "step"), [("float32", 2.0**-23), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
def test_an_ulp_is_the_distance_to_the_next_number(dtype, step):
    assert closeness(np.array([1.0 + step]), np.array([1.0]), dtype).median_ulps == 1.0
    assert closeness(np.array([2.0 + step]), np.array([2.0]), dtype).median_ulps == 0.5


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_on_one_side_only_is_an_infinite_error(strange):
    c = closeness(np.array([1.0, strange, 3.0]), np.array([1.0, 2.0, 3.0]), "float32")
    assert not c.same_masks
    assert c.max_relative == math.inf
    assert c.worst == (1,)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_alike_on_both_sides_is_no_pass(strange):
    c = closeness(np.array([1.0, strange]), np.array([1.0, strange]), "float32")
    assert c.same_masks
    assert c.max_relative == math.inf
    assert (c.nonfinite, c.reference_nonfinite, c.size) == (1, 1, 2)
    assert c.worst == (1,)


def test_kl_divergence_of_two_coins():
    even, odd = np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.9, 0.1]]))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(odd, even)[0] == pytest.approx(expected)
    assert kl_divergence(even, even)[0] == 0.0


def test_top_overlap_counts_shared_tokens():
    ours, theirs = np.array([[3.0, 2.0, 1.0, 0.0]]), np.array([[2.0, 3.0, 0.0, 1.0]])
    assert top_overlap(ours, theirs, 1)[0] == 0.0
    assert top_overlap(ours, theirs, 2)[0] == 1.0
    assert top_overlap(ours, theirs, 3)[0] == pytest.approx(2 / 3)


def test_likelihood_of_an_even_distribution():
    assert negative_log_likelihood(np.zeros((1, 8)), np.array([3]))[0] == pytest.approx(math.log(8))
