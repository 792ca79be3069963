"""Chat templates: rendered as transformers 5 renders them, from where it takes them, and never without a bound.

Where no other source is named, the rule is what transformers' apply_chat_template gives.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from deepseek_trt.engines.text import limits
from deepseek_trt.engines.text.template import ChatTemplates, render_chat
from deepseek_trt.engines.text.template_files import ChatTemplate
from deepseek_trt.export.errors import BundleError, ConfigError, RequestError

TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in (Path(__file__).parent / "templates").iterdir()}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOKENS = {"bos_token": BOS, "eos_token": EOS}
USER = {"role": "user", "content": "1 < 2 & 'three'?"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>easy</think>2"},
    {"role": "user", "content": " and\n2 + 2?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a <b>city</b> & its 'surroundings', 深度",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def call(arguments, **more):
    return {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": arguments}, **more}


def tool_turns(arguments, content=...):
    said = {} if content is ... else {"content": content}
    return [
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", **said, "tool_calls": [call(arguments), call(arguments)]},
        {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": '{"celsius": 7}'},
        {"role": "tool", "name": "weather", "tool_call_id": "c2", "content": "rain"},
    ]


def ours(template, messages, tools=None, **values):
    return render_chat(ChatTemplate("chat_template.jinja", template), messages, tools, {**TOKENS, **values})


@pytest.fixture(scope="module")
def theirs(demo_checkpoint):
    """theirs(template, messages, tools=None, **arguments): transformers' text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)

    def render(template, messages, tools=None, add_generation_prompt=True, **values):
        return tokenizer.apply_chat_template(
            copy.deepcopy(messages), tools, chat_template=template, tokenize=False,
            add_generation_prompt=add_generation_prompt, **values,
        )  # fmt: skip

    return render


@pytest.mark.parametrize("name", ["v2", "v2_5", "v3", "r1", "v3_1", "parts"])
@pytest.mark.parametrize("values", [{}, {"add_generation_prompt": False}, {"thinking": True}])
def test_deepseeks_forms_are_rendered_as_transformers_renders_them(name, values, theirs):
    assert ours(TEMPLATES[name], TURNS, **values) == theirs(TEMPLATES[name], TURNS, **values)


def test_what_the_forms_write():
    """By hand, so that not all rests on transformers."""
    answers = {name: ours(TEMPLATES[name], TURNS) for name in ("v2", "v2_5", "r1")}
    said = f"<think>easy</think>2{EOS}"
    assert answers["v2"] == f"{BOS}Be brief.\n\nUser: 1 + 1?\n\nAssistant: {said}User:  and\n2 + 2?\n\nAssistant:"
    v2_5 = f"{BOS}Be brief.<｜User｜>1 + 1?<｜Assistant｜>{said}<｜User｜> and\n2 + 2?<｜Assistant｜>"
    assert answers["v2_5"] == v2_5
    r1 = f"{BOS}Be brief.<｜User｜>1 + 1?<｜Assistant｜>2{EOS}<｜User｜> and\n2 + 2?<｜Assistant｜><think>\n"
    assert answers["r1"] == r1
    thinking = [ours(TEMPLATES["v3_1"], TURNS, thinking=on) for on in (False, True)]
    assert [text[-18:] for text in thinking] == ["<｜Assistant｜></think>"[-18:], "<｜Assistant｜><think>"[-18:]]


@pytest.mark.parametrize("arguments", ['{"city": "<Köln>"}', {"city": "<Köln>"}])
def test_tools(arguments, theirs):
    template, turns = TEMPLATES["v3_1"], tool_turns(arguments, content="Let me see.")
    text = ours(template, turns, TOOLS)
    assert text == theirs(template, turns, TOOLS)
    assert '{"city": "<Köln>"}' in text  # tojson without HTML's escapes and ASCII's
    assert "<b>city</b> & its 'surroundings', 深度" in text


@pytest.mark.parametrize("content", [..., None], ids=["no content", "null"])
@pytest.mark.parametrize("arguments", ['{"city": "Bonn"}', {"city": "Bonn"}], ids=["text", "object"])
def test_v3_tells_tool_calls_by_content_that_is_none(content, arguments):
    """DeepSeek's rule; transformers 5 drops what is null, upon which this template cannot write the calls at all."""
    text = ours(TEMPLATES["v3"], tool_turns(arguments, content))
    assert text.count('weather\n```json\n{"city": "Bonn"}\n```<｜tool▁call▁end｜>') == 2
    assert text.endswith("rain<｜tool▁output▁end｜><｜tool▁outputs▁end｜>")


