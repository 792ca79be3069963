"""deepseek-trt model-repository"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_trt.cli.options import COUNT, MOST, threads_option
from deepseek_trt.cli.printing.output import output_options, print_result, wrote

if TYPE_CHECKING:
    from deepseek_trt.engines.model_repository.served import ClassifierSettings
    from deepseek_trt.engines.model_repository.writer import Repository
    from deepseek_trt.engines.serving.settings import ServingSettings

Result = tuple[dict[str, Any], list[str]]  # for machines, and lines for people


@click.command("model-repository")
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
@click.option(
    "--max-inflight", type=COUNT, default=64, show_default=True, help="Requests taken at once; more are refused."
)
@click.option("--max-running", type=COUNT, default=32, show_default=True, help="Those of them that own cache pages.")
@click.option(
    "--max-model-len",
    type=click.IntRange(2, MOST),
    help="Tokens of prompt and answer together.  [default: the model's or the plans']",
)
@click.option(
    "--pages",
    type=click.IntRange(2, MOST),
    help="Pages of the cache, the scratch page counted.  [default: what --cache-mib holds]",
)
@click.option("--cache-mib", type=COUNT, help="MiB of the cache.  [default: 1024]")
@threads_option
@click.option("--prefix-reuse/--no-prefix-reuse", default=True, show_default=True, help="Share equal prompts' pages.")
@click.option(
    "--generation-config/--no-generation-config",
    default=True,
    show_default=True,
    help="Take defaults of sampling from the bundle's generation_config.json.",
)
@output_options()
def command(bundle: Path, repository: Path, name: str, as_json: bool, **sizes: Any) -> None:
    """Write REPOSITORY, which serves BUNDLE: ./REPOSITORY/serve.sh needs a tritonserver and no deepseek-trt.

    Example: deepseek-trt model-repository ./v2-lite ./repository --max-inflight 128
    """
    from deepseek_trt.engines.model_repository.served import ClassifierSettings
    from deepseek_trt.engines.model_repository.sizes import SizeRequest
    from deepseek_trt.engines.model_repository.writer import RepositoryRequest, write_model_repository

    if sizes["pages"] is not None and sizes["cache_mib"] is not None:
        raise click.UsageError("give either --pages or --cache-mib")
    written = write_model_repository(RepositoryRequest(bundle, repository, name, SizeRequest(**sizes)))
    settings = written.model.settings
    if isinstance(settings, ClassifierSettings):
        facts, lines = _classifier(written, settings)
    else:
        facts, lines = _generator(written, settings)
    print_result(as_json, facts, "\n".join([wrote(written.fresh, repository / name), *lines]))


def _generator(written: Repository, settings: ServingSettings) -> Result:
    requires = written.model.requirements
    facts = {"repository": str(written.path), "name": written.model.name, "fresh": written.fresh}
    return {**facts, **dataclasses.asdict(settings), "requires": requires}, [
        f"{settings.backend}, {settings.max_model_len} tokens a request, {settings.max_inflight} requests in "
        f"flight, {settings.max_running} running, {settings.pages} cache pages",
        f"serve it: {written.path}/serve.sh (tritonserver, and for its Python {', '.join(requires)})",
    ]


def _classifier(written: Repository, settings: ClassifierSettings) -> Result:
    requires = written.model.requirements
    facts = {"path": str(written.path), "name": written.model.name, "labels": settings.labels}
    rest = {"max_batch_size": settings.max_batch_size, "requirements": requires, "fresh": written.fresh}
    return {**facts, **rest}, [
        f"labels {', '.join(settings.labels)}; up to {settings.max_batch_size} texts at once",
        f"serve it: {written.path}/serve.sh (tritonserver, and its Python {', '.join(requires)})",
    ]
