"""deepseek-trt model-repository"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_trt.cli.options import size_options, verify_option
from deepseek_trt.cli.printing.output import output_options, print_result, wrote
from deepseek_trt.export.text.wording import some

if TYPE_CHECKING:
    from deepseek_trt.engines.model_repository.served import ClassifierSettings
    from deepseek_trt.engines.model_repository.sizes import SizeRequest
    from deepseek_trt.engines.model_repository.writer import Repository
    from deepseek_trt.engines.serving.settings import ServingSettings

Result = tuple[dict[str, Any], str]  # for machines, and a line for people


@click.command("model-repository")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", type=click.Path(path_type=Path))
@click.option("--name", default="deepseek_v2", show_default=True, help="The model's; others in REPOSITORY are kept.")
@verify_option
@size_options
@click.option("--link", is_flag=True, help="Hard links to BUNDLE's files, not copies; onnx cannot read such a bundle.")
@click.option("--sync/--no-sync", default=True, show_default=True, help="NAME_sync, too, for unary inference.")
@output_options()
def command(
    bundle: Path, repository: Path, name: str, link: bool, sync: bool, as_json: bool, sizes: SizeRequest
) -> None:
    """Write REPOSITORY, which serves BUNDLE: ./REPOSITORY/serve.sh needs a tritonserver and no deepseek-trt.

    Example: deepseek-trt model-repository ./v2-lite ./repository --max-inflight 128
    """
    from deepseek_trt.engines.model_repository.served import ClassifierSettings
    from deepseek_trt.engines.model_repository.writer import RepositoryRequest, write_model_repository

    written = write_model_repository(RepositoryRequest(bundle, repository, name, sizes, link, sync))
    settings = written.model.settings
    if isinstance(settings, ClassifierSettings):
        facts, line = _classifier(settings)
    else:
        facts, line = _generator(settings)
    model = written.model
    common = {"repository": str(written.path), "name": name, "fresh": written.fresh, "backend": model.backend}
    common |= {"why": model.why, "needs": model.needs, "requires": model.requirements}
    common |= {"sync": written.sync.name if written.sync else None}
    lines = (wrote(written.fresh, repository / name), *_lines(written, line))
    print_result(as_json, {**facts, **common}, *lines)


def _lines(written: Repository, of_task: str) -> Iterator[str]:
    """What serves it and why, how much at once, and what that takes."""
    model = written.model
    yield f"backend: {model.backend}, as {model.why}; it needs {model.needs}"
    yield of_task
    if written.sync:
        yield f"{written.sync.name} beside it answers unary requests: perf_analyzer's, KServe's, tritonclient's infer()"
    yield f"serve it: {written.path}/serve.sh (tritonserver, and for its Python {', '.join(model.requirements)})"


def _generator(settings: ServingSettings) -> Result:
    return dataclasses.asdict(settings), (
        f"{settings.max_model_len} tokens per request, {settings.max_inflight} requests in flight, "
        f"{settings.max_running} running, {settings.pages} cache pages"
    )


def _classifier(settings: ClassifierSettings) -> Result:
    facts = {"labels": settings.labels, "max_batch_size": settings.max_batch_size}
    return facts, f"labels {some(settings.labels, len(settings.labels))}; up to {settings.max_batch_size} texts at once"
