"""What the model-repository command does with a classifier."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from deepseek_trt.export.bundle.folder import Bundle


def classifies(bundle: Path) -> bool:
    """Whether the bundle is for text-classification."""
    return Bundle.open(bundle).manifest.classifier is not None


def write_classifier(bundle: Path, repository: Path, name: str, as_json: bool) -> None:
    """Write the classifier into the repository, and say what was written."""
    from deepseek_trt.engines.model_repository.classification import ClassificationRequest, write_classification

    written = write_classification(ClassificationRequest(bundle, repository, name))
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(written), "path": str(written.path)}, ensure_ascii=False))
        return
    done = "wrote" if written.fresh else "nothing to do, same inputs as"
    click.echo(f"{done} {written.path / name}")
    click.echo(f"labels {', '.join(written.labels)}; up to {written.max_batch_size} texts at once")
    click.echo(f"serve it: {written.path}/serve.sh (tritonserver, and its Python {', '.join(written.requirements)})")
