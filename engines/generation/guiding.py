"""Guiding: a Guide as masks of the tokens that may come next, by llguidance."""

from __future__ import annotations

import json
import os
import queue
import re
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import BackendError, RequestError
from deepseek_trt.plugins.cpu.sampling_row import SamplingRow

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

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
_MASKERS = 8  # threads that make masks, at most
Words = npt.NDArray[np.uint32]
_LONGEST_REASON = 300  # characters


class Guides:
    """Compiles guides for one tokenizer, whose tables are made with the first. For several threads."""

    def __init__(self, text: Text, vocab_size: int, stops: Sequence[int]) -> None:
        """`stops` are the tokens that end an answer; masks have a bit for each of `vocab_size` tokens."""
        self._text, self._vocab, self._stops = text, vocab_size, list(stops)
        self._making = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._ahead: _Ahead | None = None

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

    def begin(self, rows: Sequence[RowGuide]) -> None:
        """Make the next masks of rows whose tokens were picked, meanwhile: the model computes most of a step's time."""
        due = [row for row in rows if row.due]
        if due and self._ahead is None:
            self._ahead = _Ahead()
        if due and self._ahead is not None:
            self._ahead.begin(due, (self._vocab + 31) // 32)

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

    Where the answer is whole, the mask leaves the tokens that end it alone. Up to the token `after` it leaves all
    others.
    """

    def __init__(self, matcher: LLMatcher, vocab: int, stops: Sequence[int], after: int | None) -> None:
        self.matcher, self._after = matcher, after
        self.picked: int | None = None  # the token that the matcher has not been told of
        self._masks = np.full((1, (vocab + 31) // 32), 2**32 - 1, dtype=np.uint32)
        self._index = 0  # of the row's mask in _masks
        self._masks = self._without(np.array(stops))[None]
        self._place = self._masks.ctypes.data
        self.due = after is None  # whether the mask is not the next token's
        self._job: _Job | None = None  # that makes it
        self._failed = False  # whether the matcher cannot go on

    def prepare(self, row: SamplingRow) -> None:
        """Have the row's mask be that of its next token. BackendError where the guide cannot go on."""
        if self.due:
            self._wait()
            self.due = False
            if row.made < row.min_tokens and not self._without(row.bans()).any():
                row.min_tokens = 0  # the answer must end here, short as it is
        row.mask = self._place

    def consume(self, token: int) -> None:
        """`token` was picked."""
        if self._after is None:
            self.picked, self.due = token, True
        elif token == self._after:
            self._after, self.due = None, True

    def expect(self, job: _Job) -> None:
        """The job makes the next mask."""
        self._job = job

    def accept(self, masks: Words, index: int, place: int) -> None:
        """The job has made it: of `masks` the one with this index, at this address."""
        self._masks, self._index, self._place = masks, index, place
        self._failed = self.matcher.is_error()

    def _wait(self) -> None:
        job = self._job
        if job is None:
            if self.picked is not None:
                self.matcher.consume_token(self.picked)
            masks = np.zeros((1, self._masks.shape[1]), dtype=np.uint32)
            place = masks.ctypes.data
            self.matcher.unsafe_compute_mask_ptr(place, masks.nbytes)
            self.accept(masks, 0, place)
        else:
            self._job = None
            job.wait()
        self.picked = None
        if self._failed:
            raise BackendError(f"the answer's guide cannot go on: {_reason(self.matcher.get_error())}")

    def _without(self, tokens: Any) -> Words:
        mask: Words = self._masks[self._index].copy()
        np.bitwise_and.at(mask, tokens // 32, ~(np.uint32(1) << (tokens % 32).astype(np.uint32)))
        return mask


class _Job:
    """The next masks of some rows. `done` is released with them; whoever has not waited for it sees `ready`.

    All that it takes is done in `run`, while the model computes: the engine's thread only makes the object.
    """

    __slots__ = ("done", "error", "ready", "rows", "words")

    def __init__(self, rows: Sequence[RowGuide], words: int) -> None:
        self.rows, self.words = rows, words
        self.ready, self.error = False, ""
        self.done = threading.Lock()
        self.done.acquire()

    def run(self, executor: LLExecutor) -> None:
        try:
            self._run(executor)
        except Exception as error:  # every row that waits gets it
            self.error = f"{type(error).__name__}: {error}"
        self.ready = True
        self.done.release()

    def _run(self, executor: LLExecutor) -> None:
        told = [(row.matcher, row.picked) for row in self.rows if row.picked is not None]
        if told:
            executor.consume_token_par(told)
        masks = np.zeros((len(self.rows), self.words), dtype=np.uint32)
        first, size = masks.ctypes.data, masks.strides[0]
        wanted = [(row.matcher, index) for index, row in enumerate(self.rows)]
        executor.unsafe_compute_mask_ptr(wanted, first, size, len(masks))
        for index, row in enumerate(self.rows):
            row.accept(masks, index, first + index * size)

    def wait(self) -> None:
        """Return when the masks are there."""
        if not self.ready:
            with self.done:
                pass
        if self.error:
            raise BackendError(f"the answer's guide cannot go on: {_reason(self.error)}")


class _Ahead:
    """A thread that has masks made, by several threads of llguidance's at once. It ends when this goes."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        arguments = (self._jobs, _library().LLExecutor(min(os.cpu_count() or 1, _MASKERS)))
        threading.Thread(target=_run_jobs, args=arguments, name="deepseek-trt-guides", daemon=True).start()
        self._end = weakref.finalize(self, self._jobs.put, None)

    def begin(self, rows: Sequence[RowGuide], words: int) -> None:
        job = _Job(rows, words)
        for row in rows:
            row.expect(job)
        self._jobs.put(job)


def _run_jobs(jobs: queue.SimpleQueue[_Job | None], executor: LLExecutor) -> None:
    while (job := jobs.get()) is not None:
        job.run(executor)


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
