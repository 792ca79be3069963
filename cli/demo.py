"""deepseek-trt demo: the commands a user would type, one after the other, on the model that ships with the package."""

from __future__ import annotations

import shlex
import sys
from importlib.resources import as_file, files
from pathlib import Path

import click

from deepseek_trt.cli.printing.output import JSON_FLAG, loudness_flags, output_options, say

PROMPT = "Return the number of"


@click.command("demo")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("out/demo"))
@output_options("Print the JSON of each step, one object a line.")
def command(folder: Path, as_json: bool) -> None:
    """Export, prove, build and run the small trained DeepSeek-V2 that ships with the package.

    Everything it makes lies in FOLDER afterwards. Example: deepseek-trt demo ./my-demo
    """
    from deepseek_trt.cli.main import main

    flags = (*loudness_flags(), *((JSON_FLAG,) if as_json else ()))
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("deepseek_trt.cli") / "demo_model") as checkpoint:
        for step in demo_steps(checkpoint, folder):
            say("")
            say(f"$ deepseek-trt {shlex.join(step)}")
            try:
                main.main(args=[*step, *flags], prog_name="deepseek-trt", standalone_mode=True)
            except SystemExit as exit_:  # the first that fails ends the demo, with its exit code
                if exit_.code:
                    sys.exit(exit_.code)
    say("")
    say(f"The bundle, the engines, the report, the model repository and the bundle in 4 bits lie in {folder}.")


def demo_steps(checkpoint: Path, folder: Path) -> tuple[tuple[str, ...], ...]:
    """The arguments of each command, in order."""
    bundle, report, repository, narrow = (str(folder / name) for name in ("bundle", "report", "repository", "int4"))
    return (
        ("export", str(checkpoint), bundle),
        ("validate", bundle, "--report", report),
        ("build", bundle, "--sm", "86", "--max-batch-size", "4", "--max-input-len", "256", "--max-seq-len", "1024"),
        ("generate", bundle, "--prompt", PROMPT, "--max-new-tokens", "48"),
        ("bench", bundle, "--context", "64", "--new-tokens", "32"),
        ("model-repository", bundle, repository, "--backend", "ort"),  # serves without a GPU, too
        ("export", str(checkpoint), narrow, "--quantize", "int4"),
        ("generate", narrow, "--prompt", PROMPT, "--max-new-tokens", "48"),
    )
