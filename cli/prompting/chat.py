"""A conversation on a terminal: lines in, answers as they come, and what was said kept for the next one."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import sys
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import click

from deepseek_trt.cli.printing.output import print_line, say, say_error, write, write_model_text
from deepseek_trt.cli.prompting.speed import Speed
from deepseek_trt.engines.generation.answer import Answer, Piece
from deepseek_trt.engines.generation.request import Event
from deepseek_trt.export.errors import DeepseekTrtError, RequestError

if TYPE_CHECKING:
    from deepseek_trt.cli.prompting.prompts import ChatOptions
    from deepseek_trt.engines.generation.llm import LLM
    from deepseek_trt.engines.generation.params import SamplingParams
    from deepseek_trt.engines.text.text import Text

Events = SimpleQueue[Event | Exception | None]  # None: Ctrl-C

HELP = """/reset  forget the conversation
/quit   leave; Ctrl-D does so, too
/help   this
Ctrl-C stops an answer, and clears a line that is being written.
A line that ends with \\ goes on in the next one; pasted lines are one message."""


class Chat:
    """Asks and answers until the terminal ends. The engine runs in a thread of its own, where no Ctrl-C reaches it."""

    def __init__(self, llm: LLM, text: Text, params: SamplingParams, options: ChatOptions) -> None:
        """RequestError where options want a template and there is none; without them, lines are then continued."""
        self._llm, self._text, self._params, self._options = llm, text, params, options
        self._templated = bool(options.on or options.given or text.chat.named)
        if self._templated:
            options.check(text)
        self._said: list[dict[str, Any]] = options.start()
        self._answers = 0

    def run(self) -> None:
        """Return at the end of the input, or at /quit; Ctrl-C ends a line, not the program."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self._run()
        finally:
            signal.signal(signal.SIGINT, before)

    def _run(self) -> None:
        with contextlib.suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401 (input then edits lines, keeps them, and takes pasted ones whole)
        self._llm.start()
        say("/help says what there is, Ctrl-D leaves")
        if not self._templated:
            say("the bundle has no chat template: each line is continued as it is")
        while True:
            try:
                if not self._round():
                    return
            except KeyboardInterrupt:
                write("\n")
            except DeepseekTrtError as error:
                say_error(f"{error.sentence}{_AFTER_ERROR if self._answers else ''}")

    def _round(self) -> bool:
        """One message, or one command; False to leave."""
        try:
            line = _ask()
        except EOFError:
            write("\n")
            return False
        if not line.strip():
            return True
        if not re.fullmatch(r"/[a-z]+\s*", line):
            self._turn(line)
            return True
        return self._command(line.strip())

    def _command(self, command: str) -> bool:
        if command == "/reset":
            self._said, self._answers = self._options.start(), 0
            say("the conversation is forgotten")
        elif command != "/quit":
            help_of = HELP if command == "/help" else f"{command}: no such command; /help says what there is"
            for line in help_of.splitlines():
                print_line(line)
        return command != "/quit"

    def _turn(self, line: str) -> None:
        """Answer, and keep question and answer; an error forgets the question."""
        asked = [*self._said, {"role": "user", "content": line}]
        with _interrupts() as events:
            ids = self._options.encode(self._text, asked) if self._templated else self._text.encode(line)
            answer = self._answer(ids, events)
            if self._templated and answer:
                self._said = [*asked, {"role": "assistant", "content": answer}]
                self._answers += 1

    def _answer(self, ids: list[int], events: Events) -> str:
        """Show the answer as it comes, and return it as far as it came."""
        params = dataclasses.replace(self._params, seed=self._params.seed + self._answers)
        pieces, speed, answer = list[Piece](), Speed(), Answer(self._text, params)
        ticket = self._llm.submit(ids, params, events.put)
        try:
            while not (pieces and pieces[-1].finish_reason):
                event = events.get()
                if event is None:
                    break
                piece = answer.piece(event) if not isinstance(event, Exception) else event
                if isinstance(piece, Exception):
                    raise piece
                pieces.append(piece)
                speed.tick()
                write_model_text(piece.text)
        finally:
            self._llm.cancel(ticket)
            write("\n")
        say(f"({speed.line}{self._ending(pieces, len(ids))})")
        return "".join(piece.text for piece in pieces)

    def _ending(self, pieces: list[Piece], prompt: int) -> str:
        """Why an answer ended that the model did not end."""
        reason = pieces[-1].finish_reason if pieces else None
        if reason is None:
            return ", stopped"
        if reason != "length":
            return ""
        if len(pieces) < self._params.max_new_tokens:
            return f", the model's {prompt + len(pieces)} tokens are full: /reset"
        return f", cut at --max-new-tokens {self._params.max_new_tokens}"


_AFTER_ERROR = " (the message is forgotten; /reset forgets the conversation before it, too)"


def _ask() -> str:
    """A message: a line, and what follows lines that end with a backslash. RequestError where it is not UTF-8."""
    try:
        line = _input("> ")
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{_input('. ')}"
        line.encode()
    except UnicodeError as error:
        raise RequestError(f"the line is not UTF-8 ({error.reason}): write it again") from None  # type: ignore[attr-defined]
    return line


def _input(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)  # the answers go elsewhere
    return input()


@contextlib.contextmanager
def _interrupts() -> Iterator[Events]:
    """Give a queue into which Ctrl-C puts None, instead of raising KeyboardInterrupt wherever the program is."""
    events: Events = SimpleQueue()
    before = signal.signal(signal.SIGINT, lambda *_: events.put(None))
    try:
        yield events
    finally:
        signal.signal(signal.SIGINT, before)
