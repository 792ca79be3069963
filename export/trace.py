"""Trace the torch model into ONNX under fake tensors: no weight is in memory, and none is needed."""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import values as onnxscript_values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from deepseek_trt.export.bundle.graph import BATCH, DOMAIN, PAGES, PAST, SEQUENCE, TABLE, TOTAL, GraphSpec, TensorSpec
from deepseek_trt.export.bundle.interface import DEFAULT, Interface
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.heads import MODELS, method_of
from deepseek_trt.export.mtp.model import Mtp
from deepseek_trt.export.ops import OPS
from deepseek_trt.export.ops.functions import attach_functions
from deepseek_trt.export.ops.spec import OPSET, OpSpec
from deepseek_trt.export.ops.torch_ops import TORCH_OPS
from deepseek_trt.export.passes.hidden_states import HIDDEN, AddHiddenStates
from deepseek_trt.export.passes.unroll import unroll

INV_FREQ = "model.rope.inv_freq"
# Never torch.onnx's or onnxscript's optimizer: it folds transposed weights, which here are fake.
_CLEAN_UP = ir.passes.Sequential(
    passes.IdentityEliminationPass(),
    passes.CommonSubexpressionEliminationPass(),
    passes.RemoveUnusedNodesPass(),
    passes.ClearMetadataAndDocStringPass(),  # holds paths of this machine
)
# Example sizes: all different and none 0 or 1, so that tracing fixes none of them.
_EXAMPLE = {BATCH: 2, SEQUENCE: 7, PAGES: 11, TABLE: 3, PAST: 5, TOTAL: 12}
_CACHE = re.compile(r"(?:past_key_values|present)\.(\d+)\.")


def trace(
    config: ModelConfig, spec: GraphSpec, dtype: str, interface: Interface = DEFAULT, num_labels: int = 0
) -> ir.Model:
    """The graph `spec` of the model, custom ops as single nodes with bodies, weights as initializers without data.

    Initializers carry the parameters' names; their const_value is fake, except the rope frequencies'.
    """
    distinct, kinds = (config, []) if spec.name == "mtp" else _distinct_layers(config)
    with FakeTensorMode(), torch.no_grad():
        previous = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            module = _root(distinct, spec, interface, num_labels).eval()
        finally:
            torch.set_default_dtype(previous)
        model = _export(module, spec if spec.name == "mtp" else _first_layers(spec, distinct.num_hidden_layers))
    _CLEAN_UP(model)
    if distinct != config:
        unroll(model, kinds)
    if interface.hidden_states:
        AddHiddenStates(spec)(model)
    _fix_dims(model.graph, spec)
    attach_functions(model, OPS)
    frequencies = torch.tensor(config.rope.inverse_frequencies(config.qk_rope_head_dim), dtype=torch.float32)
    model.graph.initializers[INV_FREQ].const_value = ir.tensor(frequencies.numpy(), name=INV_FREQ)
    model.graph.name = f"deepseek_v2_{spec.name}"
    model.producer_name = "deepseek-trt"
    return model


def _root(config: ModelConfig, spec: GraphSpec, interface: Interface, num_labels: int) -> Any:
    """A model of the task's class, or the layer that drafts, with the graph's method as its forward."""
    kind, given = (Mtp, (config,)) if spec.name == "mtp" else (MODELS[interface.task], (config, interface, num_labels))
    root: Any = type(kind.__name__, (kind,), {"forward": getattr(kind, method_of(interface, spec.name))})
    return root(*given)


def _distinct_layers(config: ModelConfig) -> tuple[ModelConfig, list[int]]:
    """A config with one layer of each kind (dense, then MoE), and which of them each layer of `config` is."""
    sparse = [config.is_moe_layer(i) for i in range(config.num_hidden_layers)]
    kinds = sorted(set(sparse))
    distinct = dataclasses.replace(
        config, num_hidden_layers=len(kinds), first_k_dense_replace=kinds.count(False), moe_layer_freq=1
    )
    return distinct, [kinds.index(is_moe) for is_moe in sparse]


