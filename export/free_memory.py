"""How much memory this process may still take: as the system, its control group and its own limits say."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_NEEDED = 0.8  # of the free memory, at most, for what cannot be had otherwise


def too_much(needed: int) -> str:
    """Why so many bytes of memory are refused on this machine, or nothing where they fit."""
    free = available_memory()
    return "" if needed <= _NEEDED * free else f"{needed / 1e9:,.2f} GB of memory, where {free / 1e9:,.2f} GB are free"


def available_memory() -> int:
    """Bytes that could be had without swapping: the least of what the system, a container and ulimit -v leave."""
    return max(min(_limits()), 0)


def _limits() -> Iterator[int]:
    yield _of_system()
    yield from _of_groups()
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft - _pages_of_process() * os.sysconf("SC_PAGE_SIZE")


def _of_system() -> int:
    """All memory that there is, where the system does not say what is free."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups() -> Iterator[int]:
    """What each control group (version 2) around this process leaves; cached pages of files make room."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for path in (line[4:] for line in lines if line.startswith("0::/")):
        folder = _ROOT / path
        for group in (folder, *folder.parents[: len(folder.parts) - len(_ROOT.parts)]):
            yield from group_leaves(group)


def group_leaves(folder: Path) -> Iterator[int]:
    """Bytes left in the control group of this folder, where it has a limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return
    if limit.isdecimal():
        yield int(limit) - used + int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))


def _pages_of_process() -> int:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return 0
