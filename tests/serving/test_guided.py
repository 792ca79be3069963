"""response_format and its like, forced calls of tools, reasoning before them: over HTTP, on the demo's own words."""

from __future__ import annotations

import json
import re
import shutil

import jsonschema
import openai
import pytest

pytest.importorskip("llguidance", reason="the extra `guided` is not installed")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
END = 4095
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
HI = [{"role": "user", "content": "Say"}]
TOOLS = [
    {"type": "function", "function": {"name": "first", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "second", "parameters": NOTHING}},
]


def client_of(server):
    return openai.OpenAI(base_url=server.url, api_key="unused", max_retries=0)


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


def chat(client, **fields):
    given = {"model": "demo", "messages": HI, "temperature": 0.9, "seed": 1, "max_tokens": 300, **fields}
    return client.chat.completions.create(**given).choices[0]


def test_json_schema_and_object(client):
    form = {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": SCHEMA}}
    answer = chat(client, response_format=form)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.message.content), SCHEMA)
    events = client.chat.completions.create(
        model="demo", messages=HI, temperature=0.9, seed=1, max_tokens=300, response_format=form, stream=True
    )
    assert "".join(event.choices[0].delta.content or "" for event in events) == answer.message.content
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=1500, temperature=0)
    assert answer.message.content.lstrip().startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    assert chat(client, response_format={"type": "text"}, max_tokens=2).message.content is not None


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_regex": "[ab]{4}"}, "[ab]{4}"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'start: "x" "y"~2'}, "xyy"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_json": '{"type": "null"}'}, "null"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"structured_outputs": {"json": {"const": 5}}}, "5"),
    ],
)
def test_vllms_names_on_both_routes(client, extra, pattern):
    assert re.fullmatch(pattern, chat(client, extra_body=extra).message.content)
    made = client.completions.create(model="demo", prompt="It is", max_tokens=60, temperature=1, extra_body=extra)
    assert re.fullmatch(pattern, made.choices[0].text)
    assert made.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "foo": 1}}),
        ("response_format", {"type": "json_object", "foo": 1}),
        ("guided_json", {"not": {}}),
        ("guided_json", "{"),
        ("guided_json", 5),
        ("guided_regex", "("),
        ("guided_regex", ""),
        ("guided_choice", []),
        ("guided_grammar", "start: nothing"),
        ("structured_outputs", {"xml": 1}),
        ("structured_outputs", {"regex": "a", "choice": ["a"]}),
        ("structured_outputs", {"json_object": "yes"}),
    ],
)
def test_what_is_no_form_is_named(http, field, value):
    answer = http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 3, field: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert field in error["message"]


def test_two_forms_are_refused(http):
    both = {"guided_regex": "a", "response_format": {"type": "json_object"}}
    assert "one form" in http.post("/v1/chat/completions", json={"messages": HI, **both}).json()["error"]["message"]


def whole_calls(events):
    """Calls and finish reason of a streamed chat."""
    calls, finish = {}, None
    for event in events:
        for choice in event.choices:
            finish = choice.finish_reason or finish
            for part in choice.delta.tool_calls or ():
                if part.id:
                    assert part.index not in calls
                    calls[part.index] = [part.function.name, ""]
                calls[part.index][1] += part.function.arguments or ""
    return list(map(tuple, calls.values())), finish


def test_a_tool_by_name_and_a_required_one(client):
    named = {"type": "function", "function": {"name": "first"}}
    answer = chat(client, tools=TOOLS, tool_choice=named)
    (call,) = answer.message.tool_calls
    assert (call.function.name, answer.finish_reason, answer.message.content) == ("first", "tool_calls", None)
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    events = client.chat.completions.create(
        model="demo", messages=HI, temperature=0.9, seed=1, max_tokens=300, tools=TOOLS, tool_choice=named, stream=True
    )
    assert whole_calls(events) == ([("first", call.function.arguments)], "tool_calls")
    for seed in range(3):
        answer = chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed)
        (call,) = answer.message.tool_calls
        assert call.function.name in ("first", "second")
        json.loads(call.function.arguments)


