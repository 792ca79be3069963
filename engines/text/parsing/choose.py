"""Which parsers a model's answers need, by its chat template or by name."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.engines.text.parsing.reasoning import CLOSE, OPEN, ReasoningParser, closes_in, opens_in
from deepseek_trt.engines.text.parsing.said import Parser, Plain
from deepseek_trt.engines.text.parsing.tools import FORMATS, MARKS, SEPARATOR, V3, V31, ToolFormat, ToolParser
from deepseek_trt.export.errors import RequestError

AUTO, OFF = "auto", "off"
REASONING_CHOICES = (AUTO, "deepseek_r1", OFF)
TOOL_CHOICES = (AUTO, *FORMATS, OFF)


@dataclass(frozen=True)
class Formats:
    """Whether answers hold reasoning, and how they call tools; None: they do not, or nobody knows how."""

    reasoning: bool = False
    tools: ToolFormat | None = None

    def marks(self, tools: bool) -> frozenset[str]:
        """Tokens whose text the parsers look for, be they special or not; `tools` as for `parser`."""
        thinking = frozenset((OPEN, CLOSE)) if self.reasoning else frozenset[str]()
        return thinking | (MARKS if tools and self.tools else frozenset())

    def thinks_first(self, prompt: str) -> bool:
        """Whether the answer to this rendered prompt begins inside of the block."""
        return self.reasoning and opens_in(prompt)

    def parser(self, prompt: str, tools: bool) -> Parser:
        """For the answer to a rendered prompt; `tools` says whether the request has any."""
        rest: Parser = ToolParser(self.tools) if tools and self.tools else Plain()
        if not self.reasoning or closes_in(prompt):
            return rest
        return ReasoningParser(rest, opens_in(prompt))


def choose_formats(template: str, reasoning: str = AUTO, tools: str = AUTO) -> Formats:
    """By names, and for auto by what the template's text writes. RequestError for a name that there is not."""
    for option, given, known in (("reasoning", reasoning, REASONING_CHOICES), ("tool", tools, TOOL_CHOICES)):
        if given not in known:
            raise RequestError(f"{option} parser {given!r}: must be one of {', '.join(known)}")
    thinks = CLOSE in template if reasoning == AUTO else reasoning != OFF
    return Formats(thinks, _format_of(template) if tools == AUTO else FORMATS.get(tools))


def _format_of(template: str) -> ToolFormat | None:
    """V3's template writes arguments between marks of Markdown, V3.1's writes them as they are."""
    if SEPARATOR not in template:
        return None
    return V3 if "```json" in template else V31
