"""deepseek-trt model-repository"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deepseek_trt.cli.classifier_repository import classifies, write_classifier

if TYPE_CHECKING:
    from deepseek_trt.engines.model_repository.writer import Repository


@click.command("model-repository", short_help="Write a tritonserver model repository.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", type=click.Path(path_type=Path))
@click.option("--name", default="deepseek_v2", show_default=True, help="The model's; others in REPOSITORY are kept.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "ort", "tensorrt"]),
    default="auto",
    show_default=True,
    help="auto: the plans if there are, else ONNX Runtime.",
)
@click.option("--max-inflight", default=64, show_default=True, help="Requests taken at once; more are refused.")
@click.option("--max-running", default=32, show_default=True, help="Those of them that own cache pages.")
@click.option("--max-model-len", type=int, help="Tokens of prompt and answer. Default: the model's or the plans'.")
@click.option("--pages", type=int, help="Of the cache, the scratch page counted. Default: what --cache-mib holds.")
@click.option("--cache-mib", type=int, help="Size of the cache.  [default: 1024]")
@click.option("--threads", default=0, show_default=True, help="0 lets the backend choose.")
@click.option("--prefix-reuse/--no-prefix-reuse", default=True, show_default=True, help="Share equal prompts' pages.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    bundle: Path,
    repository: Path,
    name: str,
    backend: str,
    max_inflight: int,
    max_running: int,
    max_model_len: int | None,
    pages: int | None,
    cache_mib: int | None,
    threads: int,
    prefix_reuse: bool,
    as_json: bool,
) -> None:
    """Write REPOSITORY, which serves BUNDLE: ./REPOSITORY/serve.sh needs a tritonserver and no deepseek-trt.

    Example: deepseek-trt model-repository ./v2-lite ./repository --max-inflight 128
    """
    from deepseek_trt.engines.model_repository.sizes import SizeRequest
    from deepseek_trt.engines.model_repository.writer import RepositoryRequest, write_model_repository

    if classifies(bundle):
        write_classifier(bundle, repository, name, as_json)
        return
    if pages is not None and cache_mib is not None:
        raise click.UsageError("give either --pages or --cache-mib")
    sizes = SizeRequest(backend, max_inflight, max_running, max_model_len, pages, cache_mib, threads, prefix_reuse)
    written = write_model_repository(RepositoryRequest(bundle, repository, name, sizes))
    if as_json:
        facts = {"repository": str(repository), "name": name, "fresh": written.fresh}
        click.echo(json.dumps({**facts, **dataclasses.asdict(written.settings), "requires": written.requirements}))
    else:
        click.echo(_summary(written))


def _summary(written: Repository) -> str:
    settings, model = written.settings, written.path / written.name
    done = "wrote" if written.fresh else "nothing to do, same inputs as"
    return "\n".join(
        [
            f"{done} {model}",
            f"{settings.backend}, {settings.max_model_len} tokens a request, {settings.max_inflight} requests in "
            f"flight, {settings.max_running} running, {settings.pages} cache pages",
            f"serve it: {written.path}/serve.sh (tritonserver, and for its Python {', '.join(written.requirements)})",
        ]
    )
