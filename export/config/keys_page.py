"""The part of docs/checkpoints.md on config.json's keys: python -m deepseek_trt.export.config.keys_page

Prints the part; with the page's path, writes it into the page between the two marks, or at its end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from deepseek_trt.export.config.keys import NONE_OF_IT, SECTIONS, Key
from deepseek_trt.export.config.quantization import FORMATS, FP8_KEYS
from deepseek_trt.export.config.rope_keys import ROPE_KEYS, RopeKey
from deepseek_trt.export.config.values import Anything, Kind
from deepseek_trt.export.packed.methods import METHODS
from deepseek_trt.export.packed.settings import ABSENT, Setting

BEGIN = "<!-- begin: written by python -m deepseek_trt.export.config.keys_page docs/checkpoints.md -->"
END = "<!-- end: config.json's keys -->"
_INTRODUCTION = """## config.json's keys

Every key is used, checked (it must agree with others, from which the model is made), harmless or refused. A refused
key's neutral values (null, false, 0, empty, unless others are named) are accepted: they say that the feature is absent.
A key that is in none of these tables is named in a note of `check` and `export`, unless it is null, false, 0 or empty.
A value of another type or range is refused by key and value; null is only for keys whose row says what it means. A key
that appears twice in one object is refused.
"""
_ROPE = """### Inside rope_scaling or rope_parameters

Where both are there, rope_scaling counts, as in transformers, and a note says so if they differ. `rope_type` and `type`
must agree. A key that the rope type does not read is named in a note; null is as good as absent, but for `truncate`.
`m(x)` is 0.1 x ln(factor) + 1, or 1 where factor is at most 1.
"""
_QUANTIZATION = """### Inside quantization_config

Keys that are in none of these tables are named in a note. Null is as good as absent.
"""


def keys_part() -> str:
    """The whole part, with its marks."""
    return "\n".join([BEGIN, "", _INTRODUCTION, *_sections(), _ROPE, *_rope_table(), *_quantization(), END]) + "\n"


def with_part(page: str) -> str:
    """The page with this part in place of what is between the marks, or at the end where there are none."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{keys_part()}".lstrip()
    before, rest = page.split(BEGIN, 1)
    return before + keys_part() + rest.split(f"{END}\n", 1)[1]


def _sections() -> Iterator[str]:
    for title, keys in SECTIONS.items():
        yield f"### {title}\n\n| key | | value | null means |\n|---|---|---|---|"
        yield from (_row(names, first) for first, names in _grouped(keys))
        yield ""


def _grouped(keys: Iterable[Key]) -> Iterator[tuple[Key, list[str]]]:
    """Keys of one reason are one row."""
    groups: dict[tuple[str, str], list[Key]] = {}
    for key in keys:
        groups.setdefault((key.why, key.kind.expected), []).append(key)
    for group in groups.values():
        yield group[0], [key.name for key in group]


def _row(names: list[str], key: Key) -> str:
    named = key.use == "refused" and key.neutral != NONE_OF_IT
    neutral = f" (neutral: {', '.join(_json(value) for value in key.neutral)})" if named else ""
    return f"| {_code(names)} | {key.use}: {key.why}{neutral} | {_value(key.kind)} | {key.null} |"


def _rope_table() -> Iterator[str]:
    yield "| key | | value | rope types |\n|---|---|---|---|"
    for key in ROPE_KEYS.values():
        types = "" if key.neutral else ", ".join(key.types)
        yield f"| `{key.name}` | {_rope_use(key)} | {_value(key.kind)} | {types} |"
    yield ""


def _rope_use(key: RopeKey) -> str:
    return f"refused unless {' or '.join(_json(v) for v in key.neutral)}: {key.why}" if key.neutral else key.why


def _value(kind: Kind) -> str:
    return "" if isinstance(kind, Anything) else kind.expected


def _quantization() -> Iterator[str]:
    yield _QUANTIZATION
    yield "#### fp8\n\n| key | |\n|---|---|"
    yield from (f"| `{name}` | {why} |" for name, why in FP8_KEYS.items())
    for method in METHODS.values():
        yield f"\n#### {method.label}\n\n| key | | value |\n|---|---|---|"
        for place, table in method.keys.items():
            yield from (_setting_row(place, names) for names in _settings_of_a_reason(table))
    formats = ", ".join(dict.fromkeys(FORMATS.values()))
    yield f"\nRefused by their names: {formats}.\n"


def _settings_of_a_reason(table: Iterable[Setting]) -> Iterable[list[Setting]]:
    groups: dict[tuple[str, str, str], list[Setting]] = {}
    for setting in table:
        groups.setdefault((setting.why, setting.kind.expected, repr(setting.only)), []).append(setting)
    return groups.values()


def _setting_row(place: str, settings: list[Setting]) -> str:
    first = settings[0]
    names = [f"{place}.{setting.name}".lstrip(".") for setting in settings]
    value = _value(first.kind) if first.only is None else " or ".join(_json(value) for value in first.only)
    return f"| {_code(names)} | {first.why} | {'nothing' if first.only == ABSENT else value} |"


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _json(value: object) -> str:
    return json.dumps(value)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(with_part(page.read_text(encoding="utf-8") if page.exists() else ""), encoding="utf-8")
    else:
        print(keys_part(), end="")
