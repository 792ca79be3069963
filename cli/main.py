"""The deepseek-trt command: a group whose subcommands are imported when they are called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from deepseek_trt.cli.printing.ending import is_stopping, leave_broken_pipe, run_program
from deepseek_trt.cli.printing.output import (
    JSON_FLAG,
    loudness_options,
    print_json,
    say_error,
    say_notes,
    say_usage_error,
)
from deepseek_trt.export.errors import DeepseekTrtError

_AS_JSON = "deepseek_trt.as_json"
# Each command's line in --help; its file has its name.
COMMANDS = {
    "check": "Say what a checkpoint is, and what each step needs, from its headers alone.",
    "export": "Write a bundle: ONNX graphs for prefill and decode, weights, tokenizer.",
    "validate": "Compare the bundle with PyTorch.",
    "plugins": "Build the plugin library of a bundle, with no GPU.",
    "build": "Build prefill.plan and decode.plan with TensorRT-RTX or TensorRT.",
    "generate": "Stream text from a bundle.",
    "serve": "Serve a bundle with OpenAI's API.",
    "bench": "Measure speed, and how near it is to the memory's.",
    "model-repository": "Write a tritonserver model repository that serves a bundle.",
    "classify": "Label texts with a text-classification bundle.",
    "env": "Say what this machine and installation are, for a bug report.",
    "demo": "Run the whole pipeline on the small model that ships with the package.",
}


class LazyGroup(click.Group):
    """Imports a subcommand's file only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"deepseek_trt.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_AS_JSON] = JSON_FLAG in args  # known even where the command's own options are mistaken
        return super().parse_args(ctx, args)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Run as the program: signals and lost output have their exit codes."""
        run_program(lambda: self.main(*args, **kwargs))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but what it says of a mistake is escaped, and each has its exit code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except click.ClickException as error:
            say_usage_error(error)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            raise leave_broken_pipe() from None
        except OSError as error:  # of what click itself prints
            say_error(_sentence(error))
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> object:
        """A user's mistake is one sentence on stderr, an object on stdout with --json, and exit code 1."""
        say_notes()
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            _print_as_json(ctx, error.format_message(), error)
            raise
        except BrokenPipeError:  # who reads the output has left
            raise leave_broken_pipe() from None
        except (DeepseekTrtError, OSError) as error:
            if is_stopping():
                sys.exit(1)
            sentence = error.sentence if isinstance(error, DeepseekTrtError) else _sentence(error)
            say_error(sentence, error.details if isinstance(error, DeepseekTrtError) else "")
            _print_as_json(ctx, str(error) if isinstance(error, DeepseekTrtError) else sentence, error)
            sys.exit(1)


def _print_as_json(ctx: click.Context, sentence: str, error: Exception) -> None:
    if ctx.meta[_AS_JSON]:
        with suppress(OSError, DeepseekTrtError):  # where it cannot be printed, stderr and the exit code say enough
            print_json({"error": sentence, "kind": type(error).__name__})


def _sentence(error: OSError) -> str:
    """What the system says of a file that cannot be read or written."""
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or repr(error)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="deepseek-trt")
@loudness_options
def main() -> None:
    """Run DeepSeek-V2 on ONNX Runtime and TensorRT.

    \b
    deepseek-trt export CHECKPOINT OUT
    deepseek-trt validate OUT --report REPORT
    deepseek-trt generate OUT --prompt "The number of"

    Exit codes: 0 good, 1 error, 2 usage, 3 accuracy below tolerance, 130 Ctrl-C, 143 SIGTERM.
    """  # noqa: D301 (click's \b)
