"""Tool calls as V3 and V3.1 write them, between the tokens that their tokenizers have for it.

Calls stand between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>, and each of them between marks of its own:
V3 and R1: function<｜tool▁sep｜>NAME, a line with ```json, the arguments, and a line with ```
V3.1: NAME<｜tool▁sep｜>ARGUMENTS
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.engines.text.parsing.said import CallPart, Said
from deepseek_trt.engines.text.parsing.scanner import Scanner

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
MARKS = frozenset((CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR))


@dataclass(frozen=True)
class ToolFormat:
    """What stands before a call's name, between it and its arguments, and after them."""

    name: str
    before: str
    between: str
    after: str


V3 = ToolFormat("deepseek_v3", f"{CALL_BEGIN}function{SEPARATOR}", "\n```json\n", f"\n```{CALL_END}")
V31 = ToolFormat("deepseek_v31", CALL_BEGIN, SEPARATOR, CALL_END)
FORMATS = {form.name: form for form in (V3, V31)}


class ToolParser:
    """Text before the calls is content, and so is what looks like a call and is none; white space between is left out.

    Arguments are the model's own text: JSON where it keeps to it.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._form, self._scanner = form, Scanner()
        self._state = self._content
        self._calls = 0
        self._more = True  # whether the last state got on

    def push(self, text: str) -> Said:
        self._scanner.feed(text)
        said = Said()
        self._more = True
        while self._more:
            said += self._state()
        return said

    def flush(self) -> Said:
        self._scanner.ended = True
        return self.push("")

    def _content(self) -> Said:
        text, mark = self._scanner.until(CALLS_BEGIN)
        self._more = mark is not None
        if mark:
            self._state = self._between
        return Said(text)

    def _between(self) -> Said:
        """Before a call, or after the last."""
        self._scanner.skip_space()
        self._more = not self._scanner.empty
        begins = self._scanner.begins(self._form.before) if self._more else False
        ends = self._scanner.begins(CALLS_END) if self._more and not begins else False
        if begins:
            self._state = self._name
        elif ends:
            self._state = self._after
        elif begins is None or ends is None:
            self._more = False
        elif self._more:  # neither: no call
            self._state = self._content
        return Said()

    def _name(self) -> Said:
        found = self._scanner.before(self._form.between)
        self._more = found is not None
        if found is None:
            return Said(self._form.before + self._scanner.rest()) if self._scanner.ended else Said()
        self._calls += 1
        self._state = self._arguments
        return Said(calls=(CallPart(self._calls - 1, name=found[0].strip()),))

    def _arguments(self) -> Said:
        text, mark = self._scanner.until(self._form.after, CALL_END)
        self._more = mark is not None
        if mark:
            self._state = self._between
        return Said(calls=(CallPart(self._calls - 1, arguments=text),)) if text else Said()

    def _after(self) -> Said:
        """After all calls: white space belongs to nothing."""
        self._scanner.skip_space()
        self._more = not self._scanner.empty
        if self._more:
            self._state = self._content
        return Said()
