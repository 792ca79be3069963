"""deepseek-trt demo"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo", short_help="Run the whole line on the small model that ships with the package.")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("out/demo"))
def command(folder: Path) -> None:
    """Export, prove, build and run the small trained DeepSeek-V2 that ships with the package.

    Everything it makes lies in FOLDER afterwards. Example: deepseek-trt demo ./my-demo
    """
    from deepseek_trt.cli.demo_run import run_demo

    run_demo(folder)
