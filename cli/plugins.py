"""deepseek-trt plugins"""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("plugins", short_help="Build the plugin library of a bundle, with no GPU.")
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="The bundle to build for.")
@click.option("--sm", "sms", type=int, multiple=True, default=(80, 86, 89, 90, 100, 120), show_default=True)
@click.option("--no-fallback", is_flag=True, help="Leave out the PTX that unknown chips compile for themselves.")
@click.option("--cxx", help="A C++ compiler to use instead of ziglang's.")
@click.option("--jobs", default=2, show_default=True, help="Kernels compiled at once.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(bundle: Path, sms: tuple[int, ...], no_fallback: bool, cxx: str | None, jobs: int, as_json: bool) -> None:
    """Compile the kernels of the bundle's model for these chips and link them into its plugin library.

    Example: deepseek-trt plugins --bundle ./v2-lite --sm 86 --sm 90 --sm 120
    """
    from deepseek_trt.cli.plugins_run import make_library

    library = make_library(bundle, sms, fallback=not no_fallback, cxx=cxx, jobs=jobs)
    if as_json:
        click.echo(json.dumps({"library": str(library.path), "sha256": library.sha256, "built": library.built}))
    else:
        click.echo(f"{'wrote' if library.built else 'nothing to do, same inputs as'} {library.path}")
