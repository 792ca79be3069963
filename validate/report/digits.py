"""Numbers for people: with as many digits as two of them need to differ."""

from __future__ import annotations

_LEAST, _MOST = 4, 17  # 17 digits tell any two float64 apart


def apart(value: float, other: float) -> tuple[str, str]:
    """Both with the fewest significant digits, at least four, in which they differ by more than their last one.

    Equal ones, and what is not finite, with four.
    """
    for digits in range(_LEAST, _MOST + 1):
        ours, theirs = f"{value:.{digits}g}", f"{other:.{digits}g}"
        if ours != theirs:
            more = min(digits + (digits > _LEAST), _MOST)
            return f"{value:.{more}g}", f"{other:.{more}g}"
    return f"{value:.{_LEAST}g}", f"{other:.{_LEAST}g}"
