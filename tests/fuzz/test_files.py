"""Damaged files of a checkpoint and an adapter: one sentence, or what an independent reader reads.

Cases have numbers: a failure prints the command that reruns it. The slow run goes on where the fast one ends, in parts
that can be run alone (-k "config and 3").
"""

from __future__ import annotations

import pytest

# Cases of the fast run, and of each of the slow run's parts and how many parts there are.
TARGETS = {
    "header": (100, 2000, 2),
    "index": (50, 1000, 3),
    "config": (70, 1000, 4),
    "config_v3": (40, 1000, 2),
    "classifier": (20, 1000, 1),
    "shard": (30, 1000, 2),
    "tokenizer": (20, 500, 2),
    "tokenizer_config": (40, 1000, 1),
    "generation_config": (40, 1000, 2),
    "chat_template": (30, 500, 2),
    "adapter": (30, 1000, 1),
    "export": (10, 300, 1),
}
PARTS = [(name, part) for name, (_, _, parts) in TARGETS.items() for part in range(parts)]


@pytest.mark.parametrize("name", TARGETS)
def test_damaged(campaign, name):
    campaign(name, range(TARGETS[name][0]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_damaged_for_longer(campaign, name, part):
    fast, cases, _ = TARGETS[name]
    campaign(name, range(fast + part * cases, fast + (part + 1) * cases))