def test_a_bad_schema_of_a_tool_is_said(http):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}
    answer = http.post("/v1/chat/completions", json={"messages": HI, "tools": [tool], "tool_choice": "required"})
    assert answer.status_code == 400
    assert "Invalid type" in answer.json()["error"]["message"]


def test_logit_bias_is_honoured_and_checked(client, http):
    answer = client.completions.create(
        model="demo", prompt="a", max_tokens=3, temperature=0, logit_bias={"77": 100}, logprobs=0
    )
    assert len(set(answer.choices[0].logprobs.tokens)) == 1
    for bad in ({"x": 1}, {"77": 101}, {"5000": 1}, {"-1": 1}, {"77": 1, "077": 2}):
        made = http.post("/v1/completions", json={"prompt": "a", "logit_bias": bad, "max_tokens": 1})
        assert made.status_code == 400, bad
        assert "logit_bias" in made.json()["error"]["message"]


THINKING = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}<｜tool▁sep｜>{% endif %}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(demo, tmp_path_factory, relist):
    """The demo's bundle with V3.1's ways in its template, and its last token as </think>, which it never learned."""
    path = tmp_path_factory.mktemp("thinker") / "bundle"
    shutil.copytree(demo, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": THINKING}))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    last = next(text for text, id in vocabulary.items() if id == END)
    del vocabulary[last]
    vocabulary["</think>"] = END
    tokenizer["model"]["merges"] = [m for m in merges if "".join(m.split() if isinstance(m, str) else m) != last]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": END, "content": "</think>", **flags})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    relist(path)
    return path


def test_a_guide_holds_from_the_end_of_reasoning_on(thinker, start):
    with start(thinker, "--served-model-name", "demo") as server, client_of(server) as client:
        given = {"model": "demo", "messages": HI, "temperature": 1, "seed": 3, "max_tokens": 600}
        extra = {"chat_template_kwargs": {"thinking": True}, "guided_regex": "[0-9]{5}"}
        given |= {"logit_bias": {str(END): 7}, "extra_body": extra}
        answer = client.chat.completions.create(**given).choices[0]
        assert answer.finish_reason == "stop"
        assert re.fullmatch("[0-9]{5}", answer.message.content)
        assert answer.message.reasoning_content
        events = list(client.chat.completions.create(**given, stream=True))
        for name in ("reasoning_content", "content"):
            parts = [getattr(event.choices[0].delta, name, None) or "" for event in events]
            assert "".join(parts) == getattr(answer.message, name)
        named = {"type": "function", "function": {"name": "first"}}
        del extra["guided_regex"]
        answer = client.chat.completions.create(**given, tools=TOOLS, tool_choice=named).choices[0]
        assert answer.message.reasoning_content
        jsonschema.validate(json.loads(answer.message.tool_calls[0].function.arguments), SCHEMA)
        assert server.stop() == 0


def test_reasoning_and_calls_are_told_from_content(thinker, start):
    """Words are put into the model's mouth by a guide."""
    with start(thinker, "--served-model-name", "demo") as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="guided_choice choice: holds '</think>'"):
            chat(client, extra_body={"guided_choice": ["so it is</think>Hello."]})
        call = '<｜tool▁call▁begin｜>first<｜tool▁sep｜>{"n": 1}<｜tool▁call▁end｜>'
        call = f"<｜tool▁calls▁begin｜>{call}<｜tool▁calls▁end｜>"
        for stream in (False, True):
            given = {"model": "demo", "messages": HI, "max_tokens": 300, "tools": TOOLS, "stream": stream}
            made = client.chat.completions.create(**given, extra_body={"guided_choice": [f"I ask.{call}"]})
            if stream:
                events = list(made)
                assert whole_calls(events) == ([("first", '{"n": 1}')], "tool_calls")
                assert "".join(e.choices[0].delta.content or "" for e in events) == "I ask."
            else:
                message = made.choices[0].message
                assert (message.content, made.choices[0].finish_reason) == ("I ask.", "tool_calls")
                assert message.tool_calls[0].function.arguments == '{"n": 1}'
        assert server.stop() == 0, server.said
        assert "Traceback" not in server.said