def test_null_is_left_out_elsewhere(theirs):
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}:{{ m.name is defined }};{% endfor %}"
    turns = [{**USER, "name": None}, *tool_turns("{}", None)]
    assert ours(template, turns) == theirs(template, turns)
    assert "None" not in ours(template, turns)


def test_arguments_in_the_form_that_the_template_wants():
    """Chat APIs send text (OpenAI's rule), and some templates want an object: the other form is tried on an error."""
    pairs = "{% for m in messages if m.tool_calls %}{% for k, v in m.tool_calls[0].function.arguments.items() %}"
    pairs += "{{ k ~ '=' ~ v }}{% endfor %}{% endfor %}"
    assert ours(pairs, tool_turns('{"city": "Bonn"}')) == "city=Bonn"
    with pytest.raises(RequestError, match="has no attribute 'items'"):
        ours(pairs, tool_turns("no JSON"))


def test_reasoning_is_found_under_its_older_names(theirs):
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }};{% endfor %}"
    turns = [USER, {"role": "assistant", "content": "b", "reasoning": "a"}, {**USER, "thinking": "c"}]
    assert ours(template, turns) == theirs(template, turns)


PARTS = [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]


def test_parts_as_the_template_reads_them(theirs):
    turns = [{"role": "system", "content": PARTS}, USER, {"role": "user", "content": PARTS, "name": "x"}]
    assert ours(TEMPLATES["parts"], turns, TOOLS) == theirs(TEMPLATES["parts"], turns, TOOLS)


@pytest.mark.parametrize("name", ["v2", "v2_5", "v3", "r1", "v3_1"])
def test_parts_are_one_text_for_a_template_that_knows_text_alone(name):
    """vLLM's rule: lines. transformers ends with a TypeError, or writes the list as Python shows it."""
    joined = ours(TEMPLATES[name], [{"role": "user", "content": " a \nb"}])
    assert ours(TEMPLATES[name], [{"role": "user", "content": PARTS}]) == joined
    assert ours(TEMPLATES[name], [{"role": "user", "content": [" a ", PARTS[1]]}]) == joined


