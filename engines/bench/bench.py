"""Bench: how fast a bundle generates here, and how near that is to what memory bandwidth allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from deepseek_trt.engines.bench.bandwidth import copy_bandwidth, read_bandwidth
from deepseek_trt.engines.bench.roofline import decode_traffic, distinct_experts
from deepseek_trt.engines.generation.batching.limits import Counters, SchedulerLimits
from deepseek_trt.engines.generation.drafting.drafter import check_drafts
from deepseek_trt.engines.generation.pages import pages_needed
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.generation.speculation import OFF, check_speculate
from deepseek_trt.engines.sessions.huge_pages import Progress
from deepseek_trt.engines.sessions.opening import (
    AUTO,
    Choice,
    Opened,
    SessionRequest,
    check_generates,
    choose_backend,
    open_session,
)
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.engines.sessions.tensorrt.cuda import open_device
from deepseek_trt.engines.sessions.tensorrt.device import Device
from deepseek_trt.engines.sessions.threads import check_threads
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.proof import no_progress
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import RequestError
from deepseek_trt.plugins.cpu.library import ExpertsHit

Say = Callable[[str], None]
WARM_TOKENS = 3  # of a first run, which is not measured


@dataclass(frozen=True)
class BenchRequest:
    """context counts the tokens cached before the first decode step; threads 0 lets the backend choose."""

    bundle: Path
    backend: str = AUTO
    batch_sizes: tuple[int, ...] = (1,)
    context: int = 512
    new_tokens: int = 64
    threads: int = 0
    speculate: str = OFF

    def __post_init__(self) -> None:
        check_threads(self.threads)
        check_speculate(self.speculate)
        for name, least in (("context", 1), ("new_tokens", 3)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} {getattr(self, name)}: must be at least {least}")
        if min(self.batch_sizes) < 1:
            raise RequestError(f"batch_sizes {self.batch_sizes}: must be at least 1")


@dataclass(frozen=True)
class Point:
    """One batch size. Times are in seconds, sizes in bytes.

    time_to_first_token: from the request to the token, the mean of all rows. time_per_token: of decode steps with all
    rows and no prefill, each over the tokens that it gave a row: one, or with speculation tokens_a_step on average.
    acceptance: the share of proposed tokens that were picked, 0 without speculation. bytes_a_step: weights that every
    step reads, weights of the routed experts hit, cache; at the mean length. experts_hit: distinct routed experts of a
    layer in a step, the mean; `experts` says whether they were counted in these steps or are what equally likely
    experts would give. bandwidth_fraction: the sum of the bytes over the median step's time, as a share of the
    measured bandwidth.
    """

    batch_size: int
    context: int
    new_tokens: int
    tokens_per_second: float
    prefill_tokens_per_second: float
    time_to_first_token: float
    time_per_token: dict[str, float]
    bytes_a_step: dict[str, int]
    experts_hit: float
    experts: Literal["measured", "expected"]
    bandwidth_fraction: float
    tokens_a_step: float = 1.0
    acceptance: float = 0.0


@dataclass(frozen=True)
class BenchReport:
    """bandwidth is read on a CPU, read and written in a copy on a GPU, in bytes per second.

    narrow_formats are those of weights that are read in fewer bits, the others being read as weights_dtype.
    """

    bundle: str
    backend: str
    why: str
    note: str
    threads: int
    dtype: str
    weights_dtype: str
    narrow_formats: tuple[str, ...]
    bandwidth: float
    points: tuple[Point, ...]


def bench(request: BenchRequest, say: Say = lambda line: None, progress: Progress = no_progress) -> BenchReport:
    """Measure every batch size, greedy, on prompts of random tokens; `say` gets lines about what goes on, `progress`
    the bytes of weights that are loaded, and those in all.

    Raises RequestError where context and new tokens are more than the model or its engines take, BackendError where the
    model gives logits that are not finite.
    """
    bundle = Bundle.open(request.bundle)
    check_generates(bundle)
    check_drafts(bundle, request.speculate)
    longest = bundle.manifest.model.max_position_embeddings
    if request.context + request.new_tokens > longest:
        raise RequestError(
            f"context {request.context} and {request.new_tokens} new tokens: the model takes {longest} in all"
        )
    choice = choose_backend(bundle, request.backend)
    bandwidth = _bandwidth(choice, request.threads)
    pages = pages_needed(bundle.manifest.cache, [request.context + request.new_tokens] * max(request.batch_sizes))
    opened = open_session(SessionRequest(bundle, pages, request.threads, progress=progress), request.backend)
    say(opened.line)
    points = []
    for batch in request.batch_sizes:
        say(f"batch {batch}, context {request.context}, {request.new_tokens} new tokens per row")
        points.append(_point(opened, bundle, request, batch, bandwidth))
    session = opened.session
    return BenchReport(
        bundle=str(request.bundle),
        backend=session.backend,
        why=opened.choice.why,
        note=session.note,
        threads=request.threads,
        dtype=bundle.manifest.dtype,
        weights_dtype=session.weights_dtype,
        narrow_formats=() if _widens(session) else bundle.manifest.narrow_formats,
        bandwidth=bandwidth,
        points=tuple(points),
    )


def _widens(session: Session) -> bool:
    """Narrow weights lie in memory as float32: torch has no other way."""
    return session.backend == "torch"


@dataclass(frozen=True)
class _Times:
    """Seconds to each row's first token, and of every decode step that had all rows; the tokens that each such step
    gave a row; what all steps hit, if counted.
    """

    first: tuple[float, ...]
    steps: tuple[float, ...]
    tokens: tuple[float, ...]
    hit: ExpertsHit
    counters: Counters


def _point(opened: Opened, bundle: Bundle, request: BenchRequest, batch: int, bandwidth: float) -> Point:
    session, model = opened.session, bundle.manifest.model
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch, request.context)).tolist()
    _run(opened, bundle, prompts, WARM_TOKENS)
    times = _run(opened, bundle, prompts, request.new_tokens, request.speculate)
    mean_length = request.context + int(sum(times.tokens)) // 2
    measured = _experts_hit(model, times)
    hit = distinct_experts(model, batch) if measured is None else measured
    lengths = [mean_length] * batch
    traffic = decode_traffic(bundle.manifest, session.cache, lengths, session.weights_dtype, hit, _widens(session))
    each = np.array(times.steps) / times.tokens
    p50, p95, p99 = (float(np.quantile(each, q)) for q in (0.5, 0.95, 0.99))
    return Point(
        batch_size=batch,
        context=request.context,
        new_tokens=request.new_tokens,
        tokens_per_second=batch * sum(times.tokens) / sum(times.steps),
        prefill_tokens_per_second=batch * request.context / max(times.first),
        time_to_first_token=float(np.mean(times.first)),
        time_per_token={"p50": p50, "p95": p95, "p99": p99},
        bytes_a_step=traffic,
        experts_hit=hit,
        experts="expected" if measured is None else "measured",
        bandwidth_fraction=sum(traffic.values()) / float(np.median(times.steps)) / bandwidth,
        tokens_a_step=times.counters.tokens_a_step,
        acceptance=times.counters.acceptance,
    )


def _run(
    opened: Opened, bundle: Bundle, prompts: Sequence[Sequence[int]], new_tokens: int, speculate: str = OFF
) -> _Times:
    rows = len(prompts)
    scheduler = Scheduler(opened.session, bundle.manifest.model, SchedulerLimits.for_batch(rows, speculate))
    counters = scheduler.counters
    start = time.perf_counter()
    for prompt in prompts:
        scheduler.add(prompt, SamplingParams(new_tokens, ignore_eos=True))
    first: dict[int, float] = {}
    steps: list[float] = []
    tokens: list[float] = []
    hit_before = opened.session.experts_hit()
    while scheduler.busy:
        before, done = time.perf_counter(), replace(counters)
        events = scheduler.step()
        now = time.perf_counter()
        for event in events:
            if event.error is not None:
                raise event.error
            first.setdefault(event.request, now - start)
        made = counters.decoded - done.decoded
        if made - (counters.accepted - done.accepted) == rows and counters.prefilled == done.prefilled:
            steps.append(now - before)
            tokens.append(made / rows)
    layers, experts = (after - before for after, before in zip(opened.session.experts_hit(), hit_before, strict=True))
    return _Times(tuple(first.values()), tuple(steps), tuple(tokens), ExpertsHit(layers, experts), counters)


def _experts_hit(model: ModelConfig, times: _Times) -> float | None:
    """Distinct experts of a layer in a step, the mean; None unless every such layer of every timed step was counted."""
    layers = len(times.steps) * sum(map(model.is_moe_layer, range(model.num_hidden_layers)))
    return times.hit.experts / layers if layers and times.hit.layers == layers else None


def _bandwidth(choice: Choice, threads: int, make_device: Callable[[], Device] = open_device) -> float:
    """The bandwidth of the device that computes, measured before the session takes the memory."""
    if choice.device == "cpu":
        return read_bandwidth(threads)
    device = make_device()
    device.activate()
    try:
        return copy_bandwidth(device)
    finally:
        device.close()
