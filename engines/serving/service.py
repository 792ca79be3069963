"""Service: requests in, answers out, over one LLM: readers read requests, an engine thread computes, one thread sends.

Only the sending thread sends, polls and counts: tritonserver's metrics cannot be used from two threads at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from deepseek_trt.engines.generation.answer import Answer
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.request import Event
from deepseek_trt.engines.serving import metrics as m
from deepseek_trt.engines.serving.names.reading import ModelIds, Tensors
from deepseek_trt.engines.serving.request import GenerateRequest, parse_request
from deepseek_trt.engines.serving.stream import Channel, Failure, Response, Stream
from deepseek_trt.export.errors import BackendError, DeepseekTrtError

_log = logging.getLogger(__name__)

_UNLOADING = "the model is being unloaded: ask again when it is loaded"
_TICK = 0.02  # seconds between looks at who has gone or run out of time
_REST = 2  # times as long as a round of sending took
_POLL_AFTER = 0.06  # seconds from one question to a channel to the next: below 100 ms with the tick
_ASK_AFTER = 0.5  # seconds from one question to the host to the next
_FULL = "{} requests are in flight, the most allowed: try again later"
_READERS = 2  # threads that read requests: a long prompt, or a slow template, holds up one of them
_LONGEST_REASON = 1000  # characters of a refusal


class Host(Protocol):
    """The server around the service. Only the sending thread calls it."""

    def wants_model(self) -> bool:
        """False once the model is being unloaded."""

    def engine_failed(self, reason: str) -> None:
        """Every request has been told, and none will be taken any more."""

    def flush(self) -> None:
        """A round of responses has been handed to channels: whoever gathers them sends them now."""


class Service:
    """Takes up to `max_inflight` requests at once. Every request gets exactly one final response, whatever happens.

    The sending thread rests twice as long as each round of sending took: the interpreter is the engine's most of the
    time, and with many streams more tokens go into one response.

    `accept`, `refuse` and `close` belong to tritonserver's thread; the first two return at once. Once the host does not
    want the model any more, or at close, nothing is taken, and what still runs after `drain_seconds` is ended with an
    error.
    """

    def __init__(self, llm: LLM, max_inflight: int, drain_seconds: float, metrics: m.Metrics, host: Host) -> None:
        if llm.text is None:
            raise BackendError("the bundle has no tokenizer.json: export a checkpoint that has one")
        self._llm, self._text = llm, llm.text
        self._ids = ModelIds(tuple(llm.config.eos_token_ids), llm.config.pad_token_id)
        self._max_inflight, self._drain_seconds = max_inflight, drain_seconds
        self._metrics, self._host = metrics, host
        self._admission = threading.Lock()  # guards the four below
        self._live: set[Stream] = set()  # have not had their final response
        self._reading: set[Channel] = set()  # of requests that are taken, and not live yet
        self._closed = ""  # why nothing is taken any more
        self._abort_at = math.inf  # when what is live is ended with an error
        self._failure = ""  # of the engine, to be told to the host
        self._ready: deque[Stream] = deque()  # with something to send
        self._refused: deque[tuple[Channel, Failure]] = deque()
        self._readers = ThreadPoolExecutor(_READERS, "deepseek-trt-reader")
        self._wake = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="deepseek-trt-sender", daemon=True)
        self._thread.start()
        llm.start(self._engine_failed)

    def accept(
        self, channel: Channel, tensors: Tensors, parameters: Mapping[str, Any] | None = None, timeout_us: int = 0
    ) -> None:
        """Start answering, or have an error sent; returns at once. Nobody else may change the tensors."""
        arrived = time.perf_counter()

        def parsed() -> tuple[GenerateRequest, Answer]:
            request = parse_request(tensors, parameters or {}, self._text, timeout_us, self._llm.defaults, self._ids)
            return request, Answer(self._text, request.params)

        if self._admits(channel):
            self._readers.submit(self._read, channel, parsed, arrived)

    def take(self, channel: Channel, parsed: Callable[[], tuple[GenerateRequest, Answer]]) -> Stream | None:
        """Start answering what `parsed` gives, in this thread; None, and an error sent, where that cannot be."""
        arrived = time.perf_counter()
        return self._read(channel, parsed, arrived) if self._admits(channel) else None

    def leave(self, stream: Stream, used: int | None) -> None:
        """End an answer that nobody wants more of: `used` of its tokens were, None where nobody waits any more.

        Any thread may call it; pages are free before the engine's next step.
        """
        ticket = stream.ticket
        stream.leave(used)
        if ticket is not None:
            self._llm.cancel(ticket)
        self._ready.append(stream)
        self._wake.set()

    def refuse(self, channel: Channel, failure: Failure) -> None:
        """Have this sent as the only response."""
        if len(failure.message) > _LONGEST_REASON:
            failure = dataclasses.replace(failure, message=f"{failure.message[: _LONGEST_REASON - 3]}...")
        self._refused.append((channel, failure))
        self._wake.set()

    def close(self) -> None:
        """Returns when every request has had its final response and the threads have ended."""
        self._shut(_UNLOADING, self._drain_seconds)
        while self._live or self._reading:
            time.sleep(0.005)
        self._readers.shutdown()
        self._stop = True
        self._wake.set()
        self._thread.join()
        self._llm.close()

    def _admits(self, channel: Channel) -> bool:
        """Make room for one more request, or refuse it."""
        with self._admission:
            refusal, full = self._closed, len(self._live) + len(self._reading) >= self._max_inflight
            if not refusal and not full:
                self._reading.add(channel)
                return True
        self.refuse(channel, Failure("refused", refusal or _FULL.format(self._max_inflight), full=not refusal))
        return False

    def _read(
        self, channel: Channel, parsed: Callable[[], tuple[GenerateRequest, Answer]], arrived: float
    ) -> Stream | None:
        """From what was sent to a request that the engine has, or to an error."""
        try:
            stream = Stream(channel, *parsed(), arrived)
            self._submit(stream)
            return stream
        except DeepseekTrtError as error:
            self.refuse(channel, Failure("invalid", str(error)))
        except _RefusedError as error:
            self.refuse(channel, Failure("refused", str(error)))
        except Exception as error:  # a bug: the one who asked must not wait for ever
            _log.exception("a request could not be taken")
            self.refuse(channel, Failure("failed", f"{type(error).__name__}: {error}"))
        finally:
            with self._admission:
                self._reading.discard(channel)
        return None

    def _submit(self, stream: Stream) -> None:
        with self._admission:
            if self._closed:
                raise _RefusedError(self._closed)
            self._reading.discard(stream.channel)  # or it would count twice for a moment
            self._live.add(stream)

        def put(event: Event | Exception) -> None:
            stream.put(event)
            if not stream.queued:
                stream.queued = True
                self._ready.append(stream)
                if not self._wake.is_set():
                    self._wake.set()

        try:
            stream.ticket = self._llm.submit(stream.request.prompt_ids, stream.request.params, put)
        except BaseException:
            with self._admission:
                self._live.discard(stream)
            raise

    def _engine_failed(self, error: Exception) -> None:
        """In the engine's thread, after every request got the error."""
        reason = f"the engine has failed ({type(error).__name__}: {error}): load the model again"
        _log.error(reason, exc_info=error)
        self._shut(reason, drain_seconds=0)
        self._failure = reason
        self._wake.set()

    def _shut(self, reason: str, drain_seconds: float) -> None:
        with self._admission:
            self._closed = self._closed or reason
            self._abort_at = min(self._abort_at, time.perf_counter() + drain_seconds)

    def _run(self) -> None:
        looked = asked = 0.0
        while not self._stop or self._refused:
            self._wake.wait(_TICK if self._live else 5 * _TICK)
            self._wake.clear()
            begin = time.perf_counter()
            self._send_ready()
            self._host.flush()
            now = time.perf_counter()
            time.sleep(min(_REST * (now - begin), _TICK))
            if now - looked >= _TICK:
                looked = now
                for stream in tuple(self._live):
                    self._guard(stream, self._poll)
                self._host.flush()
                self._metrics.flush(now, self._held)
            if now - asked >= _ASK_AFTER or self._failure:
                asked = now
                self._talk_to_host()
        self._metrics.flush(None, self._held)

    def _send_ready(self) -> None:
        """Send everything that is there now; what comes meanwhile is for the next round."""
        for _ in range(len(self._refused)):
            channel, failure = self._refused.popleft()
            self._send(channel, failure, final=True)
            self._metrics.ended(m.Ended(failure.kind))
        for _ in range(len(self._ready)):
            self._guard(self._ready.popleft(), self._advance)
        if self._ready:
            self._wake.set()

    def _talk_to_host(self) -> None:
        failure, self._failure = self._failure, ""
        try:
            if failure:
                self._host.engine_failed(failure)
            elif self._live and not self._closed and not self._host.wants_model():
                self._shut(_UNLOADING, self._drain_seconds)
        except Exception:  # the server cannot say: answers go on
            _log.exception("the server could not be asked about the model")

    def _guard(self, stream: Stream, work: Callable[[Stream], None]) -> None:
        """Do `work`; an exception ends this request and no other."""
        try:
            work(stream)
        except Exception as error:
            _log.exception("a request has failed")
            self._finish(stream, Failure("failed", f"{type(error).__name__}: {error}"))

    def _advance(self, stream: Stream) -> None:
        if stream not in self._live:
            return
        if stream.ticket is None:  # the thread that took the request has not come to it yet
            self._ready.append(stream)
            return
        if stream.left is not None:
            self._finish(stream, stream.end())
            return
        stream.queued = False  # before taking, so that what comes meanwhile is told of
        response = stream.take()
        if isinstance(response, Failure) or (response and response.finish_reason):
            self._finish(stream, response)
        elif response:
            self._send(stream.channel, response, final=False)

    def _poll(self, stream: Stream) -> None:
        failure = self._reason_to_end(stream, time.perf_counter()) if stream.ticket else None
        if failure:
            self._finish(stream, failure)

    def _reason_to_end(self, stream: Stream, now: float) -> Failure | None:
        if now >= self._abort_at:
            return Failure("failed", f"after {stream.made} tokens: {self._closed}")
        if stream.deadline is not None and now >= stream.deadline:
            return Failure("timeout", f"timeout_ms {stream.request.timeout_ms}: passed after {stream.made} tokens")
        if now - stream.polled < _POLL_AFTER:
            return None
        stream.polled = now
        if stream.channel.is_cancelled():
            return Failure("cancelled", f"the request was cancelled after {stream.made} tokens")
        return None

    def _finish(self, stream: Stream, response: Response | Failure) -> None:
        """Send the final response; the request is over even where it cannot be sent."""
        try:
            if stream.ticket:  # has ended, unless with a failure or a stop string
                self._llm.cancel(stream.ticket)
            self._send(stream.channel, response, final=True)
        finally:
            with self._admission:
                self._live.discard(stream)
            stream.ticket = None  # it leads back to the stream: shared memory would wait for the garbage collector
            self._metrics.ended(_ended(stream, response))

    def _send(self, channel: Channel, response: Response | Failure, final: bool) -> None:
        """Send, or send an empty final response where that fails: the client must not wait for ever."""
        try:
            channel.send(response, final)
        except Exception:
            if not final:
                raise
            _log.exception("a final response could not be sent")
            with contextlib.suppress(Exception):
                channel.send(None, final=True)

    def _held(self) -> dict[m.MetricSpec, float]:
        scheduler = self._llm.scheduler
        free, pages, running = scheduler.pool.free, scheduler.pool.pages - 1, scheduler.running
        taken = len(self._live) + len(self._reading)
        return {
            m.HEARTBEATS: self._llm.beats,
            m.ENGINE_UP: int(not self._failure),
            m.ACCEPTING: int(not self._closed and taken < self._max_inflight),
            m.PREEMPTIONS: scheduler.counters.preemptions,
            m.DECODED_TOKENS: scheduler.counters.decoded,
            m.DRAFTED_TOKENS: scheduler.counters.drafted,
            m.ACCEPTED_TOKENS: scheduler.counters.accepted,
            m.BATCH_SIZE: running,
            m.RUNNING: running,
            m.QUEUED: max(taken - running, 0),
            m.INFLIGHT: taken,
            m.PAGES_USED: pages - free,
            m.PAGES_FREE: free,
            m.CACHE_USE: (pages - free) / pages,
        }


class _RefusedError(Exception):
    """The service takes no request now, right as this one may be."""


def _ended(stream: Stream, response: Response | Failure) -> m.Ended:
    first, more = stream.first_token, stream.made - 1
    return m.Ended(
        response.kind if isinstance(response, Failure) else "ok",
        input_tokens=len(stream.request.prompt_ids),
        output_tokens=stream.made,
        seconds_to_first_token=first - stream.arrived if first is not None else None,
        seconds_per_output_token=(stream.last_token - first) / more if first is not None and more > 0 else None,
    )
