"""What commands print: a line for people or JSON for machines on stdout, and what goes on meanwhile on stderr."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deepseek_trt.cli.printing.watch import Watch
from deepseek_trt.export.json_text import json_text

if TYPE_CHECKING:
    from deepseek_trt.export.bundle.recipes import Dropped

Command = TypeVar("Command", bound=Callable[..., Any])

JSON_FLAG = "--json"
_KEY = "deepseek_trt."  # of what this module keeps in click's contexts, which a group and its command share
_QUIET, _WATCH = f"{_KEY}quiet", f"{_KEY}watch"


def _hush(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given:
        ctx.meta[_QUIET] = True
        _check_loudness(ctx)
        log = logging.getLogger("deepseek_trt")  # where sessions warn while they run
        ctx.call_on_close(functools.partial(log.setLevel, log.level))
        log.setLevel(logging.ERROR)


def _time(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given and _WATCH not in ctx.meta:
        watch = ctx.meta[_WATCH] = Watch(lambda line: click.echo(line, err=True))
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
        click.echo(line, err=True)


def say_error(sentence: object) -> None:
    """Print an error, on stderr, in any case."""
    click.echo(f"error: {sentence}", err=True)


def step(line: str, shown: bool = True) -> None:
    """Say what begins; with --verbose, how long what began before has taken, too."""
    context = click.get_current_context(silent=True)
    if context is not None and _WATCH in context.meta:
        context.meta[_WATCH].next(line)
    if shown:
        say(line)


def print_json(facts: Any) -> None:
    """Print one line of JSON, on stdout."""
    click.echo(json_text(facts))


def print_result(as_json: bool, facts: Any, text: str) -> None:
    """Print what a command made: `facts` for machines, or `text` for people."""
    if as_json:
        print_json(facts)
    else:
        click.echo(text)


def wrote(fresh: bool, what: object) -> str:
    """Say that a step wrote `what`, or that it was there, made of the same inputs."""
    return f"{'wrote' if fresh else 'nothing to do, same inputs as'} {what}"


def dropped_lines(dropped: Iterable[Dropped]) -> list[str]:
    """A line for each reason for which tensors of a checkpoint are left out."""
    from collections import Counter

    counts = Counter(d.reason for d in dropped)
    return [f"dropped: {count} tensor{'s' * (count > 1)}: {reason}" for reason, count in counts.items()]
