"""Metrics: counts of requests, shown on a board (tritonserver's /metrics) a few times a second."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

_log = logging.getLogger(__name__)

_EVERY = 0.1  # seconds: each change of a metric costs a message to the server
_AGAIN = 1.0  # seconds: gauges are set again, as a process that has since ended may have set them, too

RESULTS = ("ok", "invalid", "refused", "cancelled", "timeout", "failed")


@dataclass(frozen=True)
class MetricSpec:
    """One metric; it has a line for each of `values`, told apart by `label`, or one line without a label."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    buckets: tuple[float, ...] = ()
    label: str = ""
    values: tuple[str, ...] = ("",)


_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)

REQUESTS = MetricSpec("deepseek_trt_requests_total", "counter", "Requests by result", label="result", values=RESULTS)
INPUT_TOKENS = MetricSpec("deepseek_trt_input_tokens_total", "counter", "Tokens of the prompts")
OUTPUT_TOKENS = MetricSpec("deepseek_trt_output_tokens_total", "counter", "Tokens of the answers")
FIRST_TOKEN = MetricSpec(
    "deepseek_trt_time_to_first_token_seconds", "histogram", "From arrival to the first token", _FIRST
)
EACH_TOKEN = MetricSpec(
    "deepseek_trt_time_per_output_token_seconds", "histogram", "Of each answer, from its first token to its last", _EACH
)
BATCH_SIZE = MetricSpec("deepseek_trt_batch_size", "gauge", "Requests that own cache pages")
RUNNING = MetricSpec("deepseek_trt_running_requests", "gauge", "Requests that are computed")
QUEUED = MetricSpec("deepseek_trt_queued_requests", "gauge", "Requests taken that wait to be computed")
INFLIGHT = MetricSpec("deepseek_trt_inflight_requests", "gauge", "Requests taken and not ended, waiting ones counted")
PAGES_USED = MetricSpec("deepseek_trt_cache_pages_used", "gauge", "Cache pages owned by requests")
PAGES_FREE = MetricSpec("deepseek_trt_cache_pages_free", "gauge", "Cache pages that a request can get")
CACHE_USE = MetricSpec("deepseek_trt_cache_usage_ratio", "gauge", "Cache pages owned by requests, of all: 0 to 1")
ACCEPTING = MetricSpec("deepseek_trt_accepting", "gauge", "1 while one more request would be taken, else 0")
ENGINE_UP = MetricSpec("deepseek_trt_engine_up", "gauge", "0 once the engine has failed, else 1")
HEARTBEATS = MetricSpec(
    "deepseek_trt_heartbeats_total", "counter", "Steps of the engine, and seconds without one while it is idle"
)
PREEMPTIONS = MetricSpec("deepseek_trt_preemptions_total", "counter", "Requests put back for want of pages")
DECODED_TOKENS = MetricSpec("deepseek_trt_decoded_tokens_total", "counter", "Tokens that decode steps gave")
DRAFTED_TOKENS = MetricSpec("deepseek_trt_drafted_tokens_total", "counter", "Tokens proposed by speculation")
ACCEPTED_TOKENS = MetricSpec("deepseek_trt_accepted_tokens_total", "counter", "Proposed tokens that were picked")
CANCELLATIONS = MetricSpec("deepseek_trt_cancellations_total", "counter", "Requests whose client went away")

METRICS = (
    REQUESTS,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    FIRST_TOKEN,
    EACH_TOKEN,
    BATCH_SIZE,
    RUNNING,
    QUEUED,
    INFLIGHT,
    PAGES_USED,
    PAGES_FREE,
    CACHE_USE,
    ACCEPTING,
    ENGINE_UP,
    HEARTBEATS,
    PREEMPTIONS,
    DECODED_TOKENS,
    DRAFTED_TOKENS,
    ACCEPTED_TOKENS,
    CANCELLATIONS,
)


class Board(Protocol):
    """Where metrics are shown. One thread at a time."""

    def show(self, metric: MetricSpec, value: float, label: str = "") -> None:
        """Add `value` to a counter, set a gauge to it, or let a histogram observe it."""


@dataclass(frozen=True)
class Ended:
    """A request that is over. seconds_to_first_token is None without a token, seconds_per_output_token below two."""

    result: str
    input_tokens: int = 0
    output_tokens: int = 0
    seconds_to_first_token: float | None = None
    seconds_per_output_token: float | None = None


class Metrics:
    """Gathers ended requests, and shows them on the board when flushed. One thread at a time."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._ended: list[Ended] = []
        self._shown: dict[MetricSpec, float] = {PREEMPTIONS: 0}
        self._flushed = self._set_all = 0.0

    def ended(self, ended: Ended) -> None:
        self._ended.append(ended)

    def flush(self, now: float | None, held: Callable[[], Mapping[MetricSpec, float]]) -> None:
        """Show what is new: at once where `now` is None, else if the last time is _EVERY ago. Never raises.

        `held` gives what the service holds now, and of counters what they have come to since it began.
        """
        if now is not None and now - self._flushed < _EVERY:
            return
        self._flushed = now or self._flushed
        if self._flushed - self._set_all >= _AGAIN:
            self._set_all = self._flushed
            self._shown = {metric: value for metric, value in self._shown.items() if metric.kind == "counter"}
        ended, self._ended = self._ended, []
        try:
            self._show_ended(ended)
            self._show_held(held())
        except Exception:  # answers matter more
            _log.exception("metrics could not be handed on")

    def _show_ended(self, ended: list[Ended]) -> None:
        for result in RESULTS:
            self._add(REQUESTS, sum(each.result == result for each in ended), result)
        self._add(CANCELLATIONS, sum(each.result == "cancelled" for each in ended))
        self._add(INPUT_TOKENS, sum(each.input_tokens for each in ended))
        self._add(OUTPUT_TOKENS, sum(each.output_tokens for each in ended))
        for each in ended:
            if each.seconds_to_first_token is not None:
                self._board.show(FIRST_TOKEN, each.seconds_to_first_token)
            if each.seconds_per_output_token is not None:
                self._board.show(EACH_TOKEN, each.seconds_per_output_token)

    def _show_held(self, held: Mapping[MetricSpec, float]) -> None:
        for metric, value in held.items():
            before = self._shown.get(metric)
            if value != before:
                self._board.show(metric, value - (before or 0) if metric.kind == "counter" else value)
                self._shown[metric] = value

    def _add(self, metric: MetricSpec, value: float, label: str = "") -> None:
        if value:
            self._board.show(metric, value, label)
