"""What commands print: a line for people or JSON for machines on stdout, and what goes on meanwhile on stderr."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deepseek_trt.cli.printing.watch import Watch
from deepseek_trt.export.errors import OutputError
from deepseek_trt.export.json_text import json_text
from deepseek_trt.export.text.wording import controls_escaped, escaped
from deepseek_trt.export.text.wording import sentence as one_sentence

if TYPE_CHECKING:
    from rich.console import RenderableType

    from deepseek_trt.export.bundle.recipes import Dropped

Command = TypeVar("Command", bound=Callable[..., Any])

JSON_FLAG = "--json"
_KEY = "deepseek_trt."  # of what this module keeps in click's contexts, which a group and its command share
_QUIET, _WATCH = f"{_KEY}quiet", f"{_KEY}watch"


def _hush(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given:
        ctx.meta[_QUIET] = True
        _check_loudness(ctx)


def _time(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given and _WATCH not in ctx.meta:
        watch = ctx.meta[_WATCH] = Watch(print_line)
        _check_loudness(ctx)
        ctx.find_root().call_on_close(watch.end)


def _check_loudness(ctx: click.Context) -> None:
    if _QUIET in ctx.meta and _WATCH in ctx.meta:
        raise click.UsageError("give either --quiet or --verbose")


def loudness_options(command: Command) -> Command:
    """Give a command, or the group, the options --quiet and --verbose; its function does not see them."""
    quiet = click.option(
        "--quiet", is_flag=True, expose_value=False, callback=_hush, help="No progress and no notes: errors alone."
    )
    verbose = click.option(
        "--verbose", is_flag=True, expose_value=False, callback=_time, help="Say the seconds of each step on stderr."
    )
    return quiet(verbose(command))


def output_options(json_help: str = "Print the result as JSON.") -> Callable[[Command], Command]:
    """Give a command --json, which its function gets as `as_json`, and what `loudness_options` gives."""

    def with_options(command: Command) -> Command:
        as_json = click.option(JSON_FLAG, "as_json", is_flag=True, help=f"{json_help} Errors, too.")
        return as_json(loudness_options(command))

    return with_options


def is_quiet() -> bool:
    """Whether --quiet was given to the command that runs."""
    context = click.get_current_context(silent=True)
    return context is not None and _QUIET in context.meta


def loudness_flags() -> tuple[str, ...]:
    """Those of --quiet and --verbose that were given, for a command that runs others."""
    meta = click.get_current_context().meta
    return tuple(flag for flag, key in (("--quiet", _QUIET), ("--verbose", _WATCH)) if key in meta)


def say(line: str) -> None:
    """Print progress or a note, on stderr, unless --quiet was given."""
    if not is_quiet():
        print_line(line)


def say_error(sentence: object, details: str = "") -> None:
    """Print an error, on stderr, in any case; a tool's own words on lines below it."""
    print_line(f"error: {sentence}{':' if details else ''}")
    for line in details.split("\n") if details else ():
        print_line(f"  {line}")


def say_usage_error(error: click.ClickException) -> None:
    """Print what click has to say of a mistake, with nothing in it that came from the command line as it is."""
    error.message = one_sentence(error.message)  # type: ignore[misc]  # final for subclasses' sake
    error.show()


def print_line(line: str) -> None:
    """Print one line, escaped, on stderr; what stderr does not take is dropped."""
    with suppress(OSError):
        click.echo(one_sentence(line), err=True)


def write(text: str) -> None:
    """Write to stdout, now. OutputError where it does not take it, BrokenPipeError where nobody reads it."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to standard output: {error.strerror}") from None


def write_model_text(text: str) -> None:
    """Write what a model said: on a terminal with control characters escaped, into a pipe or a file as it is."""
    write(controls_escaped(text) if sys.stdout.isatty() else text)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


_notes = _Notes(logging.WARNING)


def say_notes() -> None:
    """Have what the library warns of said as a note."""
    logger = logging.getLogger("deepseek_trt")
    if _notes not in logger.handlers:
        logger.addHandler(_notes)


def step(line: str, shown: bool = True) -> None:
    """Say what begins; with --verbose, how long what began before has taken, too."""
    context = click.get_current_context(silent=True)
    if context is not None and _WATCH in context.meta:
        context.meta[_WATCH].next(line)
    if shown:
        say(line)


def print_json(facts: Any) -> None:
    """Print one line of JSON, on stdout; what would not show as itself has JSON's own escapes."""
    text = json_text(facts)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    write(f"{text}\n")


def print_result(as_json: bool, facts: Any, *lines: str) -> None:
    """Print what a command made: `facts` for machines, or `lines` for people."""
    if as_json:
        print_json(facts)
    else:
        write("".join(f"{escaped(line)}\n" for line in lines))


def print_rich(*parts: RenderableType) -> None:
    """Print tables and styled texts on stdout. Strings in them are no markup, but escape those from files."""
    from rich.console import Console

    drawn, on_terminal = io.StringIO(), sys.stdout.isatty()
    console = Console(
        file=drawn, force_terminal=on_terminal, soft_wrap=True, highlight=False, markup=False, emoji=False
    )
    for part in parts:
        console.print(escaped(part) if isinstance(part, str) else part)
    write(drawn.getvalue())


def wrote(fresh: bool, what: object) -> str:
    """Say that a step wrote `what`, or that it was there, made of the same inputs."""
    return f"{'wrote' if fresh else 'nothing to do, same inputs as'} {what}"


def dropped_lines(dropped: Iterable[Dropped]) -> list[str]:
    """A line for each reason for which tensors of a checkpoint are left out."""
    from collections import Counter

    counts = Counter(d.reason for d in dropped)
    return [f"dropped: {count} tensor{'s' * (count > 1)}: {reason}" for reason, count in counts.items()]
