"""The runtime's half of benchmarks/soak.py, a process of its own: rounds of random callers, each over a new LLM.

    python benchmarks/soak_runtime.py BUNDLE --seconds 30

Prints counts, memory and what was left as JSON; each round is told on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.export.errors import RequestError

ROUND_SECONDS = 4.0
SETTLED_SECONDS = 10.0  # a step takes milliseconds: what is held longer is lost
THREADS, TASKS = 4, 8
WORDS = ("the", "number", "of", "return", "a", "list", "if", "file", "does", "not", "exist")
KNOWN = ("Return the number of", "If the file", "the list of names")  # whose greedy answers are looked at each time
BAD: tuple[Callable[[LLM], object], ...] = (
    lambda llm: llm.generate([[]]),
    lambda llm: llm.generate([[10**9]]),
    lambda llm: llm.generate(["word " * 10_000]),
    lambda llm: llm.generate(["The"], SamplingParams(temperature=float("nan"))),
    lambda llm: llm.generate(["The"], SamplingParams(seed=1.5)),  # type: ignore[arg-type]
    lambda llm: llm.generate(["The"], SamplingParams(stop_token_ids=(10**6,))),
    lambda llm: llm.generate(["The"], SamplingParams(stop=["x"] * 1000)),  # type: ignore[arg-type]
)


class Round:
    """Callers of all kinds over one LLM until `deadline`; `found` counts what came of them."""

    def __init__(self, llm: LLM, wanted: dict[str, tuple[int, ...]], deadline: float, seed: int) -> None:
        self.llm, self.wanted, self.deadline = llm, wanted, deadline
        self.found: Counter[str] = Counter()
        self.seed = seed

    def run(self) -> None:
        threads = [threading.Thread(target=self._thread, args=(self.seed * 100 + i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        asyncio.run(self._tasks())
        for thread in threads:
            thread.join()

    def _thread(self, seed: int) -> None:
        draw = random.Random(seed)
        acts = (self._generate, self._known, self._leave, self._bad)
        while time.monotonic() < self.deadline:
            self._count(lambda: draw.choice(acts)(draw))

    def _count(self, act: Callable[[], str]) -> None:
        try:
            self.found[act()] += 1
        except Exception as error:
            self.found[f"wrong: {type(error).__name__}: {error}"[:200]] += 1

    def _generate(self, draw: random.Random) -> str:
        results = self.llm.generate([_prompt(draw) for _ in range(draw.randint(1, 4))], _params(draw))
        return "whole" if all(result.finish_reason in ("stop", "length") for result in results) else "wrong: no reason"

    def _known(self, draw: random.Random) -> str:
        prompt = draw.choice(KNOWN)
        (result,) = self.llm.generate([prompt], SamplingParams(24))
        return "known" if tuple(result.token_ids) == self.wanted[prompt] else f"wrong: another answer to {prompt!r}"

    def _leave(self, draw: random.Random) -> str:
        with contextlib.closing(self.llm.stream(_prompt(draw), _params(draw))) as pieces:
            for _, _piece in zip(range(draw.randint(0, 8)), pieces, strict=False):
                pass
        return "left"

    def _bad(self, draw: random.Random) -> str:
        try:
            draw.choice(BAD)(self.llm)
        except RequestError:
            return "refused"
        return "wrong: a bad request was answered"

    async def _tasks(self) -> None:
        await asyncio.gather(*(self._task(self.seed * 1000 + i) for i in range(TASKS)))

    async def _task(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.deadline:
            asked = asyncio.ensure_future(self.llm.agenerate([_prompt(draw)], _params(draw)))
            if draw.random() < 0.3:
                await asyncio.sleep(draw.random() * 0.05)
                asked.cancel()
            (came,) = await asyncio.gather(asked, return_exceptions=True)
            cancelled = isinstance(came, asyncio.CancelledError)
            self.found["cancelled" if cancelled else "awaited" if isinstance(came, list) else f"wrong: {came!r}"] += 1


def _prompt(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 120)))


def _params(draw: random.Random) -> SamplingParams:
    penalised = draw.random() < 0.3
    return SamplingParams(
        draw.randint(1, 60),
        temperature=draw.choice((0.0, 0.8, 1.5)),
        top_k=draw.choice((0, 5, 50)),
        top_p=draw.choice((1.0, 0.9)),
        seed=draw.randrange(2**31),
        repetition_penalty=1.2 if penalised else 1.0,
        stop=draw.choice(((), ("the",), ("number of", "\n\n"))),
        logprobs=draw.choice((None, 0, 3)),
    )


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def _held(llm: LLM) -> tuple[int, int]:
    """Requests that run and pages that are taken, once the last caller's leaving took effect: with the next step."""
    end = time.monotonic() + SETTLED_SECONDS
    while True:
        pool = llm.scheduler.pool
        held = llm.scheduler.running, pool.pages - 1 - pool.free
        if not any(held) or time.monotonic() > end:
            return held
        time.sleep(0.01)


def soak(bundle: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Counts of outcomes; memory after each round in MB; and what any round left."""
    limits = SchedulerLimits(max_running=8, token_budget=256, prefill_chunk=64)
    with LLM.open(bundle, threads=1, limits=limits, pages=80) as llm:
        wanted = {prompt: tuple(llm.generate([prompt], SamplingParams(24))[0].token_ids) for prompt in KNOWN}
    end, found, memory, left = time.monotonic() + seconds, Counter[str](), [], Counter[str]()
    threads = threading.active_count()
    while time.monotonic() < end:
        with LLM.open(bundle, threads=1, limits=limits, pages=80) as llm:
            one = Round(llm, wanted, min(end, time.monotonic() + ROUND_SECONDS), seed)
            one.run()
            requests, pages = _held(llm)
            left["requests"] += requests
            left["pages"] += pages
        left["threads"] += threading.active_count() - threads
        found += one.found
        memory.append(resident_mb())
        seed += 1
        print(f"runtime, round {len(memory)}: {memory[-1]:.0f} MB, {dict(one.found)}", file=sys.stderr, flush=True)
    return {"found": dict(found), "memory": memory, "left": dict(left)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(soak(given.bundle, given.seconds, given.seed)))
