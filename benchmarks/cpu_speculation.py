"""What prompt lookup gives on a CPU: tokens/s against decode without proposals, on prompts of several kinds.

    python benchmarks/cpu_speculation.py [--bundle BUNDLE] [--threads 1 2] [--rows 1 8] [--tokens 128] [--rounds 7]

The model that ships, exported to a temporary folder, unless a bundle is named. Every kind of prompt is answered in
every way by turns, in one process, and the ways take turns in going first; all give the same answers, or nothing is
printed. Only steps without prefill are timed. Ratios are medians over the rounds of the ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampling import shipped_bundle

from deepseek_trt.engines.generation import sampling as sampled
from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.generation.speculation import AUTO, LOOKUP, OFF
from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle

WAYS = (OFF, LOOKUP, AUTO)
_WORDS = ("file", "path", "name", "key", "list", "string", "object", "module")  # one a row, so that rows differ
_PASSAGE = (
    "Return the {0} of the given argument. If the {0} does not exist, a new one is made with the default value, "
    "and the second argument is returned as it is.\n\n"
)


@dataclass(frozen=True)
class Kind:
    """A kind of prompt, made of a row's word, and how its answer is sampled; temperature 0 is greedy."""

    name: str
    prompt: Callable[[str], str]
    temperature: float = 0.0

    def params(self, row: int, tokens: int) -> SamplingParams:
        return SamplingParams(tokens, temperature=self.temperature, seed=row, ignore_eos=True)


def _list(word: str) -> str:
    others = ("size", "type", "value", "number", "index", "class")
    return "".join(f"- Return the {other} of the {word}.\n" for other in others)


def _fields(word: str) -> str:
    return "".join(f'{{"{word}": "{word}{at}", "default": None, "type": "str"}}\n' for at in range(8))


KINDS = (
    Kind("one line over and over", lambda word: f"Return the {word} as a string.\n" * 10),
    Kind("a list that goes on", _list),
    Kind("records with the same fields", _fields),
    Kind("a passage that begins again", lambda word: 2 * _PASSAGE.format(word) + f"Return the {word}"),
    Kind("a passage that begins again, temperature 0.8", lambda word: 2 * _PASSAGE.format(word), 0.8),
    Kind("nothing that repeats", lambda word: f"The {word} of"),
    Kind("nothing that repeats, temperature 1", lambda word: f"The {word} of", 1.0),
)


