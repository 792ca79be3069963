"""What commands print: a line for people, or JSON for machines."""

from __future__ import annotations

from typing import Any

import click

from deepseek_trt.export.json_text import json_text

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def say(line: str) -> None:
    """Print progress or a note, on stderr."""
    click.echo(line, err=True)


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
