"""Guides: what comes out has the form, whatever the logits; what is no guide is said in the caller's thread."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance", reason="the extra `guided` is not installed")

from deepseek_trt import LLM, SamplingParams  # noqa: E402
from deepseek_trt.engines.generation.guide import Guide  # noqa: E402
from deepseek_trt.engines.generation.guiding import Guides  # noqa: E402
from deepseek_trt.engines.generation.sampling import Sampler, sample_rows  # noqa: E402
from deepseek_trt.engines.text.text import Text  # noqa: E402
from deepseek_trt.export.bundle.folder import Bundle  # noqa: E402
from deepseek_trt.export.errors import RequestError  # noqa: E402
from deepseek_trt.plugins.cpu.library import cpu_library  # noqa: E402
from deepseek_trt.plugins.cpu.sampler import load_sampler  # noqa: E402

VOCAB, EOS = 4096, 1


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of):
    return bundle_of(demo_checkpoint).path


@pytest.fixture(scope="module")
def guides(demo):
    return Guides(Text(Bundle.open(demo)), VOCAB, [EOS])


@pytest.fixture(scope="module")
def text(demo):
    return Text(Bundle.open(demo))


def drawn_schema(rng, depth=0):
    """A schema of bounded answers: random logits end no text that may go on."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * (depth < 3))
    if kind == "object":
        names = [f"k{i}" for i in range(rng.integers(0, 4))]
        required = [name for name in names if rng.random() < 0.6]
        properties = {name: drawn_schema(rng, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        least = int(rng.integers(0, 2))
        return {"type": "array", "items": drawn_schema(rng, depth + 1), "minItems": least, "maxItems": least + 2}
    if kind == "anyOf":
        return {"anyOf": [drawn_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "string":
        choices = [{"maxLength": 8}, {"minLength": 1, "maxLength": 4}, {"pattern": "^[a-z]{1,6}$"}, {"format": "date"}]
        return {"type": "string", **choices[rng.integers(len(choices))]}
    if kind == "integer":
        return {"type": "integer", "minimum": int(rng.integers(-50, 0)), "maximum": int(rng.integers(0, 5000))}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 1}
    if kind == "enum":
        return {"enum": ["a", 1, None, "Größe", True][: rng.integers(1, 6)]}
    return {"const": "only"} if kind == "const" else {"type": str(kind)}


def answer(guides, guide, rng, native=None, most=400, **params):
    """Tokens that are sampled of random logits under the guide; None where `most` were not enough."""
    sampler = Sampler(SamplingParams(most, temperature=1.0, **params), (), [EOS], guide=guides.compiled(guide))
    tokens = []
    while len(tokens) < most:
        ((token, *_),) = sample_rows([sampler], (3 * rng.normal(size=(1, VOCAB))).astype(np.float32), native)
        sampler.guide.consume(token)
        if token == EOS:
            return tokens
        tokens.append(token)
    return None


def check_schemas(guides, text, count):
    rng, whole = np.random.default_rng(count), 0
    native = load_sampler(library.path) if (library := cpu_library()).path else None
    for index in range(count):
        schema = drawn_schema(rng)
        tokens = answer(guides, Guide.json_schema(schema), rng, native if index % 2 else None)
        if tokens is not None:
            jsonschema.validate(json.loads(text.decode(tokens)), schema)
            whole += 1
    return whole


def test_random_schemas_on_random_logits_validate(guides, text):
    assert check_schemas(guides, text, 60) >= 54  # white space, or a number's digits, may take all tokens


@pytest.mark.slow
def test_a_thousand_random_schemas_on_random_logits_validate(guides, text):
    assert check_schemas(guides, text, 1000) >= 900


@pytest.mark.parametrize(
    ("guide", "wanted"),
    [
        (Guide("regex", r"[ab]{3}-\d{2}"), r"[ab]{3}-\d{2}"),
        (Guide.choice(["yes", "no", 'may"be', "Größe\n"]), 'yes|no|may"be|Größe\n'),
        (Guide("grammar", 'start: "x" ("," "y"){1,3}'), r"x(,y){1,3}"),
        (Guide("grammar", 'root ::= "x" ("y" | "z")'), r"x[yz]"),
        (Guide.json_schema({"type": "boolean"}), r"true|false"),
    ],
)
def test_other_guides_are_kept_to(guides, text, guide, wanted):
    rng = np.random.default_rng(3)
    for _ in range(5):
        assert re.fullmatch(wanted, text.decode(answer(guides, guide, rng)))


def test_min_tokens_does_not_break_the_form(guides, text):
    tokens = answer(guides, Guide.choice(["yes"]), np.random.default_rng(0), min_tokens=50)
    assert text.decode(tokens) == "yes"


def test_the_answer_is_free_up_to_a_token(guides, text):
    free = text.token_id("the") or 300
    written = text.token_bytes(free).decode()
    sampler = Sampler(SamplingParams(9), (), [EOS], guide=guides.compiled(Guide("choice", '["yes"]', written)))
    want = [5, 9, free]
    for token in want:
        logits = np.zeros((1, VOCAB), dtype=np.float32)
        logits[0, token] = 9
        assert sample_rows([sampler], logits)[0][0] == token
        sampler.guide.consume(token)
    rest = []
    while EOS not in rest:
        ((token, *_),) = sample_rows([sampler], np.zeros((1, VOCAB), dtype=np.float32))
        sampler.guide.consume(token)
        rest.append(token)
    assert text.decode(rest[:-1]) == "yes"


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Guide.json_schema({"type": "nothing"}), "Invalid type: nothing"),
        (Guide.json_schema({"not": {}}), 'Unimplemented keys: ."not"'),
        (Guide.json_schema({"uniqueItems": True, "x-guidance": {"lenient": True}}), "Unimplemented"),
        (Guide.json_schema({"$ref": "http://example.com/a"}), "does not fetch"),
        (Guide("json_schema", "{"), "guide json_schema"),
        (Guide("regex", "(a"), "unclosed group"),
        (Guide("regex", "(?=a)b"), "look-around"),
        (Guide("grammar", "start: nothing"), "unknown name"),
        (Guide("grammar", "???"), "guide grammar"),
        (Guide("choice", '["a"]', "</nothing>"), "is no token here"),
    ],
)
def test_what_is_no_guide_is_said(guides, guide, words):
    with pytest.raises(RequestError, match=words):
        guides.compiled(guide)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Guide("xml", "a"),
        lambda: Guide("regex", 5),
        lambda: Guide("regex", "a" * 300_000),
        lambda: Guide("regex", "\ud800"),
        lambda: Guide.choice([]),
        lambda: Guide.choice(["a", ""]),
        lambda: Guide.choice("abc"),
        lambda: Guide.json_schema({"a": {1, 2}}),
        lambda: Guide.json_schema({"a": float("nan")}),
        lambda: SamplingParams(guide="json"),
        lambda: SamplingParams(logit_bias={1: 101}),
        lambda: SamplingParams(logit_bias={-1: 1}),
        lambda: SamplingParams(logit_bias=((1, 2), (1, 3))),
        lambda: SamplingParams(logit_bias={"a": 1}),
    ],
)
def test_forms_that_are_wrong_in_themselves(make):
    with pytest.raises(RequestError):
        make()


