"""EngineLoop: one scheduler driven by whoever waits for it: callers in their own threads, or one background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.request import Event, Request
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.export.errors import BackendError

Deliver = Callable[[Event | Exception], bool]
_BEAT_SECONDS = 1.0  # from one beat of an idle thread to the next


@dataclass(eq=False)
class Ticket:
    """A submitted request. `deliver` gets its events, or what went wrong, and says whether the request ends there.

    What `deliver` raises ends the request, and is its `error`.
    """

    request: Request
    deliver: Deliver
    ended: bool = False
    error: BaseException | None = None


class EngineLoop:
    """Safe for several threads: each step is made by one of them, and hands its events to all requests.

    submit and cancel do not wait for a step; they take effect before the next one. `beats` counts the background
    thread's steps, and while it is idle seconds: one that stands still has stopped.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.beats = 0
        self._stepping = threading.Lock()
        self._changed = threading.Condition()  # guards the four below
        self._submitted: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._active: dict[int, Ticket] = {}  # by the scheduler's id; touched while stepping, as are _events
        self._events: deque[Event] = deque()  # made, and not handed over yet

    def submit(self, prompt: Sequence[int], params: SamplingParams, deliver: Deliver) -> Ticket:
        """All that the request's own values decide is done here, in the caller's thread.

        Raises RequestError where the scheduler cannot take the request, BackendError after close.
        """
        ticket = Ticket(self._scheduler.prepare(prompt, params), deliver)
        with self._changed:
            self._refuse_closed()
            self._submitted.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Free what the requests hold; those that have ended are left as they are."""
        with self._changed:
            self._cancelled.extend(ticket for ticket in tickets if not ticket.ended)
            self._changed.notify_all()

    def settle(self) -> None:
        """Make submissions and cancellations take effect now."""
        with self._stepping:
            self._settle()

    def step(self, unless: Callable[[], bool] = lambda: False) -> None:
        """One step of the scheduler, unless there is nothing to do or `unless` holds once it is this thread's turn."""
        with self._stepping:
            self._settle()
            if self._events:  # whoever made them was interrupted
                self._hand_over_all()
            if unless() or not self._scheduler.busy:
                return
            self._events.extend(self._scheduler.step())
            self._hand_over_all()

    def start(self, on_failure: Callable[[Exception], None] | None = None) -> None:
        """Step in a background thread from now on, whenever there is something to do.

        `on_failure` gets what a step raises, after every request got it.
        """
        with self._changed:
            self._refuse_closed()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, args=(on_failure,), name="deepseek-trt-engine", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        """End the background thread after its step; requests that have not ended get a BackendError."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._stepping:
            self._settle()
            self._fail(BackendError("the LLM was closed before the request ended: close it after the last answer"))

    def _run(self, on_failure: Callable[[Exception], None] | None) -> None:
        while True:
            self.beats += 1
            with self._changed:
                if not self._changed.wait_for(lambda: self._closed or self._pending(), _BEAT_SECONDS):
                    continue
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:  # handed to every caller: nobody waits for this thread
                with self._stepping:
                    if on_failure:
                        self._settle()  # those who wait for the next step wait for what has failed, too
                    self._fail(error)
                if on_failure:
                    on_failure(error)

    def _pending(self) -> bool:
        return bool(self._submitted or self._cancelled or self._events or self._scheduler.busy)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise BackendError("the LLM is closed: open another one")

    def _settle(self) -> None:
        with self._changed:
            submitted, self._submitted = self._submitted, deque()
            cancelled, self._cancelled = self._cancelled, deque()
        for ticket in submitted:
            self._active[self._scheduler.queue(ticket.request)] = ticket
        for ticket in cancelled:
            self._end(ticket)

    def _hand_over_all(self) -> None:
        while self._events:
            event = self._events.popleft()
            ticket = self._active.get(event.request)
            if ticket is not None and self._delivered(ticket, event.error or event):
                self._end(ticket)

    def _delivered(self, ticket: Ticket, event: Event | Exception) -> bool:
        """Whether the request ends here. What a callback raises is its own request's, whoever makes the step; only the
        main thread's Ctrl-C goes on from here.
        """
        try:
            return ticket.deliver(event)
        except BaseException as error:
            ticket.error = error
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                self._end(ticket)
                raise
            return True

    def _end(self, ticket: Ticket) -> None:
        ticket.ended = True
        if self._active.pop(ticket.request.id, None) is not None:
            self._scheduler.cancel(ticket.request.id)

    def _fail(self, error: Exception) -> None:
        self._events.clear()
        for ticket in tuple(self._active.values()):
            self._delivered(ticket, error)
            self._end(ticket)
