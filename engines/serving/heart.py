"""Heart: judges by an engine's beats whether it stands still. Standard library alone: it lies beside serve.sh, too.

A beat is a step of the engine, or a moment of an idle one. A process that is stopped, or waits for what never comes,
makes none. Nor does one in the middle of a long step: of a long prompt on slow processors, for one. Those it keeps
busy, so that its time counts less.
"""

import os
from pathlib import Path

STALL_SECONDS = 45.0  # with a look a second, and what the mend takes, below a minute
_MOST_SECONDS = (
    5.0  # that one look counts for: a machine that slept, or a look that came late, is not the engine's fault
)
_BUSY_SHARE = 0.5  # of one processor
_BUSY_COUNTS = 0.1  # a step on busy processors may last ten times as long


class Heart:
    """Looks in a row that found no new beat add up, until there are `seconds` of them; the first beat starts it."""

    def __init__(self, seconds: float = STALL_SECONDS) -> None:
        self._seconds = seconds
        self._beats: float | None = None
        self._cpu: float | None = None
        self._still = 0.0

    def look(self, beats: float | None, cpu: float | None, elapsed: float) -> None:
        """Note the count of beats, None where nobody says it, and processor seconds, `elapsed` after the last look."""
        if beats is not None and beats != self._beats:
            self._beats, self._still = beats, 0.0
        elif self._beats is not None:
            used = cpu - self._cpu if cpu is not None and self._cpu is not None else 0.0
            busy = used > _BUSY_SHARE * elapsed
            self._still += min(elapsed, _MOST_SECONDS) * (_BUSY_COUNTS if busy else 1)
        self._cpu = cpu

    @property
    def stopped(self) -> bool:
        return self._still >= self._seconds


def cpu_seconds(pid: int) -> float | None:
    """That the process has used; None where it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
