"""Nothing unusual: the checkpoints that every case of this folder changes are accepted as they are."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("base", ["v2", "v3"])
def test_the_base_is_accepted(base, made, verdict):
    assert verdict(made(base).path).accepted
