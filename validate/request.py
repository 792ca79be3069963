"""ValidateRequest: what to validate, the backends' names, and what is wrong with a request."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.engines.sessions.threads import check_threads
from deepseek_trt.export.errors import RequestError

BACKENDS = ("exported", "ort", "torch", "transformers", "kernels", "tensorrt")
DEFAULT_BACKENDS = ("exported", "ort")
DRAFTING = ("exported", "ort", "torch")  # those that run the graph "mtp"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ValidateRequest:
    """What to validate. `text` None takes the text that ships with the package; threads 0 lets backends choose.

    No backends stand for those that suit the bundle. `layers` ("0-3,26") names the layers to compare, one in memory at
    a time; None compares the whole model. The reference reads its weights in the folder `checkpoint`, or in that of a
    name in Hugging Face's cache; None stands for the one that the manifest names. `independent` None runs transformers
    beside the reference where that is possible, True makes it an error where it is not, False leaves it out. `earlier`
    is a report.json to compare the new one with. max_kl (nats, of the mean) and max_perplexity_increase (percent) are
    what narrow weights may cost; None leaves that unjudged.
    """

    bundle: Path
    backends: tuple[str, ...] = ()
    text: Path | None = None
    seed: int = 0
    bisect: bool = False
    threads: int = 0
    command: str = ""
    layers: str | None = None
    checkpoint: Path | None = None
    independent: bool | None = None
    earlier: Path | None = None
    max_kl: float | None = None
    max_perplexity_increase: float | None = None

    def __post_init__(self) -> None:
        """Raises RequestError for threads that nobody can start, and a seed that draws nothing."""
        check_threads(self.threads)
        if self.seed < 0:
            raise RequestError(f"seed {self.seed}: must not be negative")
        for name, value in self.limits.items():
            if not (math.isfinite(value) and value >= 0):
                raise RequestError(f"{name} {value}: must be a number that is not negative")

    @property
    def limits(self) -> dict[str, float]:
        """What narrow weights may cost, by option."""
        given = {"--max-kl": self.max_kl, "--max-perplexity-increase": self.max_perplexity_increase}
        return {name: value for name, value in given.items() if value is not None}

    def chosen(self, known: Iterable[str], default: tuple[str, ...], refusal: str) -> tuple[str, ...]:
        """The backends to run, or `default`; RequestError, `refusal` with its name, where one is not `known`."""
        for name in self.backends:
            check_name(name)
            if name not in known:
                raise RequestError(refusal.format(name=name))
        return tuple(dict.fromkeys(self.backends or default))

    def check_whole(self) -> None:
        """Raise RequestError for options that follow a language model's logits through its layers."""
        given = [name for name in ("bisect", "layers") if getattr(self, name)]
        if given:
            raise RequestError(f"--{given[0]} is for bundles that generate: leave it out")


def check_name(backend: str) -> None:
    """Raise RequestError for a name that backends had before."""
    if backend == "ort-compiled":
        raise RequestError(f"backend {backend!r} is now 'ort'; the graphs as exported, once 'ort', are 'exported'")


def layers_of(layers: str, count: int) -> list[int]:
    """The layers that `layers` names ("0-3,26"), of a model with `count`; RequestError naming what is wrong with it."""
    chosen: set[int] = set()
    for piece in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        if match is None:
            raise RequestError(f"--layers {layers}: {piece!r} is no layer; name layers 0 to {count - 1}, as in 0-1,3")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise RequestError(f"--layers {layers}: {piece.strip()} runs backwards; write {last}-{first}")
        if last >= count:
            raise RequestError(f"--layers {layers}: there is no layer {last}; the bundle has layers 0 to {count - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)
