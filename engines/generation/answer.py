"""Answer: a request's events as pieces of text, and the whole as a Result."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.request import Event, FinishReason
from deepseek_trt.engines.text.stops import StopText
from deepseek_trt.engines.text.stream import TextStream
from deepseek_trt.engines.text.text import Text
from deepseek_trt.plugins.cpu.sampling_row import TopLogprobs, unpack


@dataclass(frozen=True)
class Piece:
    """One token of an answer and the text that can be shown with it, possibly none.

    logprob and top_logprobs (id, logprob), best first, are there where the request asked for them; likeliest are the
    latter, packed. finish_reason is "stop" (a stop token or a stop string) or "length" on the last piece, else None.
    """

    text: str
    token_id: int
    finish_reason: FinishReason | None
    logprob: float | None = None
    likeliest: bytes = b""

    @property
    def top_logprobs(self) -> TopLogprobs:
        return unpack(self.likeliest)


@dataclass(frozen=True)
class Result:
    """A whole answer. text is None where the bundle has no tokenizer.

    token_ids hold the stop token, and all tokens that a stop string was made of; text holds neither.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[TopLogprobs, ...] | None

    @classmethod
    def of(cls, prompt_ids: Sequence[int], pieces: Iterable[Piece], has_text: bool) -> Result:
        """All pieces of one answer as a whole."""
        made = tuple(pieces)
        reason = made[-1].finish_reason
        assert reason is not None
        logprobs = tuple(p.logprob for p in made if p.logprob is not None)
        return cls(
            prompt_ids=tuple(prompt_ids),
            token_ids=tuple(p.token_id for p in made),
            text="".join(p.text for p in made) if has_text else None,
            finish_reason=reason,
            logprobs=logprobs or None,
            top_logprobs=tuple(p.top_logprobs for p in made) if logprobs else None,
        )


class Answer:
    """Turns a request's events into pieces, with text up to the first stop."""

    def __init__(self, text: Text | None, params: SamplingParams, shown: Container[str] = ()) -> None:
        """`shown` are texts of special tokens that are shown all the same: a parser of the answer looks for them."""
        self._stream, self._shown = text.stream() if text else None, shown
        self._stops = StopText(params.stop)
        self._min_tokens = params.min_tokens
        self._made = 0

    def piece(self, event: Event) -> Piece | Exception:
        """The event's piece, or the error of a tokenizer that cannot decode: this request's, not the batch's."""
        try:
            return self._piece(event)
        except Exception as error:  # tokenizers raises bare ones
            return error

    def _piece(self, event: Event) -> Piece:
        self._made += 1
        text, finished = "", event.finished
        if self._stream:
            text, finished = self._text(self._stream, event)
        return Piece(text, event.token, finished, event.logprob, event.likeliest)

    def _text(self, stream: TextStream, event: Event) -> tuple[str, FinishReason | None]:
        """What can be shown, and why the answer ends: a stop token has no text, and the last token leaves none back."""
        text, armed = "", self._made >= self._min_tokens
        if event.finished != "stop":
            part = stream.step(event.token)
            text = self._stops.push(part.text, armed, part.hidden and part.text not in self._shown)
        if event.finished:
            text += self._stops.push(stream.flush(), armed)
        if self._stops.found:
            return text, "stop"
        return text + (self._stops.flush() if event.finished else ""), event.finished
