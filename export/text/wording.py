"""How names and values that come from files stand in a sentence: escaped, cut, and a few of many."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

_LONGEST = 120  # characters of a name or value
_SENTENCE = 2000  # characters of a sentence, which names files, too


def some(names: Collection[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    first = [shown(name)[1:-1] for name in list(names)[:most]]
    return ", ".join(first) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown(value: Any) -> str:
    """A value as repr has it, or JSON where it is true, false or null; cut where it is long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...{text[-1]}"


def escaped(text: str, but: str = "") -> str:
    """`text` with backslash escapes for all that does not show as itself: control characters, line ends, what turns the
    direction of writing, and what UTF-8 cannot hold. Those in `but` stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in but else _escape(c) for c in text)


def controls_escaped(text: str) -> str:
    """`text` of several lines in any script, with backslash escapes for what a terminal would obey."""
    return "".join(_escape(c) if _is_control(c) else c for c in text)


def sentence(text: str) -> str:
    """One line, escaped, its middle left out where it is long: what went wrong comes first, the mend last."""
    line = escaped(text)
    return line if len(line) <= _SENTENCE else f"{line[: _SENTENCE // 2]} [...] {line[-_SENTENCE // 2 :]}"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _is_control(character: str) -> bool:
    code = ord(character)
    return (code < 0x20 and character not in "\n\t") or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000