@dataclass(frozen=True)
class Measured:
    """Of all steps without prefill of one run: tokens, seconds, those of them in the model and in sampling, and steps.

    proposed, picked: tokens that were drafted, and those of them that the model's own choice was.
    """

    tokens: int
    seconds: float
    model: float
    sampling: float
    steps: int
    proposed: int
    picked: int

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Watch:
    """Adds up the seconds that a function takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


class Bench:
    """One session, and a scheduler for each kind, number of rows and way, which goes on from round to round."""

    def __init__(self, bundle: Bundle, threads: int, most_rows: int, tokens: int) -> None:
        """A prompt has at most 512 tokens."""
        self._model, self._text, self._tokens = bundle.manifest.model, Text(bundle), tokens
        pages = 1 + most_rows * bundle.manifest.cache.pages_for(512 + tokens)
        self.session, self.decode, self.sampling = OrtSession(bundle, pages, threads), Watch(), Watch()
        self.session.decode = self.decode.around(self.session.decode)  # type: ignore[method-assign]
        self._schedulers: dict[tuple[Kind, int, str], Scheduler] = {}

    def run(self, kind: Kind, rows: int, way: str) -> tuple[Measured, list[list[int]]]:
        """What was measured, and the answers."""
        limits = SchedulerLimits(rows, max(8 * rows, 512), prefix_reuse=False, speculate=way)
        scheduler = self._schedulers.setdefault((kind, rows, way), Scheduler(self.session, self._model, limits))
        answers: dict[int, list[int]] = {}
        for row in range(rows):
            prompt = self._text.encode(kind.prompt(_WORDS[row % len(_WORDS)]))[:512]
            answers[scheduler.add(prompt, kind.params(row, self._tokens))] = []
        plain, sampled.sample_rows = sampled.sample_rows, self.sampling.around(sampled.sample_rows)
        try:
            return self._run(scheduler, answers), list(answers.values())
        finally:
            sampled.sample_rows = plain

    def _run(self, scheduler: Scheduler, answers: dict[int, list[int]]) -> Measured:
        counters, parts = scheduler.counters, []
        while scheduler.busy:
            prefilled, proposed, picked = counters.prefilled, counters.drafted, counters.accepted
            start, model, sampling = time.perf_counter(), self.decode.seconds, self.sampling.seconds
            events = scheduler.step()
            seconds = time.perf_counter() - start
            for event in events:
                answers[event.request].append(event.token)
            if counters.prefilled == prefilled:
                inside = self.decode.seconds - model, self.sampling.seconds - sampling
                drafts = counters.drafted - proposed, counters.accepted - picked
                parts.append((len(events), seconds, *inside, 1, *drafts))
        return Measured(*map(sum, zip(*parts, strict=True)))


Results = dict[tuple[Kind, int, str], list[Measured]]


def measure(bench: Bench, rows: Sequence[int], rounds: int, kinds: Sequence[Kind] = KINDS) -> Results:
    """`rounds` rounds after one to warm up. Exits where a way gives another answer than `off`."""
    results: Results = {}
    for number in range(rounds + 1):
        first = number % len(WAYS)
        for kind in kinds:
            for count in rows:
                answers = {}
                for way in WAYS[first:] + WAYS[:first]:
                    found, answers[way] = bench.run(kind, count, way)
                    if number:
                        results.setdefault((kind, count, way), []).append(found)
                wrong = [way for way, given in answers.items() if given != answers[OFF]]
                if wrong:
                    sys.exit(f"{kind.name}, {count} rows: {wrong} gave other answers than off")
    return results


def speeds_table(results: Results) -> str:
    """tokens/s of off and lookup, and what lookup and auto give of off's."""
    lines = [
        "| prompt | rows | off, tokens/s | lookup, tokens/s | lookup / off | auto / off | tokens a step | picked |"
    ]
    lines.append("|---" * 8 + "|")
    for kind, rows in dict.fromkeys((kind, rows) for kind, rows, _ in results):
        off, lookup, auto = (results[kind, rows, way] for way in WAYS)
        medians = (f"{statistics.median(one.speed for one in found):,.0f}" for found in (off, lookup))
        ratios = (f"{_ratio(found, off):.2f}" for found in (lookup, auto))
        one = lookup[-1]  # the same in every round
        step = f"{one.tokens / (one.tokens - one.picked):.2f} | {one.picked / max(one.proposed, 1):.0%}"
        lines.append(f"| {kind.name} | {rows} | {' | '.join(medians)} | {' | '.join(ratios)} | {step} |")
    return "\n".join(lines)


def shares_table(results: Results) -> str:
    """Where a decode step's time goes, all kinds of prompts together."""
    lines = ["| rows | way | a step, ms | in the model | in sampling | beside them |", "|---" * 6 + "|"]
    for rows, way in sorted({key[1:] for key in results}, key=lambda key: (key[0], WAYS.index(key[1]))):
        rounds = zip(*(found for key, found in results.items() if key[1:] == (rows, way)), strict=True)
        each = [_shares(kinds) for kinds in rounds]
        step, model, sampling = (statistics.median(column) for column in zip(*each, strict=True))
        shares = f"{model:.1%} | {sampling:.1%} | {1 - model - sampling:.1%}"
        lines.append(f"| {rows} | {way} | {1e3 * step:.2f} | {shares} |")
    return "\n".join(lines)


def _shares(found: Sequence[Measured]) -> tuple[float, float, float]:
    """Seconds a step, and of them the shares of the model and of sampling."""
    seconds = sum(one.seconds for one in found)
    parts = (sum(one.model for one in found) / seconds, sum(one.sampling for one in found) / seconds)
    return seconds / sum(one.steps for one in found), *parts


def _ratio(found: Sequence[Measured], off: Sequence[Measured]) -> float:
    return statistics.median(mine.speed / plain.speed for mine, plain in zip(found, off, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the model that ships, exported to a temporary folder")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(given.bundle) if given.bundle else shipped_bundle(Path(folder))
        for threads in given.threads:
            bench = Bench(bundle, threads, max(given.rows), given.tokens)
            results = measure(bench, given.rows, given.rounds)
            print(f"{threads} thread{'s' * (threads > 1)}, {given.tokens} tokens an answer, {given.rounds} rounds\n")
            print(f"{speeds_table(results)}\n\n{shares_table(results)}\n", flush=True)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"{processor[1] if processor else 'unknown processor'}, {os.cpu_count()} processors, {platform.release()}")


if __name__ == "__main__":
    main()
