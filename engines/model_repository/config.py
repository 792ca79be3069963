"""config.pbtxt of a served bundle: every field written out, so that the server has nothing to guess."""

from __future__ import annotations

import json

from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.serving.tensors import INPUTS, MAX_BATCH_SIZE, OUTPUTS, Field
from deepseek_trt.export.bundle.folder import Bundle

MODEL_FILE = "model.py"
_KINDS = {"ort": "KIND_CPU", "tensorrt": "KIND_GPU"}


def config_pbtxt(name: str, bundle: Bundle, settings: ServingSettings) -> str:
    """One instance: its scheduler batches all requests, and its cache pages are not shared between processes.

    The parameters hold the settings, which can be edited, and facts of the graphs, for people.
    """
    gpus = " gpus: [ 0 ]" if settings.backend == "tensorrt" else ""
    parameters = {**settings.to_parameters(), **_facts(bundle)}
    return "\n".join(
        [
            f"name: {json.dumps(name)}",
            'backend: "python"',
            f'default_model_filename: "{MODEL_FILE}"',
            f"max_batch_size: {MAX_BATCH_SIZE}",
            "version_policy { specific { versions: [ 1 ] } }",
            "model_transaction_policy { decoupled: true }",
            "response_cache { enable: false }",
            f"instance_group [ {{ name: {json.dumps(name)} count: 1 kind: {_KINDS[settings.backend]}{gpus} }} ]",
            *_tensors("input", INPUTS),
            *_tensors("output", OUTPUTS),
            *(_parameter(key, value) for key, value in parameters.items()),
            "",
        ]
    )


def _tensors(kind: str, fields: tuple[Field, ...]) -> list[str]:
    lines = [f"{kind} ["]
    for field in fields:
        optional = " optional: true" if kind == "input" and field.optional else ""
        dims = ", ".join(map(str, field.dims))
        lines.append(f'  {{ name: "{field.name}" data_type: {field.data_type} dims: [ {dims} ]{optional} }},')
    lines[-1] = lines[-1].rstrip(",")
    return [*lines, "]"]


def _parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}'


def _facts(bundle: Bundle) -> dict[str, str]:
    cache = bundle.manifest.cache
    logits = next(tensor for tensor in bundle.graph("decode").outputs if tensor.name == "logits")
    return {
        "vocab_size": str(logits.dims[-1]),
        "dtype": bundle.manifest.dtype,
        "page_size": str(cache.page_size),
        "cache_bytes_per_token": str(cache.bytes_per_token),
    }