def test_an_llm_answers_in_the_form_and_other_rows_as_alone(demo):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    guided = SamplingParams(60, temperature=0.8, seed=4, guide=Guide.json_schema(schema))
    free = SamplingParams(20, temperature=0.8, seed=5)
    with LLM.open(demo) as llm:
        (alone,) = llm.generate(["def add("], free)
        one, other = llm.generate(["Return a number", "def add("], [guided, free])
        jsonschema.validate(json.loads(one.text), schema)
        assert one.finish_reason == "stop"
        assert other == alone
        bad = SamplingParams(guide=Guide("regex", "("))
        with pytest.raises(RequestError, match="guide regex"):
            llm.generate(["a"], bad)
        form = Guide("regex", "[0-9]{4}")
        many = [SamplingParams(40, temperature=1.0, seed=i, guide=form if i % 2 else None) for i in range(12)]
        apart = [llm.generate(["a"], one)[0] for one in many]
        assert llm.generate(["a"] * 12, many) == apart
        assert all(re.fullmatch("[0-9]{4}", result.text) for result in apart[1::2])
        (biased,) = llm.generate(["a"], SamplingParams(3, logit_bias={77: 100}))
        assert biased.token_ids == (77, 77, 77)
        with pytest.raises(RequestError, match="logit_bias"):
            llm.generate(["a"], SamplingParams(3, logit_bias={5000: 1}))
