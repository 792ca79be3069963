"""export.json: what transformers' own ONNX runner reads beside a graph (transformers.exporters.ExportedModel)."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE
from deepseek_trt.export.bundle.graph import GraphSpec, TensorSpec
from deepseek_trt.export.json_text import json_text

EXPORT_FILE = "export.json"
_SCHEMA_VERSION = 1
_PACKAGES = ("deepseek-trt", "torch", "onnx", "onnxscript")


def write_export_json(folder: Path, graph: GraphSpec, dtype: str) -> None:
    """Write export.json, and the name under which the runner looks for the weights.

    ExportedModel.from_pretrained(folder) then takes input_ids, attention_mask, position_ids and past_key_values (a list
    of {"key", "value"}) and gives a dict with past_key_values for the next call.
    """
    metadata: dict[str, Any] = {
        "architecture": "deepseek-trt",
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "export_config": {},
        "export_dtype": dtype,
        "export_device": "cpu",
        "kwargs": {name: _kwarg(graph, name) for name in dict.fromkeys(_argument(t) for t in graph.inputs)},
        "in_constants": {},
        "in_spec": None,
        "out_spec": _structure(graph),
        "out_constants": [],
    }
    component = {"file": graph.file, "metadata": metadata}
    manifest = {"schema_version": _SCHEMA_VERSION, "export_format": "onnx", "components": {graph.name: component}}
    (folder / EXPORT_FILE).write_text(json_text(manifest, indent=1) + "\n", encoding="utf-8")
    weights = folder / f"{graph.file}.data"
    weights.unlink(missing_ok=True)  # of a run that was killed
    weights.symlink_to(WEIGHTS_FILE)


def _argument(tensor: TensorSpec) -> str:
    return tensor.name.split(".")[0]


def _kwarg(graph: GraphSpec, name: str) -> dict[str, Any]:
    """How a keyword argument is made: of one tensor, or of many by their path in it."""
    mine = [t for t in graph.inputs if _argument(t) == name]
    if mine[0].name == name:
        return _described(mine[0])
    return {"leaves": {t.name.removeprefix(f"{name}."): _described(t) for t in mine}}


def _described(tensor: TensorSpec) -> dict[str, Any]:
    return {"rank": len(tensor.dims), "shape": list(tensor.dims), "dtype": tensor.dtype}


def _structure(graph: GraphSpec) -> str:
    """The outputs as torch's pytree spec of a dict: the present cache has the name and form of the past one."""
    from torch.utils import _pytree

    tree: dict[str, Any] = {t.name: 0 for t in graph.outputs if not t.name.startswith("present.")}
    layers = sum(t.name.startswith("present.") for t in graph.outputs) // 2
    if layers:
        tree["past_key_values"] = [{"key": 0, "value": 0} for _ in range(layers)]
    return _pytree.treespec_dumps(_pytree.tree_structure(tree))
