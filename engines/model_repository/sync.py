"""NAME_sync: a model beside NAME for clients of unary inference, which decoupled models do not have.

It asks NAME through the server, so that both share one engine: it holds no bundle and needs no GPU.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from deepseek_trt.engines.model_repository.folder import MANIFEST, VERSION, written_inputs
from deepseek_trt.engines.model_repository.runtime import SYNC
from deepseek_trt.engines.model_repository.served import Served
from deepseek_trt.export.errors import OutputError

SYNC_SUFFIX = "_sync"
_TASK = "unary"


def sync_of(model: Served) -> Served:
    """The model for unary inference beside `model`."""
    most = model.parameters["max_inflight"]
    return dataclasses.replace(
        model,
        name=f"{model.name}{SYNC_SUFFIX}",
        needs="no GPU",
        start=SYNC,
        decoupled=False,
        instance=f"name: {json.dumps(model.name + SYNC_SUFFIX)} count: 1 kind: KIND_CPU",
        parameters={"model": model.name, "max_inflight": most},
        facts={"task": _TASK, "of": model.name},
    )


def check_sync(target: Path, of: str | None) -> None:
    """OutputError where `target` is another model than that for unary inference of `of`, or, for None, is one."""
    if written_inputs(target) is None:
        return
    facts = json.loads((target / VERSION / MANIFEST).read_text(encoding="utf-8"))
    if of is None and facts.get("task") == _TASK:
        raise OutputError(f"{target} answers unary requests for {facts.get('of')}: give another --name")
    if of is not None and (facts.get("task"), facts.get("of")) != (_TASK, of):
        raise OutputError(f"{target} is another model, whose name is taken: give another --name, or --no-sync")


def remove_sync(target: Path, of: str) -> None:
    """Take it away where it is of `of`; another model of this name is left alone."""
    try:
        check_sync(target, of)
    except OutputError:
        return
    if target.exists():
        shutil.rmtree(target)