def test_parts_of_a_system_prompt_where_only_users_may_have_them():
    template = (
        "{% for m in messages %}{% if m.role == 'user' and m.content is not string %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert ours(template, [{"role": "user", "content": PARTS}]) == " a b"
    assert ours(template, [{"role": "system", "content": PARTS}, USER]) == f" a \nb{USER['content']}"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one"),
        ({"role": "user"}, "at least one"),
        ("hi", "at least one"),
        (["hi"], "no role"),
        ([{"content": "x"}], "no role"),
        ([{"role": 1, "content": "x"}], "no role"),
        ([{"role": "user"}], r"messages\[0\] \(user\) has no content"),
        ([USER, {"role": "user", "content": None, "name": "x"}], r"messages\[1\] \(user\) has no content"),
        ([{"role": "user", "content": 3}], "content 3"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"content\[0\] .* 'image_url'"),
        ([{"role": "user", "content": [PARTS[0], {"type": "input_audio"}]}], r"content\[1\] .* 'input_audio'"),
        ([{"role": "user", "content": [{"text": "x"}]}], "of type None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "no text"),
        ([{"role": "user", "content": object()}], "JSON"),
        ([{"role": "user", "content": "x" * 3}, 7], "no role"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, words):
    with pytest.raises(RequestError, match=words):
        ours(TEMPLATES["v2"], messages)


@pytest.mark.parametrize("tools", ["x", {"name": "f"}, [1], [None]])
def test_what_are_no_tools_is_refused(tools):
    with pytest.raises(RequestError, match="tools"):
        ours(TEMPLATES["v2"], [USER], tools)


@pytest.mark.parametrize(
    "template",
    [
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ nothing is defined }}{{ nothing }}",
        "{{ {'b': '<é>', 'a': [1, none, true, 0.1]} | tojson }}",
        "{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}{{ 'é' | tojson(ensure_ascii=true) }}",
        "{{ [1, {'k': 2}] | tojson(separators=(',', ':')) }}{{ messages | tojson(indent=4) }}",
        "a\n    {% if true %}\nb\n    {% endif %}\n  {{ 'c' }}\n",
        "{% for i in 'abc' %}{% if i == 'a' %}{% continue %}{% elif i == 'c' %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}",
        "{% set ns = namespace(a=1, self=2) %}{% set ns.b = ns.a + ns.self %}{{ ns.b }}{{ dict(x=1).x }}",
        "{{ dict.fromkeys('ab', 3) | tojson }}{% generation %}x{{ 1 }}{% endgeneration %}",
        "{{ strftime_now('%Y') | length }}{{ (strftime_now('%d %b') | length) > 4 }}",
        "{% macro m(x, y=2) %}<{{ x ~ y }}{{ caller() if caller }}>{% endmacro %}{{ m(1) }}{% call m(3) %}z"
        "{% endcall %}",
        "{% set x %}a{{ 1 }}b{% endset %}{{ x | upper | replace('A', 'c') | indent(2) }}{{ '%s-%03d' % ('a', 7) }}",
        "{{ '{:>4}|{a}'.format('x', a=1) }}{{ 'x'.ljust(3) }}|{{ ['a', 'b'] | join(', ') }}{{ ','.join(['c', 'd']) }}",
        "{{ messages | map(attribute='role') | join('/') }}{{ messages | selectattr('name') | list | length }}",
        "{{ 'a' ~ 1 ~ none ~ nothing ~ 2.5 }}{{ 'ab' * 3 }}{{ [1] + [2] }}{{ 2 ** 10 }}{{ 7 // 2 }}{{ 7 % 4 / 4 }}",
        "{{ messages[-1].content[:3] }}{{ messages[0]['role'] | title }}{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip() }}",
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{{ loop.first }}{{ loop.length }}{% else %}none{% endfor %}",
        "{% for t in [[1, [2]], [3]] recursive %}{{ t if t is number else '(' ~ loop(t) ~ ')' }}{% endfor %}",
        "{% block b %}{{ bos_token }}{% endblock %}{% filter upper %}x{{ eos_token | length }}{% endfilter %}",
        "{{ 'x' | center(7) }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ [3, 1] | sort }}{{ 'a\nb' | trim | wordcount }}",
        "{% with a = 1 %}{{ a }}{% endwith %}{% raw %}{{ x }}{% endraw %}{# gone #}{{ [] or 'é' | urlencode }}",
    ],
)
def test_the_environment_is_transformers(template, theirs):
    assert ours(template, [USER, *TURNS]) == theirs(template, [USER, *TURNS])


words = st.sampled_from(
    ["", "hi", " a\n", "</think>", "<think>x</think> y", "<&>'\"", "深度🙂", "{{ 1 }}", "a\r\nb\x00"]
)
contents = words | st.text(max_size=5)
arguments = st.dictionaries(contents, contents | st.integers() | st.booleans(), max_size=2)
calls = st.lists(st.builds(call, arguments | arguments.map(json.dumps)), min_size=1, max_size=2)
turns = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool", "other"]), "content": contents}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": contents}, optional={"reasoning": contents}),
    st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": calls}, optional={"content": contents}),
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(turns, min_size=1, max_size=5),
    st.sampled_from([None, [], TOOLS]),
    st.fixed_dictionaries({}, optional={"thinking": st.booleans(), "add_generation_prompt": st.booleans()}),
)
@example("v3_1", tool_turns({}), TOOLS, {})
def test_random_conversations(theirs, name, messages, tools, values):
    """Whatever transformers renders, this renders alike; the v3 form's null content is not for transformers."""
    assume(name != "v3" or not any("tool_calls" in message for message in messages))
    try:
        expected = theirs(TEMPLATES[name], messages, tools, **values)
    except Exception:
        return
    assert ours(TEMPLATES[name], messages, tools, **values) == expected


def folder(tmp_path, demo_checkpoint, files, **config):
    """The demo model's tokenizer with other templates: `files` by path, and keys of tokenizer_config.json."""
    for name in ("tokenizer.json", "config.json", "tokenizer_config.json"):
        shutil.copyfile(demo_checkpoint / name, tmp_path / name)
    given = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    given = {key: value for key, value in {**given, **config}.items() if value is not ...}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given), encoding="utf-8")
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    return tmp_path