def _first_layers(spec: GraphSpec, layers: int) -> GraphSpec:
    """The graph of a model with fewer layers, and without the hidden states, which a pass adds."""

    def keep(tensor: TensorSpec) -> bool:
        layer = _CACHE.match(tensor.name)
        return int(layer[1]) < layers if layer else not tensor.name.startswith(HIDDEN)

    return GraphSpec(spec.name, tuple(filter(keep, spec.inputs)), tuple(filter(keep, spec.outputs)))


def _fix_dims(graph: ir.Graph, spec: GraphSpec) -> None:
    """Say the spec's dims on inputs and outputs: torch derives other names for some."""
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            assert value.name == tensor.name, (value.name, tensor.name)
            value.shape = ir.Shape(tensor.dims)


def _export(module: torch.nn.Module, spec: GraphSpec) -> ir.Model:
    dims = {name: Dim(name, min=0 if name in (PAGES, PAST) else 1) for name in _EXAMPLE}
    plain = [i for i in spec.inputs if not _CACHE.match(i.name)]
    pools = [i for i in spec.inputs if _CACHE.match(i.name)]

    def arguments(make: Callable[[TensorSpec], Any]) -> tuple[Any, ...]:
        return (*map(make, plain), *([list(map(make, pools))] if pools else []))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's notes on its own internals
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            arguments(_example),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[i.name for i in spec.inputs],
            output_names=[o.name for o in spec.outputs],
            dynamic_shapes=arguments(lambda tensor: _dynamic(tensor, dims)),
            custom_translation_table={TORCH_OPS[op.name]._opoverload: _translation(op) for op in OPS},
        )
    assert program is not None
    return program.model


def _example(tensor: TensorSpec) -> torch.Tensor:
    sizes = [_EXAMPLE[d] if isinstance(d, str) else d for d in tensor.dims]
    return torch.zeros(sizes, dtype=getattr(torch, tensor.dtype))


def _dynamic(tensor: TensorSpec, dims: dict[str, Any]) -> dict[int, Any]:
    return {axis: dims[d] for axis, d in enumerate(tensor.dims) if isinstance(d, str)}


def _translation(spec: OpSpec) -> Callable[..., Any]:
    """Torch op to one opaque ONNX node of the same name."""
    opset = onnxscript_values.Opset(DOMAIN, 1)
    op = onnxscript_values.Op(opset, spec.name, _schema(spec))
    arity = len(spec.inputs)
    names = [a.name for a in spec.attributes]

    def translate(*args: Any) -> Any:
        return op(*args[:arity], **dict(zip(names, args[arity:], strict=True)))

    return translate


def _schema(spec: OpSpec) -> onnx.defs.OpSchema:
    kinds = onnx.defs.OpSchema.AttrType
    types = {"int": kinds.INT, "float": kinds.FLOAT, "string": kinds.STRING}
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

    names = {"float32": "tensor(float)", "float16": "tensor(float16)", "int32": "tensor(int32)"}

    def formal(arg: Any) -> onnx.defs.OpSchema.FormalParameter:
        return onnx.defs.OpSchema.FormalParameter(arg.name, names.get(arg.dtype, arg.dtype), arg.doc)

    narrow = {"codes": ["tensor(int8)", "tensor(uint8)"], "scales": ["tensor(float16)", "tensor(float)"]}
    given = {i.dtype for i in (*spec.inputs, *spec.outputs)}

    return onnx.defs.OpSchema(
        spec.name,
        DOMAIN,
        1,
        spec.doc,
        inputs=[formal(i) for i in spec.inputs],
        outputs=[formal(o) for o in spec.outputs],
        type_constraints=[
            ("T", floats, "the model's dtype"),
            *((name, kinds, "the format's") for name, kinds in narrow.items() if name in given),
        ],
        attributes=[onnx.defs.OpSchema.Attribute(a.name, types[a.type], a.doc, required=True) for a in spec.attributes],
    )
