"""What the server answers: the tokens of `generate`, in whole and in pieces, over HTTP and gRPC."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

TOKENS = 40


@pytest.fixture(scope="module")
def prompts(demo_checkpoint):
    """32 beginnings of different lengths, from the demo model's own README."""
    words = (demo_checkpoint / "README.md").read_text().replace("`", "").split()
    return [" ".join(words[3 * i : 3 * i + 2 + i % 17]) for i in range(32)]


@pytest.fixture(scope="module")
def expected(run_cli, demo_bundle, prompts):
    """The answers of `deepseek-trt generate`."""
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    options = ("--backend", "ort", "--threads", 1, "--max-new-tokens", TOKENS, "--json")
    lines = run_cli("generate", demo_bundle.path, *given, *options).stdout.splitlines()
    return [json.loads(line) for line in lines]


def all_at_once(ask, prompts):
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(ask, prompts))


def test_32_whole_answers_at_once(server, prompts, expected):
    replies = all_at_once(lambda prompt: server.generate(text_input=prompt, max_tokens=TOKENS), prompts)
    assert {reply.status for reply in replies} == {200}
    for reply, right in zip(replies, expected, strict=True):
        assert reply.json["text_output"] == right["text"]
        assert reply.json["finish_reason"] == right["finish_reason"]
        assert reply.json["num_output_tokens"] == len(right["token_ids"])
        assert reply.json["num_input_tokens"] == len(right["prompt_ids"])


def test_32_streams_at_once(server, joined, prompts, expected):
    streams = all_at_once(lambda prompt: list(server.stream(text_input=prompt, max_tokens=TOKENS)), prompts)
    for events, right in zip(streams, expected, strict=True):
        assert joined(events) == right["text"]
        assert [event["finish_reason"] for event in events] == [""] * (len(events) - 1) + [right["finish_reason"]]
        assert sum(event["num_output_tokens"] for event in events) == len(right["token_ids"])


def test_32_grpc_streams_at_once_with_one_final_response_each(grpc_call, prompts, expected):
    requests = [{"text_input": prompt, "max_tokens": TOKENS, "stream": i % 2 == 0} for i, prompt in enumerate(prompts)]
    for i, (answers, right) in enumerate(zip(grpc_call(requests), expected, strict=True)):
        assert "".join(answer.get("text_output", "") for answer in answers) == right["text"]
        assert [answer["final"] for answer in answers] == [False] * (len(answers) - 1) + [True]
        assert i % 2 == 0 or sum("text_output" in answer for answer in answers) == 1


@pytest.mark.parametrize("name", ["ascii", "cjk", "emoji", "code", "space"])
def test_pieces_make_the_whole(server, grpc_call, joined, recited, name):
    """Tokens end within characters and pieces begin with spaces; nothing is lost or doubled."""
    events = list(server.stream("reciter", text_input=f"<{name}>"))
    assert joined(events) == recited[name]
    assert server.generate("reciter", text_input=f"<{name}>").json["text_output"] == recited[name]
    (answers,) = grpc_call([{"text_input": f"<{name}>", "stream": True}], model="reciter")
    assert "".join(answer.get("text_output", "") for answer in answers) == recited[name]
    assert all("\ufffd" not in event["text_output"] for event in events)


@pytest.mark.parametrize("seed", range(4))
def test_sampled_pieces_make_the_whole(server, joined, seed):
    """At a high temperature the byte-level tokenizer gives bytes that are no characters, too."""
    inputs = {"text_input": "The", "max_tokens": 64, "temperature": 4.0, "seed": seed}
    assert joined(list(server.stream(**inputs))) == server.generate(**inputs).json["text_output"]