LISTED = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "listed tools"}]
EXTRA = {"additional_chat_templates/tool_use.jinja": "extra tools", "additional_chat_templates/rag.jinja": "rag"}
SOURCES = {
    "text": ({}, {"chat_template": "text"}),
    "list": ({}, {"chat_template": LISTED}),
    "object": ({}, {"chat_template": {entry["name"]: entry["template"] for entry in LISTED}}),
    "file": ({"chat_template.jinja": "file"}, {"chat_template": "text"}),
    "file before list": ({"chat_template.jinja": "file"}, {"chat_template": LISTED}),
    "files": ({"chat_template.jinja": "file", **EXTRA}, {"chat_template": LISTED}),
    "extra alone": (EXTRA, {"chat_template": LISTED}),
    "text before legacy": (
        {"chat_template.json": '{"chat_template": "legacy"}'},
        {"chat_template": "text"},
    ),
    "no default": ({}, {"chat_template": LISTED[1:]}),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["no tools", "empty tools", "tools"])
@pytest.mark.parametrize("name", [None, "tool_use"])
def test_templates_come_from_where_transformers_takes_them(source, tools, name, tmp_path, demo_checkpoint):
    from transformers import AutoTokenizer

    files, config = SOURCES[source]
    path = folder(tmp_path, demo_checkpoint, files, **config)
    tokenizer = AutoTokenizer.from_pretrained(path)
    named = isinstance(tokenizer.chat_template, dict)
    if name and not named:  # where there is one alone, transformers takes the name for a template
        with pytest.raises(RequestError, match="neither a file nor a name"):
            ChatTemplates(path).render([USER], tools, name)
        return
    try:
        expected = tokenizer.apply_chat_template([USER], tools, chat_template=name, tokenize=False)
    except ValueError:
        with pytest.raises(RequestError, match="choose with --chat-template one of"):
            ChatTemplates(path).render([USER], tools, name)
    else:
        assert ChatTemplates(path).render([USER], tools, name) == expected


def test_chat_template_json_counts_where_there_is_nothing_else(tmp_path, demo_checkpoint):
    """A processor's file (transformers' LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE), which tokenizers there do not read."""
    files = {"chat_template.json": json.dumps({"chat_template": "legacy {{ bos_token }}"})}
    path = folder(tmp_path, demo_checkpoint, files, chat_template=...)
    assert ChatTemplates(path).render([USER]) == f"legacy {BOS}"


def test_a_template_from_a_file(tmp_path, demo_checkpoint):
    path = folder(tmp_path, demo_checkpoint, {"mine.txt": "{{ eos_token }}!", "bad.txt": ""})
    assert ChatTemplates(path).render([USER], name=str(path / "mine.txt")) == f"{EOS}!"
    with pytest.raises(RequestError, match=r"'mine' is neither a file nor a name: the bundle's are called default"):
        ChatTemplates(path).render([USER], name="mine")
    (path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(RequestError, match=r"bad.txt is not UTF-8"):
        ChatTemplates(path).render([USER], name=str(path / "bad.txt"))


def test_no_template_says_what_to_do(tmp_path):
    with pytest.raises(RequestError, match=r"no chat template .* leave out --chat, or send text_input"):
        ChatTemplates(tmp_path).render([USER])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chat_template": 5}, "chat_template 5: must be text"),
        ({"chat_template": [{"name": "default"}]}, "must be text, or a list"),
        ({"chat_template": ["{{ x }}"]}, "must be text, or a list"),
        ({"chat_template": {"default": 1}}, "that is no text"),
        ({"chat_template": [{"name": 1, "template": "x"}]}, "that is no text"),
    ],
)
def test_templates_of_another_type_are_refused(config, words, tmp_path, demo_checkpoint):
    with pytest.raises(BundleError, match=words):
        ChatTemplates(folder(tmp_path, demo_checkpoint, {}, **config)).render([USER])


@pytest.mark.parametrize("spoiled", [b"{", b"[]", b"\xff{}", b"[" * 100_000])
def test_a_spoiled_tokenizer_config_is_named(spoiled, tmp_path):
    (tmp_path / "tokenizer_config.json").write_bytes(spoiled)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        ChatTemplates(tmp_path).render([USER])


