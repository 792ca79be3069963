"""TritonPythonModel that is not decoupled: it asks the model beside it, which is, and gives one response a request.

tritonserver's unary inference refuses decoupled models. This one holds no weights, and works on a thread a request.
"""

from __future__ import annotations

import contextlib
import gc
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

# A request's parameter. Between models 2.51 hands on an error's text and not its code; clients cannot send a name that
# begins so.
CODE_IN_TEXT = "triton_deepseek_trt_code_in_text"
_CODES = ("INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL")
_LOOK_EVERY = 0.1  # seconds between looks at who has gone
_LONGEST_REASON = 1000  # characters of an error


def _added(pieces: Sequence[Any]) -> Any:
    """Text or numbers, one a piece."""
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total.astype(pieces[0].dtype)


def _in_a_row(pieces: Sequence[Any]) -> Any:
    return np.concatenate(pieces, axis=-1)


def _last(pieces: Sequence[Any]) -> Any:
    return pieces[-1]


# What pieces of one answer make together; of other outputs the last counts.
_JOINED: dict[str, Callable[[Sequence[Any]], Any]] = {
    "text_output": _added,
    "num_output_tokens": _added,
    "output_log_probs": _in_a_row,
}


class TritonPythonModel:
    """What the Python backend calls: initialize once, execute for each batch of requests, finalize once."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self._model = parameters["model"]["string_value"]
        self._most = int(parameters["max_inflight"]["string_value"])
        self._threads = ThreadPoolExecutor(self._most, "deepseek-trt-sync")
        self._live, self._counting = 0, threading.Lock()
        self._watch, self._spent = Watch(), Spent()

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:  # what the server lent us is read here: it is not ours for longer than this call
                asked = self._asked(request)
            except Exception as error:
                _send(sender, _refusal(f"the request cannot be read ({error})", "INVALID_ARG"))
                continue
            if self._admits():
                self._threads.submit(self._answer, sender, asked)
            else:
                full = f"{self._most} requests are in flight, the most allowed: try again later"
                _send(sender, _refusal(full, "UNAVAILABLE"))

    def finalize(self) -> None:
        """Returns when every request has had its response."""
        self._threads.shutdown()
        self._watch.end()
        gc.collect()  # what holds shared memory goes before the process ends

    def _asked(self, request: Any) -> Any:
        """The same request, to the other model."""
        return pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=list(request.requested_output_names()),
            inputs=[pb_utils.Tensor(tensor.name(), np.array(tensor.as_numpy())) for tensor in request.inputs()],
            request_id=request.request_id(),
            timeout=request.timeout(),
            parameters=_parameters(request),
        )

    def _admits(self) -> bool:
        with self._counting:
            if self._live >= self._most:
                return False
            self._live += 1
            return True

    def _answer(self, sender: Any, asked: Any) -> None:
        """One response, whatever happens."""
        try:
            _send(sender, self._joined(sender, asked))
        finally:
            with self._counting:
                self._live -= 1

    def _joined(self, sender: Any, asked: Any) -> Any:
        """The pieces as one response, or the error of the first that is one."""
        try:
            pieces = asked.exec(decoupled=True)
            try:
                with self._watch.over(sender, pieces):
                    return _response(list(pieces))
            finally:
                self._spent.add(pieces, sender)
        except Exception as error:  # the other model is not loaded, or goes
            return _refusal(f"{self._model} cannot be asked: {error}", "UNAVAILABLE")


class Spent:
    """Iterators that were read to their end, held until the server has let go of them.

    The Python backend drops its own reference in a queue's thread that does not hold the GIL. Where that is the last,
    responses' arrays are freed beside the interpreter, which corrupts its heap (seen in 2.51 as "unaligned fastbin
    chunk", "double free", and segmentation faults). A question whether a client has gone passes the same queue in turn:
    its answer says that what was read before is let go of.
    """

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}
        self._guard = threading.Lock()

    def add(self, pieces: Any, sender: Any) -> None:
        """Hold `pieces`, and drop those whose turn has come."""
        with self._guard:
            self._held[id(pieces)] = pieces
            before = list(self._held)
        with contextlib.suppress(Exception):
            if not sender.is_cancelled():  # that it is may be known: the queue is not passed
                with self._guard:
                    for name in before:
                        self._held.pop(name, None)


class Watch:
    """Cancels what is computed for clients that have gone, where the server can: 2.51 cannot."""

    def __init__(self) -> None:
        self._watched: dict[int, tuple[Any, Any]] = {}
        self._guard, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def over(self, sender: Any, pieces: Any) -> contextlib.AbstractContextManager[Any]:
        """Watches the sender's client while it is entered."""
        if not hasattr(pieces, "cancel"):
            return contextlib.nullcontext()
        return self._watching(sender, pieces)

    def end(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    @contextlib.contextmanager
    def _watching(self, sender: Any, pieces: Any) -> Any:
        with self._guard:
            self._watched[id(pieces)] = sender, pieces
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deepseek-trt-watch", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._guard:
                del self._watched[id(pieces)]

    def _run(self) -> None:
        while not self._over.wait(_LOOK_EVERY):
            with self._guard:  # none of them ends meanwhile
                for sender, pieces in self._watched.values():
                    with contextlib.suppress(Exception):  # a look that fails is made again
                        if sender.is_cancelled():
                            pieces.cancel()


def _parameters(request: Any) -> dict[str, Any]:
    """The server hands on text, flags and whole numbers alone; numbers may be written as text."""
    given = json.loads(request.parameters() or "{}")
    handed = {name: repr(value) if isinstance(value, float) else value for name, value in given.items()}
    return {**handed, CODE_IN_TEXT: True}


def _response(pieces: Iterable[Any]) -> Any:
    arrays: dict[str, list[Any]] = {}
    for piece in pieces:
        if piece.has_error():
            return _error(piece.error().message())
        for tensor in piece.output_tensors():  # none in a last response that is empty
            arrays.setdefault(tensor.name(), []).append(np.array(tensor.as_numpy()))
    if not arrays:
        return _refusal("the answer has no output", "INTERNAL")
    whole = {name: _JOINED.get(name, _last)(each) for name, each in arrays.items()}
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in whole.items()])


def _error(text: str) -> Any:
    """The other model's error; one that the server makes by itself has no code in its text."""
    code, colon, reason = text.partition(": ")
    return _refusal(reason, code) if colon and code in _CODES else _refusal(text, "INTERNAL")


def _refusal(reason: str, code: str) -> Any:
    error = pb_utils.TritonError(reason[:_LONGEST_REASON], getattr(pb_utils.TritonError, code))
    return pb_utils.InferenceResponse(error=error)


def _send(sender: Any, response: Any) -> None:
    """As the only response. A client must not wait for ever for one that cannot be sent."""
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception as error:
        pb_utils.Logger.log_error(f"a response could not be sent: {error}")
        with contextlib.suppress(Exception):
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
