"""A request by any server's names: each name is another one of an own input, changes nothing, or is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.serving.names.page import names_part, with_part
from deepseek_trt.engines.serving.names.reading import ModelIds, own_tensors
from deepseek_trt.engines.serving.names.table import KNOWN, NAMES, OWN, TAKEN
from deepseek_trt.engines.serving.request import parse_request
from deepseek_trt.export.errors import RequestError

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
IDS = ModelIds(end=(1, 5), pad=2)
DTYPES = {"TYPE_STRING": object, "TYPE_INT32": np.int32, "TYPE_UINT64": np.uint64, "TYPE_BOOL": bool}
DTYPES |= {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_UINT8": np.uint8}


class Letters:
    most_bytes = 4000

    def encode_prompt(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def token_id(self, written):
        return {"<think>": 23, "</think>": 24}.get(written)

    def decode(self, ids):
        return "\n" if list(ids) == [25] else "x"


def tensor(name, value):
    field = OWN.get(name) or KNOWN[name].field
    many = value if isinstance(value, list) else [value]
    return np.array([[v.encode() if isinstance(v, str) else v for v in many]], DTYPES[field.data_type])


def tensors(**values):
    return {name: tensor(name, value) for name, value in values.items()}


def parsed(parameters=None, /, **values):
    return parse_request(tensors(text_input="a", **values), parameters or {}, Letters(), ids=IDS)


def params(parameters=None, /, **values):
    return parsed(parameters, **values).params


def of_json(**keys):
    return params(sampling_parameters=json.dumps(keys))


def test_the_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert with_part(page) == page, "run: python -m deepseek_trt.engines.serving.names.page docs/serving.md"
    assert names_part() in page


def test_no_name_is_two_things():
    assert len(KNOWN) == sum(map(len, NAMES.values()))
    assert not set(KNOWN) & set(OWN)
    assert len({field.name for field in TAKEN}) == len(TAKEN)


VALUES = {"TYPE_STRING": "x", "TYPE_INT32": 1, "TYPE_UINT64": 3, "TYPE_BOOL": True, "TYPE_FP32": 0.5}


@pytest.mark.parametrize("name", [name.name for name in KNOWN.values() if name.same_as])
def test_another_name_of_an_own_input(name):
    known = KNOWN[name]
    value = VALUES[known.data_type]
    assert list(own_tensors(tensors(**{name: value}), {})) == [known.same_as]
    assert own_tensors(tensors(**{name: value, known.same_as: value}), {}).keys() == {known.same_as}
    other = False if value is True else value + value
    words = f"{name} and {known.same_as}|{known.same_as} and {name}"
    with pytest.raises(RequestError, match=words):
        own_tensors(tensors(**{name: value, known.same_as: other}), {})
    with pytest.raises(RequestError, match=words):
        own_tensors(tensors(**{known.same_as: value}), {name: other})


PLAIN = [
    name for name in KNOWN.values() if not name.same_as and name.name not in ("guided_decoding", "structured_outputs")
]
ODD = {"TYPE_STRING": "odd", "TYPE_INT32": 77, "TYPE_UINT64": 77, "TYPE_BOOL": True, "TYPE_FP32": 7.5}
ODD |= {"TYPE_FP16": 7.5, "TYPE_UINT8": 7}


@pytest.mark.parametrize("known", PLAIN, ids=lambda known: known.name)
def test_values_that_change_nothing_are_taken_and_others_refused(known):
    given = (lambda value: own_tensors(tensors(**{known.name: value}), {}, IDS)) if known.declared else (
        lambda value: own_tensors({}, {known.name: value}, IDS)
    )  # fmt: skip
    neutral = {"end": (1, 5), "pad": (2, 1), None: known.neutral}[known.of_model]
    for value in neutral:
        assert given(value) == {}
    if known.data_type == "TYPE_BOOL":
        refused = [value for value in (True, False) if value not in neutral]
    else:
        refused = [ODD[known.data_type]]
    for value in refused:
        with pytest.raises(RequestError, match=f"{known.name} .*not supported, as {re.escape(known.why)}"):
            given(value)


def test_sampling_parameters_as_vllm_writes_them():
    made = of_json(
        n=1, temperature="0.5", top_p=0.25, top_k=-1, max_tokens="9", min_tokens=2, seed=2**64 - 1, stop="end",
        stop_token_ids=[3, 4], ignore_eos=True, logit_bias={"7": -100}, repetition_penalty=1.5, best_of=None,
        skip_special_tokens=True, use_beam_search=False, length_penalty=1.0, logprobs=None, bad_words=[],
    )  # fmt: skip
    assert (made.temperature, made.top_p, made.top_k, made.max_new_tokens, made.min_tokens) == (0.5, 0.25, 0, 9, 2)
    assert (made.seed, made.stop, made.stop_token_ids, made.ignore_eos) == (2**64 - 1, ("end",), (3, 4), True)
    assert (made.logit_bias, made.repetition_penalty) == (((7, -100.0),), 1.5)
    assert of_json(stop=["a", "b"]).stop == ("a", "b")
    assert params({"sampling_parameters": '{"max_tokens": 4}'}).max_new_tokens == 4


@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ({"guided_decoding": {"regex": "a+"}}, "regex", "a+"),
        ({"guided_decoding": '{"json": {"type": "object"}, "backend": "auto", "choice": null}'}, "json_schema", None),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
        ({"structured_outputs": {"grammar": "start: A"}}, "grammar", "start: A"),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
        ({"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": "root ::= x"}, "grammar", None),
        ({"guided_decoding_guide_type": "json"}, "json_schema", '{"type": "object"}'),
    ],
)
def test_guides(keys, kind, text):
    guide = of_json(**keys).guide
    assert guide.kind == kind
    assert guide.after == ""
    assert text is None or guide.text == text


@pytest.mark.parametrize(("prompt", "after"), [("ax", "</think>"), ("axz", "</think>"), ("xa", ""), ("x", "</think>")])
def test_a_guide_holds_after_the_reasoning_that_a_prompt_has_opened(prompt, after):
    guided = tensors(text_input=prompt, guided_decoding_guide_type="regex", guided_decoding_guide="a")
    assert parse_request(guided, {}, Letters()).params.guide.after == after


def test_outputs():
    assert parsed().unwanted == {"output_log_probs", "cum_log_probs", "cumulative_logprob"}
    assert parsed(return_log_probs=True).unwanted == {"cumulative_logprob"}
    summed = parsed(return_cumulative_logprob=True, return_finish_reason=False)
    assert summed.unwanted == {"output_log_probs", "cum_log_probs", "finish_reason"}
    assert summed.params.logprobs == 0


def test_streaming_is_stream_and_the_echo_has_three_names():
    assert parsed(streaming=True).stream
    assert parsed(sampling_param_exclude_input_from_output=False).echo == "a"
    assert parsed({"exclude_input_in_output": "False"}).echo == "a"


@pytest.mark.parametrize(
    ("parameters", "values", "words"),
    [
        ({}, {"sampling_parameters": "{"}, "sampling_parameters is not JSON"),
        ({}, {"sampling_parameters": "[1]"}, "no JSON object"),
        ({}, {"sampling_parameters": '{"top_p": 1, "top_p": 1}'}, "'?top_p'? twice"),
        ({}, {"sampling_parameters": '{"temprature": 1}'}, "sampling_parameters: key temprature: not known"),
        ({}, {"sampling_parameters": '{"sampling_parameters": {}}'}, "key sampling_parameters: not known"),
        ({"sampling_parameters": "{}"}, {"sampling_parameters": "{}"}, "as an input and as a parameter"),
        ({}, {"sampling_parameters": '{"max_tokens": 1e400}'}, "finite"),
        ({}, {"sampling_parameters": '{"max_tokens": 2.5}'}, "max_tokens 2.5: must be a whole number"),
        ({}, {"sampling_parameters": '{"max_tokens": true}'}, "max_tokens True: must be a whole number"),
        ({}, {"sampling_parameters": '{"max_tokens": 4294967301}'}, "max_tokens 4294967301: must lie between"),
        ({}, {"sampling_parameters": '{"seed": -1}'}, "seed -1: must lie between 0"),
        ({}, {"sampling_parameters": '{"temperature": "hot"}'}, "temperature 'hot': must be a number"),
        ({}, {"sampling_parameters": '{"temperature": 1e200}'}, "temperature"),
        ({}, {"sampling_parameters": '{"ignore_eos": 1}'}, "ignore_eos 1: must be true or false"),
        ({}, {"sampling_parameters": '{"stop": [1]}'}, "stop 1: must be text"),
        ({}, {"sampling_parameters": '{"top_p": [0.5]}'}, "top_p .*must be a number"),
        ({}, {"sampling_parameters": '{"bad_words": ["no"]}'}, "bad_words"),
        ({}, {"sampling_parameters": '{"logprobs": 1}'}, "logprobs 1: not supported"),
        ({}, {"logit_bias": "[]"}, "logit_bias holds no JSON object"),
        ({}, {"logit_bias": '{"x": 1}'}, "logit_bias 'x'"),
        ({}, {"logit_bias": '{"1": "a"}'}, "logit_bias"),
        ({}, {"logit_bias": '{"1": 1, "01": 2}'}, "twice"),
        ({}, {"guided_decoding_guide": "a"}, "guided_decoding_guide_type ''"),
        ({}, {"guided_decoding_guide_type": "structural_tag", "guided_decoding_guide": "a"}, "'structural_tag'"),
        ({}, {"guided_decoding_guide_type": "regex"}, "guided_decoding_guide is missing"),
        ({}, {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"}, "guide is not JSON"),
        ({}, {"guided_decoding_guide_type": "choice", "guided_decoding_guide": "[1]"}, "list of texts"),
        ({"structured_outputs": '{"regex": "a", "choice": ["b"]}'}, {}, "ask for several"),
        ({"structured_outputs": '{"structural_tag": "a"}'}, {}, "'structural_tag' is not supported"),
        ({"guided_decoding": "7"}, {}, "must be an object"),
        ({"max_tokens": 4}, {"max_tokens": 5}, "max_tokens twice"),
        ({"timeout_ms": 0}, {}, "timeout_ms 0"),
        ({"stop": "\ud800"}, {}, "stop"),
    ],
)
def test_what_is_wrong_is_said(parameters, values, words):
    with pytest.raises(RequestError, match=words):
        parsed(parameters, **values)
