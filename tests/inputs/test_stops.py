"""Stops: strings that are or hold special tokens, token ids, and bytes that no more come after."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deepseek_trt.engines.generation.answer import Answer
from deepseek_trt.engines.generation.params import LONGEST_STOP, MOST_STOPS, SamplingParams
from deepseek_trt.engines.generation.request import Event
from deepseek_trt.engines.text.stops import StopText
from deepseek_trt.engines.text.stream import TextStream
from deepseek_trt.export.errors import RequestError

USER = "<｜User｜>"


def byte_level():
    """A token for each byte, and one special token, 256."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(USER, normalized=False, special=True)])
    return tokenizer


def metaspace():
    """Words with a space before them, of which the first one loses its own; SentencePiece's way."""
    words = ["▁the", "▁a", "s", "▁", "<x>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<x>"])
    return tokenizer


BYTES, METASPACE = byte_level(), metaspace()
SPECIAL = {256: USER}


class OfBytes:
    """As much of a Text as an Answer takes."""

    def stream(self):
        return TextStream(BYTES, SPECIAL)


def answer(ids, finished="length", **params):
    """The text of each piece, the whole and the reason, up to the piece that ends the answer."""
    made = Answer(OfBytes(), SamplingParams(max(len(ids), 1), **params))
    pieces = []
    for index, token in enumerate(ids):
        piece = made.piece(Event(0, token, finished if index == len(ids) - 1 else None))
        assert not isinstance(piece, Exception)
        pieces.append(piece.text)
        if piece.finish_reason:
            break
    return pieces, "".join(pieces), piece.finish_reason


def ids(text):
    return BYTES.encode(text).ids


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        (f"hello{USER}more", USER, "hello"),
        (f"hello{USER}more", f"hello{USER}", ""),
        (f"say foo{USER}bar baz", f"foo{USER}bar", "say "),
        (f"hello{USER}more", "User", "hello"),  # the token's text is written out, every part of it
        (f"a{USER}b{USER}c", f"{USER}c", "ab"),
        (f"a{USER}bcd", "cd", "ab"),
        (f"a{USER}{USER}b", USER * 2, "a"),
    ],
)
def test_stop_strings_see_special_tokens(text, stop, shown):
    """Stop strings are looked for in the text with special tokens written out; the shown text leaves them out."""
    assert answer(ids(text), stop=(stop,))[1:] == (shown, "stop")


@pytest.mark.parametrize("stop", ["ab", f"{USER}x", "never"])
def test_special_tokens_are_not_shown_where_nothing_stops(stop):
    assert answer(ids(f"a{USER}b{USER}"), stop=(stop,))[1:] == ("ab", "length")


def test_before_min_tokens_no_special_token_stops():
    assert answer(ids(f"{USER}ab{USER}c"), stop=(USER,), min_tokens=3)[1:] == ("ab", "stop")


@pytest.mark.parametrize("finished", ["length", "stop"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_unfinished_bytes_at_the_end(cut, finished):
    """As tokenizer.decode gives them; a stop token comes after the bytes and has no text."""
    made = ids("a🙂")[:-cut]
    ending = [*made, 256] if finished == "stop" else made
    pieces, text, reason = answer(ending, finished)
    assert (text, reason) == (BYTES.decode(made), finished)
    assert text == "a\ufffd"
    assert pieces[:1] == ["a"]


def test_a_character_around_a_special_token_is_put_together():
    begun, rest = ids("深")[:1], ids("深")[1:]
    tokens = [*begun, 256, *rest]
    assert answer(tokens)[1] == "深" == BYTES.decode(tokens)


BYTE_IDS = st.lists(st.one_of(st.integers(0, 256), st.sampled_from(ids("é深🙂\ufffd"))), max_size=80)


@settings(max_examples=300, deadline=None, database=None)
@given(BYTE_IDS, st.integers(0, 80))
def test_any_bytes_stream_as_they_decode(tokens, most):
    """Also where max_tokens ends the answer within a character."""
    made = tokens[:most]
    if made:
        assert answer(made)[1] == BYTES.decode(made)


@pytest.mark.parametrize(
    "tokens", [ids("\ufffd") * 200, [0x80] * 500, ids("🙂")[:2] * 300], ids=["U+FFFD", "x80", "halves"]
)
def test_many_bytes_that_are_no_text_cost_no_more_each(tokens):
    stream = TextStream(BYTES, SPECIAL)
    text = "".join(stream.step(token).text for token in tokens)
    assert len(stream._tokens) < 80
    assert text + stream.flush() == BYTES.decode(tokens)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.integers(0, 4), max_size=12))
