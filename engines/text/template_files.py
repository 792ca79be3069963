"""Where chat templates come from: the files of a checkpoint, with the precedence that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.export.errors import BundleError, RequestError
from deepseek_trt.export.files import read_file
from deepseek_trt.export.text.files import read_object

JINJA, FOLDER, LEGACY, CONFIG = (
    "chat_template.jinja",
    "additional_chat_templates",
    "chat_template.json",
    "tokenizer_config.json",
)
TOKEN_MAP = "special_tokens_map.json"
_LONGEST = 2**24  # bytes of a template in a file of its own


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, and where it stands, for people."""

    place: str
    text: str


Named = Mapping[str, ChatTemplate]


def read_templates(folder: Path) -> Named:
    """All templates by name; where there is one alone it is "default". Empty where there is none.

    The first place that holds any is the only one: chat_template.jinja with additional_chat_templates/NAME.jinja,
    tokenizer_config.json, chat_template.json. Raises BundleError for a file that cannot be read.
    """
    apart = dict(_apart(folder))
    if apart:
        return apart
    for file in (CONFIG, LEGACY):
        named = dict(_inside(file, read_object(folder / file).get("chat_template")))
        if named:
            return named
    return {}


def read_special_tokens(folder: Path) -> dict[str, str]:
    """bos_token and the others, by the names that templates know them by, as text.

    special_tokens_map.json counts where tokenizer_config.json lists no added tokens (transformers' rule).
    """
    config = read_object(folder / CONFIG)
    given = config if "added_tokens_decoder" in config else config | read_object(folder / TOKEN_MAP)
    extra = given.get("extra_special_tokens")
    given = given | (extra if isinstance(extra, dict) else {})
    texts = {key: _token_text(value) for key, value in given.items() if key.endswith("_token")}
    return {key: text for key, text in texts.items() if text is not None}


def choose_template(named: Named, name: str | None = None, tools: bool = False) -> ChatTemplate:
    """The template `name`, or in the file `name`; without a name "tool_use" for tools if it is there, or "default".

    Raises RequestError where there is none of these.
    """
    if name is not None:
        return named[name] if name in named else _from_file(name, named)
    if tools and "tool_use" in named:
        return named["tool_use"]
    if "default" in named:
        return named["default"]
    if named:
        raise RequestError(f"no chat template is called default: choose with --chat-template one of {_list(named)}")
    raise RequestError(
        f"the bundle has no chat template (no {JINJA}, and none in {CONFIG}): name one with --chat-template, leave "
        "out --chat, or send text_input instead of messages"
    )


def _apart(folder: Path) -> Iterator[tuple[str, ChatTemplate]]:
    if (folder / JINJA).exists():
        yield "default", ChatTemplate(JINJA, _text(folder / JINJA))
    for file in sorted((folder / FOLDER).glob("*.jinja")):
        yield file.name.removesuffix(".jinja"), ChatTemplate(f"{FOLDER}/{file.name}", _text(file))


def _inside(file: str, value: Any) -> Iterator[tuple[str, ChatTemplate]]:
    """Read a JSON file's "chat_template": text, an object of named ones, or a list of {name, template}."""
    if isinstance(value, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in value
    ):
        value = {entry["name"]: entry["template"] for entry in value}
    if isinstance(value, dict):
        if not all(isinstance(part, str) for pair in value.items() for part in pair):
            raise BundleError(f"{file}: chat_template holds a name or template that is no text: mend the file")
        yield from ((name, ChatTemplate(f"{file} (template {name!r})", text)) for name, text in value.items())
    elif isinstance(value, str):
        yield "default", ChatTemplate(file, value)
    elif value is not None:
        raise BundleError(f"{file}: chat_template {repr(value)[:80]}: must be text, or a list of {{name, template}}")


def _from_file(name: str, named: Named) -> ChatTemplate:
    if not Path(name).is_file():
        known = f"the bundle's are called {_list(named)}" if named else "the bundle has none"
        raise RequestError(f"chat template {name!r} is neither a file nor a name: {known}")
    try:
        return ChatTemplate(name, _text(Path(name)))
    except BundleError as error:
        raise RequestError(str(error)) from None


def _list(named: Named) -> str:
    return ", ".join(repr(name)[1:-1] for name in sorted(named))


def _token_text(token: Any) -> str | None:
    """A token is written as text, or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _text(file: Path) -> str:
    try:
        return read_file(file, _LONGEST).decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): mend the file") from None
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from None
