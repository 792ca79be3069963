"""The model for unary inference, over a server that stands in: pieces joined, errors by codes, clients that go."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
import types
import weakref

import numpy as np
import pytest

WAIT = 20.0
FINAL = 1


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError:
    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"

    def __init__(self, message, code="INTERNAL"):
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self._tensors, self._error = output_tensors, error

    def output_tensors(self):
        return self._tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class Pieces:
    """Of a newer server: they can be cancelled, and wait for that after the first where there is no second."""

    def __init__(self, pieces, endless):
        self._pieces, self._endless, self.cancelled = pieces, endless, threading.Event()

    def __iter__(self):
        yield from self._pieces
        if self._endless:
            assert self.cancelled.wait(WAIT)
            yield InferenceResponse(error=TritonError("CANCELLED: the request was cancelled"))

    def cancel(self):
        self.cancelled.set()


class Sender:
    def __init__(self):
        self.sent, self.gone, self.done = [], False, threading.Event()

    def send(self, response=None, flags=0):
        assert flags == FINAL
        self.sent.append(response)
        self.done.set()

    def is_cancelled(self):
        return self.gone

    def answer(self):
        assert self.done.wait(WAIT)
        (response,) = self.sent
        return response

    def values(self):
        return {tensor.name(): tensor.as_numpy().tolist() for tensor in self.answer().output_tensors()}


class Request:
    def __init__(self, parameters=None):
        self.sender, self._parameters = Sender(), parameters or {}

    def get_response_sender(self):
        return self.sender

    def inputs(self):
        return [Tensor("text_input", np.array([[b"a"]], object))]

    def requested_output_names(self):
        return ["text_output"]

    def request_id(self):
        return "7"

    def timeout(self):
        return 9

    def parameters(self):
        return json.dumps(self._parameters)


@pytest.fixture
def asked():
    """What the other model was asked, in order."""
    return []


@pytest.fixture
def answer():
    """What it answers: a list of pieces, or an exception; endless answers wait to be cancelled."""
    return {"pieces": [], "endless": False, "gate": threading.Event()}


@pytest.fixture
def module(monkeypatch, asked, answer):
    class InferenceRequest:
        def __init__(self, **said):
            self.said = said

        def exec(self, decoupled):
            assert decoupled
            asked.append(self.said)
            assert answer["gate"].wait(WAIT)
            if isinstance(answer["pieces"], Exception):
                raise answer["pieces"]
            return Pieces(answer["pieces"], answer["endless"])

    stub = types.ModuleType("triton_python_backend_utils")
    stub.__dict__.update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        InferenceRequest=InferenceRequest,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
    answer["gate"].set()
    name = "deepseek_trt.engines.serving.sync_model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


@pytest.fixture
def model(module, answer):
    made = module.TritonPythonModel()
    parameters = {"model": {"string_value": "other"}, "max_inflight": {"string_value": "2"}}
    made.initialize({"model_config": json.dumps({"parameters": parameters})})
    yield made
    answer["gate"].set()
    made.finalize()
    assert not [t for t in threading.enumerate() if t.name.startswith("deepseek-trt")]


def piece(text, count, finish=""):
    return InferenceResponse(
        [
            Tensor("text_output", np.array([[text]], object)),
            Tensor("finish_reason", np.array([[finish]], object)),
            Tensor("num_input_tokens", np.array([[3]], np.int32)),
            Tensor("num_output_tokens", np.array([[count]], np.int32)),
            Tensor("output_log_probs", np.array([[-1.0] * count], np.float32)),
            Tensor("cum_log_probs", np.array([[-9.0]], np.float32)),
        ]
    )


def ask(model, parameters=None):
    request = Request(parameters)
    model.execute([request])
    return request.sender


def test_pieces_make_one_response(model, module, asked, answer):
    answer["pieces"] = [piece(b"a", 1), piece(b" b", 2, b"stop"), InferenceResponse()]
    values = ask(model, {"temperature": 0.5, "n": 1, "x": "y"}).values()
    assert values["text_output"] == [[b"a b"]]
    assert (values["num_input_tokens"], values["num_output_tokens"]) == ([[3]], [[3]])
    assert (values["finish_reason"], values["cum_log_probs"]) == ([[b"stop"]], [[-9.0]])
    assert values["output_log_probs"] == [[-1.0] * 3]
    (said,) = asked
    assert (said["model_name"], said["request_id"], said["timeout"]) == ("other", "7", 9)
    assert said["parameters"] == {"temperature": "0.5", "n": 1, "x": "y", module.CODE_IN_TEXT: True}


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("INVALID_ARG: top_p 2: must lie in (0, 1]", "INVALID_ARG", "top_p 2: must lie in (0, 1]"),
        ("UNAVAILABLE: full", "UNAVAILABLE", "full"),
        ("unexpected inference input 'x'", "INTERNAL", "unexpected inference input 'x'"),
        ("Oh: no", "INTERNAL", "Oh: no"),
    ],
)
def test_errors(model, answer, text, code, said):
    answer["pieces"] = [piece(b"a", 1), InferenceResponse(error=TritonError(text))]
    error = ask(model).answer().error()
    assert (error.code(), error.message()) == (code, said)


@pytest.mark.parametrize("pieces", [[], [InferenceResponse()], OSError("no such model")])
def test_no_answer_is_an_error(model, answer, pieces):
    answer["pieces"] = pieces
    assert ask(model).answer().has_error()


def test_a_client_that_goes_ends_what_is_computed_for_it(model, answer):
    answer.update(pieces=[piece(b"a", 1)], endless=True)
    sender = ask(model)
    sender.gone = True
    assert sender.answer().error().code() == "CANCELLED"


def test_iterators_are_held_until_the_server_has_let_go_of_them(module):
    """A client that is known to have gone answers at once: what it read waits for the next one's turn."""
    spent = module.Spent()
    pieces = [Pieces([], False) for _ in range(3)]
    references = [weakref.ref(each) for each in pieces]
    gone, failing, there = Sender(), Sender(), Sender()
    gone.gone, failing.is_cancelled = True, None

    def alive():
        return [reference() is not None for reference in references]

    for sender, held in ((gone, [True, True, True]), (failing, [True, True, True]), (there, [False, False, False])):
        spent.add(pieces.pop(0), sender)
        assert alive() == held


def test_full_is_refused_and_then_taken(model, answer):
    answer["pieces"] = [piece(b"a", 1)]
    answer["gate"].clear()
    running = [ask(model) for _ in range(2)]
    error = ask(model).answer().error()
    assert (error.code(), "2 requests are in flight" in error.message()) == ("UNAVAILABLE", True)
    answer["gate"].set()
    assert all(sender.values()["text_output"] == [[b"a"]] for sender in running)
    deadline = time.monotonic() + WAIT
    while model._live:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert ask(model).values()["text_output"] == [[b"a"]]
