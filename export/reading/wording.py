"""How names and values of a checkpoint stand in a sentence: a few of them, cut, and escaped."""

from __future__ import annotations

from collections.abc import Collection

_LONGEST = 120


def some(names: Collection[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    first = [shown(name)[1:-1] for name in list(names)[:most]]
    return ", ".join(first) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown(value: object) -> str:
    """repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...{text[-1]}"
