"""deepseek-trt plugins"""

from __future__ import annotations

from typing import Any

import click

from deepseek_trt.cli.options import COUNT, bundle_argument
from deepseek_trt.cli.printing.output import output_options, print_result, wrote


@click.command("plugins")
@bundle_argument
@click.option(
    "--sm",
    "sms",
    type=COUNT,
    multiple=True,
    default=(80, 86, 89, 90, 100, 120),
    show_default=True,
    help="Chips to compile for; may be given several times.",
)
@click.option("--no-fallback", is_flag=True, help="Leave out the PTX that unknown chips compile for themselves.")
@click.option("--cxx", help="A C++ compiler's path.  [default: ziglang's]")
@click.option("--jobs", type=COUNT, default=2, show_default=True, help="Kernels compiled at once.")
@output_options()
def command(as_json: bool, no_fallback: bool, **options: Any) -> None:
    """Compile the kernels of BUNDLE's model for these chips and link them into its plugin library.

    Example: deepseek-trt plugins ./v2-lite --sm 86 --sm 90 --sm 120
    """
    from deepseek_trt.cli.printing.progress import plugin_reporter
    from deepseek_trt.plugins.tensorrt.for_bundle import PluginRequest, build_plugins

    with plugin_reporter() as report:
        library = build_plugins(PluginRequest(fallback=not no_fallback, **options), report)
    facts = {"library": str(library.path), "sha256": library.sha256, "built": library.built}
    print_result(as_json, facts, wrote(library.built, library.path))