@pytest.mark.parametrize("decoder", [{}, {"added_tokens_decoder": ...}], ids=["decoder", "none"])
@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "pad_token": None},
        {"bos_token": ..., "unk_token": "<unk>", "cls_token": {"__type": "AddedToken", "content": "<c>"}},
        {"image_token": "<image>", "extra_special_tokens": {"call_token": "<call>"}},
    ],
)
def test_special_tokens(config, decoder, tmp_path, demo_checkpoint):
    """All that transformers gives a template, as text; a default that one of its classes has is not a file's."""
    from transformers import PreTrainedTokenizerFast

    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "call", "other")
    template = "".join(f"{name}={{{{ {name}_token }}}}{{{{ {name}_token is defined }}}} " for name in names)
    files = {"special_tokens_map.json": json.dumps({"sep_token": "<sep>", "eos_token": "<eos>"})}
    listed = decoder or {"added_tokens_decoder": {"0": {"content": BOS, "special": True}}}
    path = folder(tmp_path, demo_checkpoint, files, chat_template=template, **config, **listed)
    expected = PreTrainedTokenizerFast.from_pretrained(path).apply_chat_template([USER], tokenize=False)
    assert ChatTemplates(path).render([USER]) == expected


def test_arguments_stand_before_special_tokens(tmp_path, demo_checkpoint):
    template = "{{ bos_token }}{{ documents[0].title }}{{ thinking }}{{ add_generation_prompt }}"
    path = folder(tmp_path, demo_checkpoint, {"chat_template.jinja": template})
    values = {"bos_token": "B", "documents": [{"title": "T"}], "thinking": 1, "add_generation_prompt": False, "self": 0}
    assert ChatTemplates(path).render([USER], arguments=values) == "BT1False"
    assert ChatTemplates(path).unused({"thinking": 1, "thinkng": 1}, tools=[]) == ["thinkng", "tools"]
    for refused in (
        {"messages": []},
        {"tools": []},
        {"documents": "x"},
        {"continue_final_message": True},
        {"x": object()},
    ):
        with pytest.raises(RequestError, match="template argument"):
            ChatTemplates(path).render([USER], arguments=refused)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("\n{{ raise_exception('roles must\n alternate') }}", "line 2: .* roles must alternate$"),
        ("a\nb\n{% if x %}", "line 3: .*[Uu]nexpected end"),
        ("\n{{ x.y.z }}", "line 2: .*undefined"),
        ("\n\n{{ 'a' + 1 }}", "line 3: .*TypeError"),
        ("{{ 1 / 0 }}", "line 1: .*ZeroDivisionError"),
        ("\n{{ 1e308 ** 2 }}", "line 2: .*OverflowError"),
        ("{{ range(1000000) }}", "line 1: .*OverflowError: Range too big"),
        ("\n{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "line 2: .*RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "line 1: .*unsafe"),
        ("{{ messages.append(1) }}", "line 1: .*unsafe"),
        ("{{ namespace(__init__=1) }}", "underscore"),
        ("{% include 'x' %}", "line 1: .*"),
        ("{% extends 'x' %}", "line 1: .*"),
        ("{{ messages | nothing }}", "line 1: .*No filter named 'nothing'"),
        ("{{ '%d' % 'x' }}", "line 1: .*TypeError"),
        ("{{ messages | tojson(separators=1) }}", "TypeError"),
        ("{{ [] | first | length }}{{ {}.x() }}", "line 1: .*has no attribute 'x'"),
        ("{{ " + "(" * 2000 + ")" * 2000 + " }}", "chat_template.jinja"),
        ("{{ 9" + "9" * 5000 + " }}", "ValueError"),
        ("{{ '\\ud800' | tojson }}{{ 'x'.encode('nope') }}", "LookupError"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_whatever_goes_wrong_in_a_template_is_one_sentence_with_its_place(template, words):
    with pytest.raises(RequestError, match=r"^chat_template.jinja(, line \d+)?: the chat template refuses") as caught:
        ours(template, [USER])
    assert caught.match(words)
    assert "\n" not in str(caught.value)


DOUBLING = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}"
HOSTILE = {
    "endless loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "endless loops in filters": "{% for a in range(9999) %}{{ range(99999) | map('upper') | list }}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in 'ab' recursive %}{% if loop.depth < 60 %}{{ loop('ab') }}{% endif %}{% endfor %}",
    "output": "{% for a in range(90000) %}{% for b in range(90000) %}" + "y" * 500 + "{% endfor %}{% endfor %}",
    "captured": "{% set x %}{% for a in range(99999) %}" + "y" * 5000 + "{% endfor %}{% endset %}",
    "product": "{{ 'x' * 3000000000 }}",
    "product of lists": "{{ ([1] * 3000000000) | length }}",
    "product of products": "{{ ('x' * 10000000) * 10000000 }}",
    "text in a list": "{{ ['x' * 1000000] * 1000000 }}",
    "joined": "{{ (['x' * 1000000] * 1000000) | join }}{{ 1 }}",
    "joined by a method": "{{ 'x'.join(['y' * 1000000] * 1000000) }}",
    "joined generator": "{{ (['x' * 1000000] * 1000000) | map('default', 1) | join(',') }}",
    "json": "{{ (['x' * 1000000] * 1000000) | tojson }}",
    "power": "{{ 10 ** 10000000000 }}",
    "power of powers": "{{ 10 ** 1000 ** 1000 }}",
    "sum": DOUBLING.replace("STEP", "ns.s + ns.s"),
    "sum of lists": DOUBLING.replace("STEP", "[ns.s] + [ns.s]") + "{{ ns.s }}",
    "nested lists": DOUBLING.replace("STEP", "[ns.s, ns.s]") + "{{ ns.s }}",
    "nested lists as JSON": DOUBLING.replace("STEP", "[ns.s, ns.s]") + "{{ ns.s | tojson }}",
    "equal lists": DOUBLING.replace("STEP", "[ns.s, ns.s]").replace("s='", "t='x', s='").replace(
        "{% endfor %}", "{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.s == ns.t }}"
    ),
    "hashed tuples": DOUBLING.replace("STEP", "(ns.s, ns.s)") + "{{ {ns.s: 1} }}",
    "nested dictionaries": DOUBLING.replace("STEP", "dict(a=ns.s, b=ns.s)") + "{{ ns.s == 1 }}",
    "concatenation": DOUBLING.replace("STEP", "ns.s ~ ns.s"),
    "replace": DOUBLING.replace("STEP", "ns.s.replace('', ns.s)"),
    "replace filter": DOUBLING.replace("STEP", "ns.s | replace('x', ns.s)"),
    "format": DOUBLING.replace("STEP", "'{0}{0}'.format(ns.s)"),
    "format filter": DOUBLING.replace("STEP", "'%s%s' | format(ns.s, ns.s)"),
    "capture": DOUBLING.replace("{% set ns.s = STEP %}", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    "kept texts": DOUBLING.replace("STEP", "[ns.s, 'x' * 9000000 ~ i]"),
    "width": "{{ '%3000000000d' % 1 }}",
    "width as an argument": "{{ '%*d' % (3000000000, 1) }}",
    "width in format": "{{ '{:3000000000}'.format(1) }}",
    "nested width": "{{ '{:{}}'.format(1, 3000000000) }}",
    "ljust": "{{ 'x'.ljust(3000000000) }}",
    "zfill": "{{ 'x'.zfill(3000000000) }}",
    "bytes": "{{ 'x'.encode().ljust(3000000000) }}{{ (5).to_bytes(3000000000, 'big') }}",
    "expandtabs": "{{ '\t\t'.expandtabs(tabsize=2000000000) }}",
    "translate": "{{ ('x' * 9999).translate({120: 'y' * 9999999}) }}",
    "center": "{{ 'x' | center(3000000000) }}",
    "indent": "{{ 'x\ny' | indent(width=3000000000) }}",
    "json indent": "{{ [1, 2] | tojson(indent=3000000000) }}",
    "batch": "{{ [1] | batch(3000000000, 'x') | list | length }}",
    "strftime": "{{ strftime_now('%3000000000Y') }}",
    "long": "x" * 1_000_001,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_has_bounds(name, monkeypatch):
    """In steps, in characters and in seconds; none comes near the memory that it asks for."""
    import resource

    monkeypatch.setattr(limits, "SECONDS", 0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match=r"was stopped: it (makes|takes) |at most 1,000,000"):
        ours(HOSTILE[name], [USER])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB


def test_a_long_conversation_is_within_the_bounds():
    turns = [{"role": role, "content": "word " * 100} for _ in range(2000) for role in ("user", "assistant")]
    assert len(ours(TEMPLATES["v3_1"], turns)) > 2_000_000


def test_threads_have_bounds_of_their_own():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: ours(TEMPLATES["v3"], TURNS), range(40)))
    assert len(set(texts)) == 1
