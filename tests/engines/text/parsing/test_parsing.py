"""Reasoning and tool calls: what is found, and that it is the same however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_trt.engines.text.parsing.choose import Formats, choose_formats
from deepseek_trt.engines.text.parsing.said import Said, WholeCall, whole_calls
from deepseek_trt.engines.text.parsing.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, V3, V31
from deepseek_trt.export.errors import RequestError


def v3_call(name, arguments):
    return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


def v31_call(name, arguments):
    return f"{CALL_BEGIN}{name}{SEPARATOR}{arguments}{CALL_END}"


def read(formats, prompt, pieces, tools=True):
    """Content, reasoning and whole calls of an answer in these pieces."""
    parser = formats.parser(prompt, tools)
    said = sum((parser.push(piece) for piece in pieces), Said()) + parser.flush()
    for part in said.calls:
        assert part.name != ""
    return said.content, said.reasoning, whole_calls(said.calls)


BOTH3, BOTH31 = Formats(True, V3), Formats(True, V31)
TWO = [WholeCall("get_weather", '{"city": "Paris"}'), WholeCall("add", '{"a": [1, "```"]}')]
CASES = [
    (BOTH3, "User: hi<think>\n", "so\n</think>\n\nHello.", ("\n\nHello.", "so\n", [])),
    (BOTH3, "User: hi", "<think>so</think>Hello.", ("Hello.", "so", [])),
    (BOTH3, "User: hi", "\n <think>so</think>Hello.", ("Hello.", "so", [])),
    (BOTH3, "User: hi", " \nHello <think> a </think>", (" \nHello <think> a </think>", "", [])),
    (BOTH3, "User: hi</think>", "<think>a</think>", ("<think>a</think>", "", [])),
    (BOTH3, "<think>", "never ends </thin", ("", "never ends </thin", [])),
    (BOTH3, "User: hi", "<thi", ("<thi", "", [])),
    (BOTH3, "User: hi", "  ", ("  ", "", [])),
    (BOTH3, "User: hi", "", ("", "", [])),
    (Formats(), "<think>", "a</think>b", ("a</think>b", "", [])),
    (
        BOTH3,
        "<think>",
        "call it</think>Let me see.\n"
        + CALLS_BEGIN
        + v3_call("get_weather", '{"city": "Paris"}')
        + "\n"
        + v3_call("add", '{"a": [1, "```"]}')
        + CALLS_END,
        ("Let me see.\n", "call it", TWO),
    ),
    (
        BOTH31,
        "x</think>",
        CALLS_BEGIN + v31_call("get_weather", '{"city": "Paris"}') + v31_call("add", '{"a": [1, "```"]}') + CALLS_END,
        ("", "", TWO),
    ),
    (BOTH31, "</think>", CALLS_BEGIN + v31_call("f", "{}") + CALLS_END + "\n", ("", "", [WholeCall("f", "{}")])),
    (BOTH31, "</think>", CALLS_BEGIN + v31_call("f", "{}") + CALLS_END + " so", ("so", "", [WholeCall("f", "{}")])),
    (BOTH31, "</think>", CALLS_BEGIN + CALL_BEGIN + "f" + SEPARATOR + '{"a', ("", "", [WholeCall("f", '{"a')])),
    (BOTH31, "</think>", CALLS_BEGIN + CALL_BEGIN + "nam", (CALL_BEGIN + "nam", "", [])),
    (BOTH31, "</think>", CALLS_BEGIN + "no call", ("no call", "", [])),
    (BOTH31, "</think>", CALLS_BEGIN + CALLS_END, ("", "", [])),
    (BOTH31, "</think>", CALLS_BEGIN, ("", "", [])),
    (BOTH31, "</think>", "a < b <｜tool", ("a < b <｜tool", "", [])),
    (BOTH3, "</think>", CALLS_BEGIN + v3_call("f", "{}").replace("\n```", "", 2)[:-1], None),
]


@pytest.mark.parametrize(("formats", "prompt", "text", "wanted"), CASES)
def test_what_is_found_and_every_cut_gives_the_same(formats, prompt, text, wanted):
    whole = read(formats, prompt, [text])
    assert wanted is None or whole == wanted
    assert read(formats, prompt, list(text)) == whole
    for at in range(len(text)):
        assert read(formats, prompt, [text[:at], text[at:]]) == whole


def test_without_tools_in_the_request_nothing_is_a_call():
    text = CALLS_BEGIN + v31_call("f", "{}")
    assert read(BOTH31, "</think>", [text], tools=False) == (text, "", [])


MARKS = [CALLS_BEGIN, CALL_BEGIN, f"{CALL_BEGIN}function{SEPARATOR}", SEPARATOR, "\n```json\n", "\n```", CALL_END]
MARKS += [f"\n```{CALL_END}", CALLS_END, "<think>", "</think>", " ", "\n", "a", "{}", "<", "`", "｜>"]


@given(st.data(), st.sampled_from([BOTH3, BOTH31]), st.sampled_from(["<think>", "", "</think>"]))
def test_any_text_of_marks_reads_the_same_however_it_is_cut(data, formats, prompt):
    text = "".join(data.draw(st.lists(st.sampled_from(MARKS), max_size=16)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(formats, prompt, [text])
    assert read(formats, prompt, pieces) == whole
    assert read(formats, prompt, list(text)) == whole


def test_names_come_once_and_before_their_arguments():
    parser = BOTH31.parser("</think>", True)
    text = CALLS_BEGIN + v31_call("f", '{"a": 1}') + v31_call("g", "{}") + CALLS_END
    parts = [part for letter in text for part in parser.push(letter).calls]
    assert [part.index for part in parts] == sorted(part.index for part in parts)
    assert [(part.index, part.name) for part in parts if part.name is not None] == [(0, "f"), (1, "g")]
    assert [part.name is not None for part in parts[:2]] == [True, False]


V3_TEMPLATE = "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + t + '<｜tool▁sep｜>' + n + '\\n' + '```json' + a }}"
V31_TEMPLATE = "{{ '<｜tool▁call▁begin｜>' + n + '<｜tool▁sep｜>' + a }}{{ c.split('</think>') }}"


@pytest.mark.parametrize(
    ("template", "options", "wanted"),
    [
        ("{{ messages }}", {}, Formats()),
        (V3_TEMPLATE, {}, Formats(False, V3)),
        (V31_TEMPLATE, {}, Formats(True, V31)),
        (V31_TEMPLATE, {"reasoning": "off", "tools": "off"}, Formats()),
        ("", {"reasoning": "deepseek_r1", "tools": "deepseek_v3"}, Formats(True, V3)),
    ],
)
def test_the_template_tells_the_formats(template, options, wanted):
    assert choose_formats(template, **options) == wanted


@pytest.mark.parametrize("options", [{"reasoning": "x"}, {"tools": "hermes"}])
def test_other_names_are_refused(options):
    with pytest.raises(RequestError, match="must be one of"):
        choose_formats("", **options)
