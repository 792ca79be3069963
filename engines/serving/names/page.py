"""The part of docs/serving.md on names: python -m deepseek_trt.engines.serving.names.page

Prints the part; with the page's path, writes it into the page between the two marks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from deepseek_trt.engines.serving.names.table import NAMES, Name
from deepseek_trt.engines.serving.tensors import INPUTS, OUTPUTS, Field

BEGIN = "<!-- begin: written by python -m deepseek_trt.engines.serving.names.page docs/serving.md -->"
END = "<!-- end: names -->"
_OTHERS = """### Names of other servers

Each is another name of an input above, taken where its value changes nothing, or refused by name, with the reason. What
is no tensor is a request parameter or a key of `sampling_parameters`.
"""


def names_part() -> str:
    """The whole part, with its marks."""
    return (
        "\n".join([BEGIN, "", *_fields("input", INPUTS), *_fields("output", OUTPUTS), _OTHERS, *_others(), END]) + "\n"
    )


def with_part(page: str) -> str:
    """The page with this part in place of what is between the marks."""
    before, rest = page.split(BEGIN, 1)
    return before + names_part() + rest.split(f"{END}\n", 1)[1]


def _fields(kind: str, fields: Iterable[Field]) -> Iterator[str]:
    yield f"| {kind} | type | |\n|---|---|---|"
    yield from (f"| `{field.name}` | {_type(field)} | {field.what} |" for field in fields)
    yield ""


def _others() -> Iterator[str]:
    for server, names in NAMES.items():
        yield f"| {server} | type | |\n|---|---|---|"
        yield from (f"| `{name.name}` | {_kind(name)} | {_what(name)} |" for name in names)
        yield ""


def _type(field: Field) -> str:
    kind = field.data_type.removeprefix("TYPE_").lower()
    return kind if field.dims == (1,) else f"{kind}s"


def _kind(name: Name) -> str:
    return _type(name.field) if name.declared else f"{_type(name.field)}, no tensor"


def _what(name: Name) -> str:
    if name.same_as:
        return f"`{name.same_as}`"
    if name.of_model:
        return f"taken where it is {_ID[name.of_model]}, else refused: {name.why}"
    if not name.why:
        return "`guided_decoding_guide_type` and `guided_decoding_guide`, as an object, or as JSON of one"
    if not name.neutral:
        return f"refused: {name.why}"
    return f"taken where it is {' or '.join(map(_shown, name.neutral))}, else refused: {name.why}"


_ID = {"end": "one of the model's eos_token_id", "pad": "the model's pad_token_id or eos_token_id"}


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    return str(value).lower()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        file = Path(sys.argv[1])
        file.write_text(with_part(file.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(names_part(), end="")
