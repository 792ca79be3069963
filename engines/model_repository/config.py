"""config.pbtxt of a served model: every field written out, so that the server has nothing to guess."""

from __future__ import annotations

import json

from deepseek_trt.engines.model_repository.folder import MODEL_FILE, VERSION
from deepseek_trt.engines.model_repository.served import Served
from deepseek_trt.engines.serving.tensors import Field


def config_pbtxt(model: Served) -> str:
    """The file's text; the tensors and parameters in the order of `model`."""
    return "\n".join(
        [
            f"name: {json.dumps(model.name)}",
            'backend: "python"',
            f'default_model_filename: "{MODEL_FILE}"',
            f"max_batch_size: {model.max_batch_size}",
            f"version_policy {{ specific {{ versions: [ {VERSION} ] }} }}",
            f"model_transaction_policy {{ decoupled: {json.dumps(model.decoupled)} }}",
            model.batching,
            f"instance_group [ {{ {model.instance} }} ]",
            *_tensors("input", model.inputs),
            *_tensors("output", model.outputs),
            *(_parameter(key, value) for key, value in model.parameters.items()),
            "",
        ]
    )


def _tensors(kind: str, fields: tuple[Field, ...]) -> list[str]:
    entries = [_tensor(field, " optional: true" if kind == "input" and field.optional else "") for field in fields]
    if len(entries) == 1:
        return [f"{kind} [ {entries[0]} ]"]
    return [f"{kind} [", *(f"  {entry}," for entry in entries[:-1]), f"  {entries[-1]}", "]"]


def _tensor(field: Field, optional: str) -> str:
    dims = ", ".join(map(str, field.dims))
    return f'{{ name: "{field.name}" data_type: {field.data_type} dims: [ {dims} ]{optional} }}'


def _parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}'
