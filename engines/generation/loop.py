"""EngineLoop: one scheduler driven by whoever waits for it: callers in their own threads, or one background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.request import Event
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.export.errors import BackendError

Deliver = Callable[[Event | Exception], bool]


@dataclass(eq=False)
class Ticket:
    """A submitted request. `deliver` gets its events, or what went wrong, and says whether the request ends there."""

    prompt: Sequence[int]
    params: SamplingParams
    deliver: Deliver
    id: int | None = None  # the scheduler's, once it is there
    ended: bool = False


class EngineLoop:
    """Safe for several threads: each step is made by one of them, and hands its events to all requests.

    submit and cancel do not wait for a step; they take effect before the next one.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._stepping = threading.Lock()
        self._changed = threading.Condition()  # guards the four below
        self._submitted: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._active: dict[int, Ticket] = {}  # by the scheduler's id; touched while stepping

    def submit(self, prompt: Sequence[int], params: SamplingParams, deliver: Deliver) -> Ticket:
        """Raises RequestError where the scheduler cannot take the request, BackendError after close."""
        self._scheduler.check(prompt, params)
        ticket = Ticket(prompt, params, deliver)
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
            if unless() or not self._scheduler.busy:
                return
            for event in self._scheduler.step():
                self._hand_over(event)

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
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._pending())
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
        return bool(self._submitted or self._cancelled or self._scheduler.busy)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise BackendError("the LLM is closed: open another one")

    def _settle(self) -> None:
        with self._changed:
            submitted, self._submitted = self._submitted, deque()
            cancelled, self._cancelled = self._cancelled, deque()
        for ticket in submitted:
            ticket.id = self._scheduler.add(ticket.prompt, ticket.params)
            self._active[ticket.id] = ticket
        for ticket in cancelled:
            self._end(ticket)

    def _hand_over(self, event: Event) -> None:
        ticket = self._active[event.request]
        if ticket.deliver(event.error or event):
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        ticket.ended = True
        if ticket.id is not None and ticket.id in self._active:
            del self._active[ticket.id]
            self._scheduler.cancel(ticket.id)

    def _fail(self, error: Exception) -> None:
        for ticket in tuple(self._active.values()):
            ticket.deliver(error)
            self._end(ticket)
