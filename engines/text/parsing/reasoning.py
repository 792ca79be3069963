"""Reasoning: <think>...</think> before the answer proper, as R1 and V3.1 write it."""

from __future__ import annotations

from deepseek_trt.engines.text.parsing.said import Parser, Said
from deepseek_trt.engines.text.parsing.scanner import Scanner

OPEN, CLOSE = "<think>", "</think>"


def opens_in(prompt: str) -> bool:
    """Whether a rendered prompt ends with the block open: the answer begins inside of it."""
    return prompt.rstrip().endswith(OPEN)


def closes_in(prompt: str) -> bool:
    """Whether a rendered prompt ends with the block closed: there is no thinking (V3.1's thinking=False)."""
    return prompt.rstrip().endswith(CLOSE)


class ReasoningParser:
    """Text in the block is reasoning; what comes after it goes to `then`, as does an answer that begins otherwise.

    White space before <think> belongs to nothing; tags themselves are left out, and text is otherwise as it was.
    """

    def __init__(self, then: Parser, opened: bool) -> None:
        """`opened` says that the prompt has opened the block."""
        self._then, self._scanner = then, Scanner()
        self._state, self._space = "thinking" if opened else "start", ""

    def push(self, text: str) -> Said:
        if self._state == "over":
            return self._then.push(text)
        self._scanner.feed(text)
        return self._step()

    def flush(self) -> Said:
        self._scanner.ended = True
        return self._step() + self._then.flush()

    def _step(self) -> Said:
        said = Said()
        if self._state == "start":
            said += self._start()
        if self._state == "thinking":
            text, mark = self._scanner.until(CLOSE)
            said += Said(reasoning=text)
            if mark:
                self._state = "over"
                said += self._then.push(self._scanner.rest())
        return said

    def _start(self) -> Said:
        self._space += self._scanner.skip_space()
        opened = self._scanner.begins(OPEN) if not self._scanner.empty else None
        if opened:
            self._state = "thinking"
        elif opened is False or self._scanner.ended:
            self._state = "over"
            return self._then.push(self._space + self._scanner.rest())
        return Said()