def test_decoders_that_look_back_stream_as_they_decode(tokens):
    stream = TextStream(METASPACE, {4: "<x>"})
    parts = [part.text for part in map(stream.step, tokens) if not part.hidden]
    assert "".join(parts) + stream.flush() == METASPACE.decode(tokens)


PIECES = st.lists(st.tuples(st.text("ab", max_size=3), st.booleans()), max_size=8)


@settings(max_examples=200, deadline=None, database=None)
@given(PIECES, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_hidden_is_searched_and_not_shown(pieces, stops):
    """Against the whole at once: the stop that is complete first ends the text, the longest of several."""
    text = StopText(stops)
    shown = "".join(text.push(piece, hidden=hidden) for piece, hidden in pieces) + text.flush()
    whole = "".join(piece for piece, _ in pieces)
    marks = list(itertools.chain.from_iterable([hidden] * len(piece) for piece, hidden in pieces))
    found = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    kept = min(found)[1] if found else len(whole)
    assert shown == "".join(letter for letter, hidden in zip(whole[:kept], marks, strict=False) if not hidden)
    assert text.found == bool(found)


@pytest.mark.parametrize("stop", [("a",) * (MOST_STOPS + 1), ("a" * (LONGEST_STOP + 1),)], ids=["too many", "too long"])
def test_stops_are_bounded(stop):
    with pytest.raises(RequestError, match=f"at most {MOST_STOPS} strings, of at most {LONGEST_STOP} characters"):
        SamplingParams(stop=stop)
    SamplingParams(stop=("a" * LONGEST_STOP,) * MOST_STOPS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_new_tokens", value) for value in (True, 1.0, "8", None, float("nan"), 2**31)),
        *(("seed", value) for value in (1.5, "1", True)),
        *(("top_k", value) for value in (1.5, False, None)),
        *(("temperature", value) for value in ("hot", True, None, float("nan"), float("inf"), 10**400, 1j)),
        *(("top_p", value) for value in (float("nan"), True, "1")),
        *(("repetition_penalty", value) for value in (float("nan"), float("inf"), [1])),
        *(("logprobs", value) for value in (1.5, True, "2", 2**31)),
        *(("min_tokens", value) for value in (True, 1.5)),
        *(("stop", value) for value in (b"text", 3, "", (b"a",), (1,), ("",), {"a": 1}, None)),
        *(("stop_token_ids", value) for value in (3, "3", (1.5,), (True,), ("1",), (-1,))),
        *(("ignore_eos", value) for value in (1, None, "yes")),
    ],
)
def test_wrong_types_name_the_field(field, value):
    with pytest.raises(RequestError, match=f"^{field}"):
        SamplingParams(**{field: value})


def test_numbers_of_numpy_and_lists_are_taken():
    import numpy as np

    params = SamplingParams(
        np.int64(5),
        np.float32(0.5),
        np.int32(3),
        seed=np.uint64(2**63),
        stop=["a"],
        stop_token_ids=np.array([3]).tolist(),
    )
    assert params == SamplingParams(5, 0.5, 3, seed=2**63, stop=("a",), stop_token_ids=(3,))
    assert {type(params.max_new_tokens), type(params.top_k), type(params.seed)} == {int}
    assert type(params.temperature) is float
