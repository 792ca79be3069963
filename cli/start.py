"""Where the program starts: a signal ends it in one line while the rest is imported, too."""

from __future__ import annotations

from deepseek_trt.cli.printing.ending import run_program


def main() -> None:
    """Run the command line."""
    run_program(_command)


def _command() -> None:
    from deepseek_trt.cli.main import main as command

    command(prog_name="deepseek-trt")
