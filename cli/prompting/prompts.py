"""Prompts: what the options of generate say, and where their texts are read from."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deepseek_trt.cli.printing.output import say
from deepseek_trt.export.errors import RequestError

if TYPE_CHECKING:
    from deepseek_trt.engines.text.text import Text

Command = TypeVar("Command", bound=Callable[..., Any])
STDIN = "-"


@dataclass(frozen=True)
class ChatOptions:
    """How messages become a prompt."""

    on: bool = False
    system: str | None = None
    template: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    tools_file: Path | None = None

    @functools.cached_property
    def tools(self) -> Any:
        """What --tools holds; RequestError where that is no JSON."""
        if self.tools_file is None:
            return None
        try:
            return json.loads(_decoded(self.tools_file.read_bytes(), str(self.tools_file)))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{self.tools_file} is not JSON ({error}): give a list of tools") from None
        except OSError as error:
            raise RequestError(f"{self.tools_file} cannot be read: {error.strerror}") from None

    @property
    def given(self) -> tuple[str, ...]:
        """The options that say something of messages, beside --chat."""
        values = {
            "--system": self.system is not None,
            "--tools": self.tools_file is not None,
            "--chat-template": self.template is not None,
            "--chat-template-arg": bool(self.arguments),
        }
        return tuple(name for name, is_given in values.items() if is_given)

    def start(self) -> list[dict[str, Any]]:
        """The messages before the first of the user."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def encode(self, text: Text, messages: list[dict[str, Any]]) -> list[int]:
        return text.encode_chat(messages, self.tools, self.template, **self.arguments)

    def check(self, text: Text) -> None:
        """RequestError where there is no such template; say what it never reads."""
        from deepseek_trt.engines.text.messages import checked_arguments

        for name in text.chat.unused(checked_arguments(self.arguments), self.tools, self.template):
            say(f"note: the chat template does not read {name}")


@dataclass(frozen=True)
class Prompts:
    """What the user gave: texts, files of texts ("-" is standard input), or comma-separated token ids."""

    texts: tuple[str, ...]
    files: tuple[Path, ...]
    token_ids: tuple[str, ...]
    chat: ChatOptions

    @property
    def interactive(self) -> bool:
        """Whether nothing is given, and someone sits at a terminal."""
        return not (self.texts or self.files or self.token_ids) and sys.stdin is not None and sys.stdin.isatty()

    def check_usage(self) -> None:
        """click.UsageError for options that do not go together."""
        if self.token_ids and (self.texts or self.files):
            raise click.UsageError("give either --prompt or --token-ids")
        others = (("--chat",) if self.chat.on else ()) + self.chat.given
        if self.token_ids and others:
            raise click.UsageError(f"{others[0]} is for text: leave it out, or give --prompt instead of --token-ids")
        if self.chat.given and not self.chat.on and not self.interactive:
            raise click.UsageError(f"{self.chat.given[0]} is for messages: give --chat, too")
        if [*self.texts, *map(str, self.files)].count(STDIN) > 1:
            raise click.UsageError("standard input is one prompt: give - once")

    def encode(self, text: Text | None) -> list[list[int]]:
        """Token ids of every prompt, those of --prompt first; standard input where none is given."""
        if self.token_ids:
            return [_numbers(ids) for ids in self.token_ids]
        assert text is not None
        contents = self._read()
        if not self.chat.on:
            return [text.encode(content) for content in contents]
        self.chat.check(text)
        start = self.chat.start()
        return [self.chat.encode(text, [*start, {"role": "user", "content": content}]) for content in contents]

    def _read(self) -> list[str]:
        if not (self.texts or self.files):
            return [_standard_input(or_usage=True)]
        texts = [_standard_input() if text == STDIN else text for text in self.texts]
        return texts + [_standard_input() if str(file) == STDIN else _file(file) for file in self.files]


def prompt_options(command: Command) -> Command:
    """Give a command every option that says what to answer, and its function them all as `prompts`."""

    @functools.wraps(command)
    def with_prompts(
        prompt: tuple[str, ...],
        prompt_file: tuple[Path, ...],
        token_ids: tuple[str, ...],
        chat: bool,
        system: str | None,
        tools: Path | None,
        chat_template: str | None,
        chat_template_arg: dict[str, Any],
        **options: Any,
    ) -> Any:
        how = ChatOptions(chat, system, chat_template, chat_template_arg, tools)
        return command(prompts=Prompts(prompt, prompt_file, token_ids, how), **options)

    for option in reversed(_OPTIONS):
        with_prompts = option(with_prompts)
    return with_prompts  # type: ignore[return-value]


def _template_arguments(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """Read each as key=value, the value as JSON where it is some."""
    arguments: dict[str, Any] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{one!r}: give key=value, e.g. thinking=true")
        if key in arguments:
            raise click.BadParameter(f"{key} is given twice")
        try:
            arguments[key] = json.loads(value)
        except (ValueError, RecursionError):
            arguments[key] = value
    return arguments


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--prompt", multiple=True, help="Text to continue; several are run as one batch. - is standard input."
    ),
    click.option(
        "--prompt-file",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
        help="A file whose whole text is one prompt, without the line end that closes it; may be given several times.",
    ),
    click.option("--token-ids", multiple=True, help="A prompt as numbers with commas between."),
    click.option("--chat", is_flag=True, help="Each prompt is a user's message, rendered with the chat template."),
    click.option("--system", help="The system prompt before each message."),
    click.option(
        "--tools", type=_FILE, help="JSON with a list of tools for the chat template, as OpenAI's API has it."
    ),
    click.option("--chat-template", metavar="NAME_OR_FILE", help="One of the bundle's templates, or a file with one."),
    click.option(
        "--chat-template-arg",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_template_arguments,
        help="What the template reads beside, e.g. thinking=true; JSON, else text. May be given several times.",
    ),
)


def _standard_input(or_usage: bool = False) -> str:
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""  # None where it was closed
    if not data and or_usage:
        raise click.UsageError(
            "there is no prompt: give either --prompt or --token-ids, --prompt-file, text on standard input, or a "
            "terminal to chat on"
        )
    return _prompt(data, "standard input")


def _file(path: Path) -> str:
    try:
        return _prompt(path.read_bytes(), str(path))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None


def _prompt(data: bytes, name: str) -> str:
    """The whole text but for the line end that closes it, as editors write one and no prompt ends with it."""
    text = _decoded(data, name).removesuffix("\n").removesuffix("\r")
    if not text:
        raise RequestError(f"{name} is empty: write a prompt into it")
    return text


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a mark that is no text
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None


def _numbers(ids: str) -> list[int]:
    try:
        return [int(part) for part in ids.split(",")]
    except ValueError:
        raise RequestError(f"--token-ids {ids!r}: give numbers with commas between, e.g. 0,17,4") from None
