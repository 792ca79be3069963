"""deepseek-trt env"""

from __future__ import annotations

import dataclasses

import click

from deepseek_trt.cli.printing.output import output_options, print_result


@click.command("env")
@output_options()
def command(as_json: bool) -> None:
    """Say what this machine and this installation are: what a bug report needs.

    Example: deepseek-trt env --json
    """
    from deepseek_trt.engines.environment import read_environment

    found = read_environment()
    rows = {
        "python": found.python,
        "system": found.system,
        "processor": f"{found.cpu}, {found.cores} cores ({' '.join(found.cpu_features)})",
        "memory": f"{found.memory / 1e9:.1f} GB",
        "GPU": found.gpu or "none visible",
        **found.caches,
        **found.versions,
    }
    width = max(map(len, rows))
    print_result(as_json, dataclasses.asdict(found), *(f"{k:{width}}  {v}" for k, v in rows.items()))
