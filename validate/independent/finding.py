"""Independent: what the comparison with an implementation of others gave, or why there was none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["agrees", "differs", "absent"]


@dataclass(frozen=True)
class Independent:
    """The reference beside `by`, which reads config.json and weights with code of its own.

    `tokens` counts the lines of `output` that were compared, `set_aside` those of them that a near tie of a router may
    explain. Where there was no comparison, `by` is empty, the numbers are None, and `summary` says what is not proven.
    """

    status: Status
    summary: str
    by: str = ""
    output: str = ""
    tokens: int = 0
    set_aside: int = 0
    max_relative: float | None = None
    tolerance: float | None = None

    @property
    def passed(self) -> bool:
        """What was not compared is no error: the summary says it."""
        return self.status != "differs"


def absent(reason: str) -> Independent:
    """No comparison, for this reason."""
    return Independent(
        "absent",
        "NOT proven: no independent implementation has checked how config.json is read and what the model computes: "
        f"{reason}",
    )
