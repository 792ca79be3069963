"""Lookup and payoff: what is proposed, and when proposing stops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_trt.engines.generation.speculation import MOST_DRAFTED, SPECULATE, Lookup, Payoff, check_speculate
from deepseek_trt.export.errors import RequestError


def plain_draft(tokens, most):
    """The definition: of the last three tokens, else of the last two, the latest place before."""
    for size in (3, 2):
        for start in range(len(tokens) - 1, size - 1, -1):
            if tokens[start - size : start] == tokens[-size:]:
                copied = list(tokens)
                for at in range(start, start + most):
                    copied.append(copied[at])
                return copied[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(1, 5), max_size=12), st.integers(1, MOST_DRAFTED))
def test_drafts_are_those_of_the_definition(tokens, cuts, most):
    """However the tokens come, some at a time."""
    lookup, end = Lookup(), 0
    for cut in [*cuts, len(tokens)]:
        end = min(end + cut, len(tokens))
        assert lookup.draft(tokens[:end], most) == plain_draft(tokens[:end], most)


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([], []),
        ([5], []),
        ([5, 5], []),
        ([5, 5, 5], [5] * 7),
        ([1, 2, 3, 1, 2], [3, 1, 2, 3, 1, 2, 3]),
        ([1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3], [9, 8, 2, 3, 7, 1, 2]),  # three alike go before two
        ([1, 2, 3, 4], []),
    ],
)
def test_drafts(tokens, draft):
    assert Lookup().draft(tokens, 7) == draft


def run(payoff, calls, seconds_of_drafts, tokens):
    """How many of `calls` calls of one row were to have drafts; a plain call takes a second."""
    drafted = 0
    for _ in range(calls):
        if payoff.wants(1):
            payoff.drafted(1, tokens, seconds_of_drafts)
            drafted += 1
        else:
            payoff.plain(1, 1.0)
    return drafted


def test_the_first_call_of_so_many_rows_is_plain():
    payoff = Payoff()
    assert not payoff.wants(1)
    payoff.plain(1, 1.0)
    assert payoff.wants(1)
    assert not payoff.wants(2)


def test_it_goes_on_while_it_pays():
    assert run(Payoff(), 1000, seconds_of_drafts=2.0, tokens=3) > 970


def test_it_stops_where_it_does_not_pay_and_tries_again_less_and_less():
    payoff = Payoff()
    assert run(payoff, 1000, seconds_of_drafts=2.0, tokens=1) < 60
    first, second = (run(payoff, 1000, seconds_of_drafts=2.0, tokens=1) for _ in range(2))
    assert 0 < first + second < 40
    assert run(payoff, 4000, seconds_of_drafts=1.2, tokens=4) > 2000  # it pays now, which is found out


def test_other_ways_are_refused():
    for way in SPECULATE:
        check_speculate(way)
    with pytest.raises(RequestError, match="speculate 'eagle': must be one of off, lookup, mtp, auto"):
        check_speculate("eagle")
