"""A graph pass: halves of decoder layers become single operators of the compiled CPU library (plugins/cpu/csrc).

It works on prefill and decode. What it does not recognise stays as it was exported; `left` says what that is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from deepseek_trt.export.bundle.graph import DOMAIN, SEQUENCE
from deepseek_trt.export.passes.widen import WidenBfloat16
from deepseek_trt.plugins.cpu import halves
from deepseek_trt.plugins.cpu.operators import (
    ACTIVATIONS,
    ANGLES,
    ATTENTION,
    ATTENTION_FLOAT16,
    ATTENTION_NARROW,
    ATTENTION_NARROW_FLOAT16,
    CACHE_FORMATS,
    CPU_DOMAIN,
    FEED_FORWARD,
    HEAD,
    PREFILL_ATTENTION,
    PREFILL_ATTENTION_FLOAT16,
    PREFILL_ATTENTION_NARROW,
    PREFILL_ATTENTION_NARROW_FLOAT16,
    PREFILL_FEED_FORWARD,
    Attributes,
    Operator,
)
from deepseek_trt.plugins.cpu.patterns import Found, match, uncast

_Pools = tuple[ir.DataType | None, ...]
_FLOAT, _FLOAT16, _INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8
# By the types of the cache's pools.
_ATTENTIONS: dict[_Pools, Operator] = {
    (_FLOAT,): ATTENTION,
    (_FLOAT16,): ATTENTION_FLOAT16,
    (_INT8, _FLOAT): ATTENTION_NARROW,
    (_INT8, _FLOAT16): ATTENTION_NARROW_FLOAT16,
}
_PREFILL_ATTENTIONS: dict[_Pools, Operator] = {
    (_FLOAT,): PREFILL_ATTENTION,
    (_FLOAT16,): PREFILL_ATTENTION_FLOAT16,
    (_INT8, _FLOAT): PREFILL_ATTENTION_NARROW,
    (_INT8, _FLOAT16): PREFILL_ATTENTION_NARROW_FLOAT16,
}


def fused_bytes(traced: bytes) -> tuple[bytes, list[str]]:
    """The graph with fused operators, in float32 where it is bfloat16, and what stays as exported."""
    model = ir.serde.deserialize_model(onnx.load_model_from_string(traced))
    WidenBfloat16()(model)
    fuse = FuseForCpu()
    fuse(model)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data, fuse.left


@dataclass
class FuseForCpu(ir.passes.InPlacePass):
    """Replaces what it recognises, and counts it; `left` names the custom operators that it did not."""

    fused: int = 0
    left: list[str] = field(default_factory=list)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        decodes = any(node.op_type.startswith("MlaDecode") for node in graph)
        for node in list(graph):
            if node.op_type == "Add":
                self._fuse_half(graph, node, FEED_FORWARD if decodes else PREFILL_FEED_FORWARD)
        self._fuse_head(graph)
        if self.fused:
            _replace_angles(graph)
            graph.opset_imports[CPU_DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)
        self.left = [node.name or node.op_type for node in graph if node.domain == DOMAIN]
        return ir.passes.PassResult(model, modified=self.fused > 0)

    def _fuse_half(self, graph: ir.Graph, node: ir.Node, feed_forward: Operator) -> None:
        out = node.outputs[0]
        for pattern, operators in ((halves.ATTENTION, _ATTENTIONS), (halves.PREFILL_ATTENTION, _PREFILL_ATTENTIONS)):
            if (found := match(pattern, out)) and _pools(found) in operators and _same_dims(found):
                return self._attention(graph, node, operators[_pools(found)], found)
        if (found := match(halves.FEED_FORWARD, out)) and _routed_together(found):
            self._feed_forward(graph, node, feed_forward, found)

    def _attention(self, graph: ir.Graph, at: ir.Node, operator: Operator, f: Found) -> None:
        mla = _producer(f["attended"])
        attributes: dict[str, float | int] = {
            "query_compression": int("q_a" in f),
            "scale": mla.attributes["scale"].as_float(),
            "eps": _epsilon(f["norm"]),
            "latent_eps": _epsilon(f["kv_norm"]),
        }
        if "past_rope" in f:
            attributes["cache_format"] = CACHE_FORMATS.index(mla.attributes["format"].as_string())
            attributes["cache_group"] = mla.attributes["group"].as_int()
        node = self._insert(graph, at, operator, f, attributes)
        if node is not None:
            for old, new in zip(mla.outputs[1:], node.outputs[1:], strict=True):
                _move(old, new)

    def _feed_forward(self, graph: ir.Graph, at: ir.Node, operator: Operator, f: Found) -> None:
        attributes: dict[str, float | int] = {"eps": _epsilon(f["norm"]), "shared": int("shared_down" in f)}
        activations = {name for name in ACTIVATIONS if name in f}
        if "experts" in f:
            activations.add(_producer(f["experts"]).attributes["activation"].as_string())
            attributes |= _routing(_producer(f["routed"]))
        if len(activations) == 1:
            attributes["activation"] = ACTIVATIONS.index(activations.pop())
            self._insert(graph, at, operator, {**f, **_lengths(graph)}, attributes)

    def _fuse_head(self, graph: ir.Graph) -> None:
        out = logits = graph.outputs[0]
        if (reshaped := _producer(out)).op_type == "Reshape" and reshaped.inputs[0] is not None:
            logits = reshaped.inputs[0]
        padded = out.shape is not None and out.shape.rank() == 3 and out.shape[1] == SEQUENCE
        found = match(halves.HEAD, logits)
        if found is None or not halves.formats_fit(found):
            return
        attributes: Attributes = {"padded": int(padded), "eps": _epsilon(found["norm"])}
        node = _node(graph, _producer(logits), HEAD, {**found, **_lengths(graph)}, attributes)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_after(_producer(logits), node)
        _move(logits, node.outputs[0])
        self.fused += 1

    def _insert(
        self, graph: ir.Graph, at: ir.Node, operator: Operator, f: Found, attributes: Attributes
    ) -> ir.Node | None:
        """Put the operator in the place of `at`, whose output goes on in its own type.

        Not where a bias is missing, nor where codes are of another type than their format's.
        """
        biases = _biases(operator, f, attributes)
        if biases is None or not halves.formats_fit(f):
            return None
        node = _node(graph, at, operator, f, {**attributes, "bias": biases}, name=f"cpu_{at.name}")
        old, new = at.outputs[0], node.outputs[0]
        new.name, new.dtype, new.shape = f"{old.name}.cpu", ir.DataType.FLOAT, old.shape
        graph.insert_after(at, node)
        self.fused += 1
        if old.dtype not in (None, ir.DataType.FLOAT):
            cast = ir.node("Cast", [new], {"to": int(old.dtype)})
            graph.insert_after(node, cast)
            new = cast.outputs[0]
        _move(old, new)
        return node


def _replace_angles(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type in ANGLES and node.domain == "" and node.outputs[0].dtype == ir.DataType.FLOAT:
            new = ir.node(node.op_type, node.inputs, domain=CPU_DOMAIN, name=f"cpu_{node.name}")
            graph.insert_after(node, new)
            _move(node.outputs[0], new.outputs[0])


def _node(
    graph: ir.Graph, at: ir.Node, operator: Operator, f: Found, attributes: Attributes, name: str | None = None
) -> ir.Node:
    """A node of the operator, its inputs found by their names; what is to be float32 is cast before `at`."""
    inputs: list[ir.Value] = []
    for i in operator.inputs_with(attributes):
        inputs.append(_float(graph, at, f[i.name]) if i.dtype == "float32" else f[i.name])
        if i.dtype == "linear" and f"{i.name}_scale" in f:
            inputs.append(f[f"{i.name}_scale"])
    outputs = len(operator.outputs)
    return ir.node(
        operator.name, inputs, operator.ordered(attributes), domain=CPU_DOMAIN, num_outputs=outputs, name=name
    )


def _biases(operator: Operator, f: Found, attributes: Attributes) -> int | None:
    """1 where all biases are there that the operator may have, 0 where none is; None where only some are."""
    names, without = ({i.name for i in operator.inputs_with({**attributes, "bias": bias})} for bias in (1, 0))
    biases = names - without
    found = biases & f.keys()
    if not all(f[name].is_initializer() for name in found):
        return None  # a sum of something else
    return int(bool(found)) if found in (set(), biases) else None


def _float(graph: ir.Graph, at: ir.Node, value: ir.Value) -> ir.Value:
    """The value in float32."""
    value = uncast(value)
    if value.dtype == ir.DataType.FLOAT:
        return value
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].name, cast.outputs[0].dtype = f"{value.name}.cpu_{at.name}", ir.DataType.FLOAT
    graph.insert_before(at, cast)
    return cast.outputs[0]


def _producer(value: ir.Value) -> ir.Node:
    node = uncast(value).producer()
    assert node is not None
    return node


def _epsilon(norm: ir.Value) -> float:
    return _producer(norm).attributes["epsilon"].as_float()


def _lengths(graph: ir.Graph) -> Found:
    return {value.name: value for value in graph.inputs if value.name == halves.LENGTHS}


def _routing(router: ir.Node) -> dict[str, float | int]:
    a = router.attributes
    return {
        "experts": 1,
        "biased": int(router.op_type == "MoeBiasedRouter"),
        "top_k": a["top_k"].as_int(),
        "groups": a["n_group"].as_int(),
        "top_groups": a["topk_group"].as_int(),
        "normalised": a["norm_topk_prob"].as_int(),
        "factor": a["routed_scaling_factor"].as_float(),
    }


def _pools(f: Found) -> _Pools:
    """Types of the cache's pools."""
    return tuple(f[name].dtype for name in ("past", "past_rope") if name in f)


