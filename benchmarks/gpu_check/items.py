"""Items: the pieces of a part, in the order in which a child process does them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpu_check.places import Prepared
from gpu_check.rows import Row


class Gpu(Protocol):
    """What a part asks of the machine; rehearsal.py has one that needs no GPU."""

    device: str
    sm: int
    name: str

    def executor(self) -> Callable[..., None]:
        """What runs shipped binaries."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` enqueues as a graph, after two runs of it; the result enqueues the graph."""

    def flush(self) -> None:
        """Fill the L2 cache with what no call reads, by reading."""

    def seconds(self, work: Callable[[], None]) -> float:
        """The time that what `work` enqueues takes."""

    def synchronize(self) -> None:
        """Wait; raises where the GPU met an error."""

    def free_bytes(self) -> float: ...

    def cache_bytes(self) -> int: ...


@dataclass(frozen=True)
class Setting:
    """One run of the check. `few`: small inputs alone, as under memcheck; `rehearsal`: no GPU."""

    prepared: Prepared
    rehearsal: bool = False
    few: bool = False

    def to_words(self) -> list[str]:
        return [str(self.prepared.folder), str(int(self.rehearsal)), str(int(self.few))]

    @classmethod
    def of_words(cls, words: list[str]) -> Setting:
        return cls(Prepared(Path(words[0])), bool(int(words[1])), bool(int(words[2])))


@dataclass(frozen=True)
class Item:
    """One piece of a part: its name in the table, and what finds its rows."""

    name: str
    run: Callable[[], Iterable[Row]]


class NotRunError(Exception):
    """Why something was left out: no fault."""


def each(part: str, works: Iterable[tuple[str, Callable[[], Row]]], synchronize: Callable[[], None]) -> Iterator[Row]:
    """A row a work; what a work raises is its row, and is raised again only where the GPU is lost for what follows."""
    for what, work in works:
        try:
            row = work()
        except NotRunError as reason:
            yield Row(part, what, "not run", str(reason))
        except Exception as error:
            yield Row(part, what, "FAILED", f"{type(error).__name__}: {error}"[:400])
            synchronize()
        else:
            yield row
