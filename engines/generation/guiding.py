"""Guiding: a Guide as masks of the tokens that may come next, by llguidance."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import BackendError, RequestError
from deepseek_trt.plugins.cpu.sampling_row import SamplingRow

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Of JSON: without a bound a model may write white space for ever; keywords that are not known are said.
JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n]{0,20}",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)  # how a rule begins in llama.cpp's form
_LONGEST_REASON = 300  # characters


class Guides:
    """Compiles guides for one tokenizer, whose tables are made with the first. For several threads."""

    def __init__(self, text: Text, vocab_size: int, stops: Sequence[int]) -> None:
        """`stops` are the tokens that end an answer; masks have a bit for each of `vocab_size` tokens."""
        self._text, self._vocab, self._stops = text, vocab_size, list(stops)
        self._making = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compiled(self, guide: Guide) -> RowGuide:
        """A new one, for one answer. RequestError, with the reason, for a guide that is none."""
        if not self._stops:
            raise RequestError(f"guide {guide.kind}: config.json names no eos_token_id, which ends a guided answer")
        after = None
        if guide.after:
            after = self._text.token_id(guide.after)
            if after is None:
                raise RequestError(f"guide {guide.kind}: {guide.after!r}, after which it holds, is no token here")
        self._check_literals(guide)
        matcher = self._matcher(guide)
        if matcher.is_error():
            raise RequestError(f"guide {guide.kind}: {_reason(matcher.get_error())}")
        return RowGuide(matcher, self._vocab, self._stops, after)

    def _check_literals(self, guide: Guide) -> None:
        """Text that is one of the tokenizer's own tokens, such as </think>, cannot be spelled by others: llguidance
        would offer the token, and not know it again. A grammar can name such tokens.
        """
        text = guide.text if guide.kind != "grammar" else ""
        found = next((token for token in self._text.added_tokens if token in text), None)
        if found:
            raise RequestError(f"guide {guide.kind}: holds {found!r}, which is a token by itself: leave it out")

    def _matcher(self, guide: Guide) -> LLMatcher:
        llguidance = _library()
        with self._making:
            if self._tokenizer is None:
                self._tokenizer = llguidance.LLTokenizer(self._text.to_json(), self._vocab, self._stops)
        try:
            grammar = _grammar(llguidance, guide)
        except ValueError as error:
            raise RequestError(f"guide {guide.kind}: {_reason(str(error))}") from None
        matcher: LLMatcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        return matcher


class RowGuide:
    """One answer's guide: a mask before each token is picked, and told of it after.

    Where the answer is whole, the mask leaves the tokens that end it alone. Up to the token `after` it leaves all others.
    """

    def __init__(self, matcher: LLMatcher, vocab: int, stops: Sequence[int], after: int | None) -> None:
        self._matcher, self._after = matcher, after
        self._mask = np.full((vocab + 31) // 32, 2**32 - 1, dtype=np.uint32)
        self._fresh = after is not None
        self._mask = self._without(np.array(stops))

    def prepare(self, row: SamplingRow) -> None:
        """Have the row's mask be that of its next token. BackendError where the guide has become too complex."""
        row.mask = self._mask.ctypes.data
        if self._fresh:
            return
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise BackendError(f"the answer's guide cannot go on: {_reason(self._matcher.get_error())}")
        self._fresh = True
        bans = row.bans()
        if len(bans) and not self._without(bans).any():
            row.min_tokens = 0  # the answer must end here, short as it is

    def consume(self, token: int) -> None:
        """`token` was picked. BackendError where the guide does not have it."""
        if self._after is not None:
            if token == self._after:
                self._after, self._fresh = None, False
            return
        self._fresh = False
        if not self._matcher.consume_token(token):
            raise BackendError(f"the answer's guide does not allow token {token}: {_reason(self._matcher.get_error())}")

    def _without(self, tokens: Any) -> Any:
        mask = self._mask.copy()
        np.bitwise_and.at(mask, tokens // 32, ~(np.uint32(1) << (tokens % 32).astype(np.uint32)))
        return mask


def _grammar(llguidance: Any, guide: Guide) -> str:
    """The guide as llguidance takes it; ValueError for a few that are none, a matcher says it of the others."""
    matcher = llguidance.LLMatcher
    if guide.kind == "json_schema":
        return str(matcher.grammar_from_json_schema(guide.text, overrides=JSON_OPTIONS))
    if guide.kind == "regex":
        return str(matcher.grammar_from_regex(guide.text))
    if guide.kind == "choice":
        texts: list[str] = json.loads(guide.text)
        return str(matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts))))
    lark = _lark_of_gbnf(guide.text) if _GBNF.search(guide.text) else guide.text
    return str(matcher.grammar_from_lark(lark))


def _lark_of_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except Exception as error:  # the library raises what it comes to
        raise ValueError(f"llama.cpp's form is not kept to: {error}") from None


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RequestError("guided answers need llguidance: pip install 'deepseek-trt[guided]'") from None
    return llguidance


def _reason(sentence: str) -> str:
    line = " ".join(sentence.split())
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 3]}..."