def _rope_width(f: Found) -> Any:
    """Of the rope part, as the cache and the format have it; None where they do not fit together."""
    past, w_uk = f["past"].shape, f["w_uk"].shape
    if past is None or w_uk is None:
        return None
    if "past_rope" not in f:
        return past[2] - w_uk[2]
    mla, rest = _producer(f["attended"]).attributes, f["past_rope"].shape
    group = mla["group"].as_int()
    fits = mla["format"].as_string() in CACHE_FORMATS[1:] and past[2] == w_uk[2] and group > 0 and past[2] % group == 0
    return rest[2] - past[2] // group if rest is not None and fits else None


def _same_dims(f: Found) -> bool:
    """Whether the slices of the query are its parts without and with rope, in this order."""
    query, w_uk, nope = f["query"].shape, f["w_uk"].shape, f["q_nope"].shape
    rope = f["q_rope"].shape
    if query is None or w_uk is None or nope is None or rope is None:
        return False
    same_heads = query[2] == w_uk[0]
    return same_heads and nope[3] == w_uk[1] and rope[3] == _rope_width(f) and query[3] == nope[3] + rope[3]


def _routed_together(f: Found) -> bool:
    """Whether weights and ids of the experts come from one router."""
    if "experts" not in f:
        return True
    ids = _producer(f["experts"]).inputs[2]
    return ids is not None and ids.producer() is _producer(f["routed"])


def _move(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand wherever `old` does, under its name, be it an output of the graph."""
    name = old.name
    new.dtype, new.shape = old.dtype or ir.DataType.FLOAT, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.exported", name