def test_seeds_decide(server):
    texts = [
        server.generate(text_input="The", max_tokens=16, temperature=1.0, seed=seed).json["text_output"]
        for seed in (7, 7, 2**63)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("name", "stops", "kept"),
    [
        ("ascii", ["lazy dog"], "The quick brown fox jumps over the "),
        ("ascii", ["never", "fox j", "over"], "The quick brown "),
        ("cjk", ["の文章"], "深い青の海、日本語"),
        ("emoji", ["👩‍💻"], "Done 🎉 by "),
        ("code", ["\n\n\t"], "    if x:\n        return [1,  2]"),
        ("code", ["    "], ""),
    ],
)
def test_stop_words_span_tokens(server, joined, name, stops, kept):
    inputs = {"text_input": f"<{name}>", "stop_words": stops}
    whole = server.generate("reciter", **inputs).json
    events = list(server.stream("reciter", **inputs))
    assert (whole["text_output"], whole["finish_reason"]) == (kept, "stop")
    assert (joined(events), events[-1]["finish_reason"]) == (kept, "stop")


def test_stop_token_ids_end_an_answer(server, grpc_call, joined, prompts, expected):
    right = next(answer for answer in expected if len(answer["token_ids"]) > 8)
    prompt, stop = prompts[expected.index(right)], right["token_ids"][6]
    count = right["token_ids"].index(stop) + 1
    for ids in (stop, [0, stop]):
        whole = server.generate(text_input=prompt, max_tokens=TOKENS, stop_token_ids=ids).json
        assert (whole["num_output_tokens"], whole["finish_reason"]) == (count, "stop")
    events = list(server.stream(text_input=prompt, max_tokens=TOKENS, stop_token_ids=[stop]))
    assert joined(events) == whole["text_output"]
    assert right["text"].startswith(whole["text_output"])


def test_generation_config_gives_defaults(server, recited):
    """The reciter's says temperature 0.7 and top_k 1, which recites as greedy does; the log says so once."""
    assert server.generate("reciter", text_input="<ascii>").json["text_output"] == recited["ascii"]
    line = "reciter: temperature 0.7, top_k 1 unless told otherwise, by generation_config.json"
    assert server.log().count(line) == 1


def test_chat_is_rendered_with_the_template(server, joined):
    """The demo's template, written out by hand; the tokenizer puts its first token before text_input itself."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    chat = server.generate(messages=json.dumps(messages), max_tokens=24).json
    plain = server.generate(text_input="Be brief.\n\nUser: How many?\n\nAssistant:", max_tokens=24).json
    assert chat["num_input_tokens"] == plain["num_input_tokens"]
    assert chat["text_output"] == plain["text_output"]
    assert joined(list(server.stream(messages=json.dumps(messages), max_tokens=24))) == chat["text_output"]


def test_log_probs_of_streamed_tokens(server):
    inputs = {"text_input": "The number", "max_tokens": 12, "return_log_probs": True}
    events = list(server.stream(**inputs))
    whole = server.generate(**inputs).json
    streamed = [value for event in events for value in _list(event["output_log_probs"])]
    assert streamed == _list(whole["output_log_probs"])
    assert len(streamed) == whole["num_output_tokens"]
    assert all(value <= 0 for value in streamed)


def test_input_comes_back_when_asked_for(server, joined):
    alone = server.generate(text_input="The number", max_tokens=8).json["text_output"]
    inputs = {"text_input": "The number", "max_tokens": 8, "exclude_input_in_output": False}
    assert server.generate(**inputs).json["text_output"] == "The number" + alone
    assert joined(list(server.stream(**inputs))) == "The number" + alone


def test_min_tokens_and_the_models_limit(server):
    """max_tokens is cut to what the model's length leaves."""
    reply = server.generate("reciter", text_input="<space>", min_tokens=20, max_tokens=20).json
    assert (reply["num_output_tokens"], reply["finish_reason"]) == (20, "length")
    huge = server.generate("reciter", text_input="<space>", max_tokens=2**31 - 1).json
    assert huge["finish_reason"] == "stop"


def test_the_client_that_comes_with_it(server, repository, run_script):
    result = run_script(repository / "client.py", "--url", f"http://127.0.0.1:{server.http}", "--model", "deepseek_v2")
    assert result.returncode == 0, result.stderr
    assert "streamed and whole agree" in result.stderr


def _list(value):
    return value if isinstance(value, list) else [value]
