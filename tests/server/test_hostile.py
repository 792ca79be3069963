"""Requests made to hurt, on the real server: errors to their senders, answers to all others, no bug in the log."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

SHORT = {"text_input": "The number", "max_tokens": 8}
STEADY = {"text_input": "The", "max_tokens": 200, "min_tokens": 200}
HI = json.dumps([{"role": "user", "content": "How many?"}])
NESTED = '[{"role": "user", "content": "a", "x": ' + "[" * 900 + "]" * 900 + "}]"
REFUSED = {
    "a long prompt": {"text_input": "word " * 400_000},
    "deep messages": {"messages": "[" * 10_000 + "]" * 10_000},
    "deep content": {"messages": NESTED},
    "6,000 digits": {"messages": HI, "chat_template_kwargs": '{"x": ' + "9" * 6000 + "}"},
    "infinity": {"messages": HI, "chat_template_kwargs": '{"x": 1e999}'},
    "NaN": {"messages": HI, "chat_template_kwargs": '{"x": NaN}'},
    "half a character": {"messages": r'[{"role": "user", "content": "\ud800"}]'},
    "half a key": {"messages": r'[{"role": "user", "content": "a", "\udc00": 1}]'},
    "a key twice": {"messages": '[{"role": "user", "content": "a", "role": "system"}]'},
    "many stops": {"text_input": "The", "stop_words": ["a"] * 20_000},
    "long stops": {"text_input": "The", "stop_words": ["a" * 10_000] * 20},
    "many stop tokens": {"text_input": "The", "stop_token_ids": [2**31 - 1] * 50_000},
    "a penalty": {"text_input": "The", "repetition_penalty": 1e30},
    "names": {"text_input": "The", **{"x" * i: i for i in range(1, 300)}},
    "bad words": {"text_input": "The", "bad_words": ["b" * 100] * 1000},
}
TAKEN = {
    "the longest answer": {"text_input": "The", "max_tokens": 2**31 - 1, "repetition_penalty": 1.2, "timeout_ms": 300},
    "NUL": {"text_input": "\x00", "max_tokens": 4},
    "128 stops": {"text_input": "The", "max_tokens": 40, "stop_words": ["a" * (900 + i) for i in range(120)]},
    "top_k": {"text_input": "The", "max_tokens": 4, "top_k": 2**31 - 1, "temperature": 1e38},
    "every stop token": {"text_input": "The", "max_tokens": 4, "min_tokens": 4, "stop_token_ids": list(range(250))},
    "the largest seed": {"text_input": "The", "max_tokens": 4, "seed": 2**64 - 1, "temperature": 1.0},
}
SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def steady(server):
    """What a neighbour gets alone."""
    return server.generate(**STEADY).json["text_output"]


@pytest.mark.parametrize("name", [*REFUSED, *TAKEN])
def test_a_neighbour_gets_its_answer(server, steady, name):
    with ThreadPoolExecutor(1) as threads:
        neighbour = threads.submit(server.generate, **STEADY)
        reply = server.generate(**{**REFUSED, **TAKEN}[name])
        assert neighbour.result().json["text_output"] == steady
    if name in REFUSED:
        assert reply.status == 400
        assert len(str(reply.json)) < 2000
    else:
        assert reply.status == 200 or "timeout_ms" in str(reply.json)
    assert "Traceback" not in server.log()
    assert "could not be taken" not in server.log()


SCALARS = [name for name, inputs in REFUSED.items() if all(isinstance(v, (str, float)) for v in inputs.values())]


@pytest.mark.parametrize("name", SCALARS)
def test_over_grpc(grpc_call, server, name):
    (answers,) = grpc_call([REFUSED[name]])
    assert "error" in answers[0]
    assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def slow_repository(server_environment, demo_checkpoint, bundle_of, run_cli, tmp_path_factory):
    """The demo model with a chat template that never ends."""
    folder = tmp_path_factory.mktemp("slow")
    shutil.copytree(demo_checkpoint, folder / "checkpoint")
    for file in (folder / "checkpoint").glob("chat_template*"):
        file.unlink()
    (folder / "checkpoint" / "chat_template.jinja").write_text(SLOW)
    bundle = bundle_of(folder / "checkpoint")
    run_cli("model-repository", bundle.path, folder / "repository", "--threads", 1)
    return folder / "repository"


def test_a_template_that_never_ends_holds_up_no_other_request_and_no_sigterm(serve, slow_repository):
    server = serve(slow_repository)
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(server.generate, messages=HI)
        assert server.wait_for(lambda: server.metric("deepseek_trt_inflight_requests") == 1)
        answered = [server.generate(**SHORT).status for _ in range(3)]
        still_slow = not slow.done()
        reply = slow.result()
        assert reply.status == 400
        assert "stopped" in str(reply.json)
        assert answered == [200, 200, 200]
        assert still_slow
        begun = threading.Event()

        def last():
            begun.set()
            return server.generate(messages=HI)

        end = threads.submit(last)
        assert begun.wait(10)
        assert server.wait_for(lambda: server.metric("deepseek_trt_inflight_requests") == 1)
        assert server.stop() == 0, server.log_tail()
        assert server.left == []
        assert "killing it" not in server.log()
        assert end.result().status != 200
