"""deepseek-trt as a runner of cpu.py: a scheduler over the ONNX Runtime session, as `generate` and `serve` use it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cpu_point import (
    Files,
    Floats,
    Job,
    Point,
    difference,
    divergence,
    measure,
    peak_memory,
    reset_peak_memory,
    serve,
)

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.pages import page_table
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.sessions.opening import BACKENDS, SessionRequest
from deepseek_trt.engines.sessions.session import Session, row_latents
from deepseek_trt.export.arrays import Int32s, Int64s
from deepseek_trt.export.bundle.folder import Bundle

# Every repeat of a prompt is computed; all prompts of a batch are prefilled in one step, and decode together.
_LIMITS = SchedulerLimits(prefix_reuse=False, token_budget=4096)
_SERVED = SchedulerLimits(prefix_reuse=False)  # as serve has it
_BESIDE = 128  # tokens of the prompts of those that decode
_LONG = SamplingParams(max_new_tokens=2000, ignore_eos=True)
_PAGES = 161  # 10,240 tokens; the same for all points
_ANSWER = 80  # tokens at most
_GREEDY = SamplingParams(max_new_tokens=_ANSWER, ignore_eos=True)


class Restored(Session):
    """A session that copies the latents of known prompts into its pages where it is asked to prefill them.

    The scheduler does all that it does after a prefill. Its answer begins with the prompt's next token, so that the
    first decode computes what the reference did.
    """

    def __init__(self, session: Session, prompts: Int64s, latents: npt.NDArray[np.float32]) -> None:
        """Shapes: prompts [rows, length], latents [layers, rows, length - 1, D]."""
        self.backend, self.note, self.cache, self.pages = session.backend, session.note, session.cache, session.pages
        self.library = session.library  # the compiled sampler is there
        self.decoded = np.empty(0, np.float32)
        self._session, self._prompts, self._latents = session, prompts, latents
        self._vocab = int(prompts.max()) + 1

    def pool(self, layer: int) -> npt.NDArray[Any]:
        return self._session.pool(layer)

    def prefill(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, table: Int32s) -> Floats:
        logits = np.zeros((len(input_ids), self._vocab), np.float32)
        for index, (ids, count, past) in enumerate(zip(input_ids, sequence_lengths, past_lengths, strict=True)):
            end = past + count
            (row,) = np.flatnonzero((self._prompts[:, past:end] == ids[:count]).all(axis=1))
            pages, slots = table[index, np.arange(past, end) // self.cache.page_size], np.arange(past, end)
            for layer, latents in enumerate(self._latents):
                self.pool(layer)[pages, slots % self.cache.page_size] = latents[row, past:end]
            logits[index, self._prompts[row, end]] = 1
        return logits

    def decode(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, table: Int32s) -> Floats:
        logits = self._session.decode(input_ids, sequence_lengths, past_lengths, table)
        self.decoded = logits[:, -1]
        return logits


def open_session(path: Path, threads: int) -> tuple[Session, Bundle]:
    bundle = Bundle.open(path)
    return BACKENDS["ort"](SessionRequest(bundle, _PAGES, threads)), bundle


def fill(files: Files, job: Job) -> None:
    session, _ = open_session(files.bundle(job.form), job.threads)
    for batch, contexts in job.contexts.items():
        length = max(contexts) - 1
        prompts, kept = files.prompts(int(batch), length), []
        pages = list(range(1, session.cache.pages_for(length) + 1))
        for prompt in prompts:
            for begin in range(0, length, _LIMITS.prefill_chunk):
                ids = prompt[None, begin : begin + _LIMITS.prefill_chunk]
                session.prefill(ids, np.int32([ids.shape[1]]), np.int32([begin]), page_table([pages]))
            layers = range(session.cache.layers)
            kept.append(np.stack([row_latents(session, layer, np.int32(pages), length) for layer in layers]))
        np.save(files.state(job.runner, int(batch)), np.stack(kept, axis=1))


def run(files: Files, job: Job, point: Point) -> dict[str, Any]:
    begin = time.perf_counter()
    session, bundle = open_session(files.bundle(job.form), point.threads)
    facts: dict[str, Any] = {"load_s": time.perf_counter() - begin, "note": session.note, "error": 0.0}
    prompts = files.prompts(1 if point.kind == "beside" else point.batch, point.context)
    if point.kind == "quality":
        return {**facts, "ms": [], **divergence(files, point, _ends(session, prompts))}
    if point.kind == "beside":
        return {**facts, **_beside(session, bundle, prompts, files.prompts(point.batch, _BESIDE))}
    before = reset_peak_memory()
    logits, times = (
        _prefill(session, bundle, prompts) if point.kind == "prefill" else _decode(files, job, session, bundle, prompts)
    )
    return {**facts, "error": difference(files, point, logits), "ms": times, "grown_mb": peak_memory() - before}


def _ends(session: Session, prompts: Int64s) -> Floats:
    """Logits [rows, vocab] of the last token of each prompt; one after the other, in the same pages."""
    count, none = np.int32([prompts.shape[1]]), np.int32([0])
    table = page_table([list(range(1, session.cache.pages_for(prompts.shape[1]) + 1))])
    return np.concatenate([session.prefill(prompt[None], count, none, table) for prompt in prompts])


def _beside(session: Session, bundle: Bundle, prompts: Int64s, others: Int64s) -> dict[str, Any]:
    """Milliseconds until a prompt's first token while others decode, and the longest that these then wait."""
    times, waits = [], []

    def once() -> None:
        scheduler = Scheduler(session, bundle.manifest.model, _SERVED)
        waiting = {scheduler.add(prompt, _LONG) for prompt in others.tolist()}
        while waiting:
            waiting -= {event.request for event in scheduler.step()}
        waiting = {scheduler.add(prompts[0].tolist(), SamplingParams(max_new_tokens=1, ignore_eos=True))}
        begin, longest = time.perf_counter(), 0.0
        while waiting:
            step = time.perf_counter()
            waiting -= {event.request for event in scheduler.step()}
            longest = max(longest, time.perf_counter() - step)
        times.append(1e3 * (time.perf_counter() - begin))
        waits.append(1e3 * longest)

    for _ in range(2):  # the first warms up
        once()
    return {"ms": times[1:], "wait_ms": waits[1]}


def _prefill(session: Session, bundle: Bundle, prompts: Int64s) -> tuple[Floats, list[float]]:
    made: list[Floats] = []
    compute = session.prefill

    def prefill(*args: Any) -> Floats:
        made.append(compute(*args))
        return made[-1]

    session.prefill = prefill  # type: ignore[method-assign]
    scheduler = Scheduler(session, bundle.manifest.model, _LIMITS)
    once = SamplingParams(max_new_tokens=1)

    def step() -> None:
        for prompt in prompts.tolist():
            scheduler.add(prompt, once)
        while scheduler.busy:
            scheduler.step()

    times = measure(step)
    return made[-1], times


def _decode(files: Files, job: Job, session: Session, bundle: Bundle, prompts: Int64s) -> tuple[Floats, list[float]]:
    latents = np.load(files.state(job.runner, len(prompts)), mmap_mode="r")
    restored = Restored(session, prompts, latents)
    scheduler = Scheduler(restored, bundle.manifest.model, _LIMITS)
    for prompt in prompts[:, :-1].tolist():
        scheduler.add(prompt, _GREEDY)
    while not restored.decoded.size:
        scheduler.step()
    first = restored.decoded
    return first, measure(scheduler.step, most=_ANSWER - 10)


if __name__ == "__main__":
    serve(fill, run)
