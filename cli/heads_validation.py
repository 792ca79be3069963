"""What the validate command does with a bundle that does not generate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import RequestError

_LEFT_OUT = ("compare", "bisect", "layers")  # these follow a language model's logits through its layers


def generates(bundle: Path) -> bool:
    """Whether the bundle's graphs give the next token's logits from token ids."""
    return not Bundle.open(bundle).manifest.generation_refusal


def validate_other_heads(report: Path | None, as_json: bool, **options: Any) -> bool:
    """Print, and write to the folder `report`, how near the bundle's outputs are; whether all are within tolerance."""
    from deepseek_trt.validate.accuracy import ValidateRequest
    from deepseek_trt.validate.heads import validate_heads
    from deepseek_trt.validate.report.heads import print_heads, write_heads

    given = [name for name in _LEFT_OUT if options.pop(name, None)]
    if given:
        raise RequestError(f"--{given[0]} is for bundles that generate: leave it out")
    request = ValidateRequest(command=" ".join(sys.argv), **options)
    result, pairs = validate_heads(request, lambda line: click.echo(line, err=True))
    if report is not None:
        write_heads(result, pairs, report)
    if as_json:
        click.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        print_heads(result)
    return result.passed
