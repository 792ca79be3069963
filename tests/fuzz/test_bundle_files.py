"""Damaged JSON of a bundle: its manifest, a plan's record, a plugin library's manifest."""

from __future__ import annotations

import pytest

FAST, PART = {"manifest": 40, "plan": 20, "plugins": 20}, 500
PARTS = [(name, part) for name in FAST for part in range(2)]


@pytest.mark.parametrize("name", FAST)
def test_damaged(campaign, name):
    campaign(name, range(FAST[name]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_damaged_for_longer(campaign, name, part):
    campaign(name, range(FAST[name] + part * PART, FAST[name] + (part + 1) * PART))
