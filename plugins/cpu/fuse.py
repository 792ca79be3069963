"""A graph pass: halves of decoder layers become single operators of the compiled CPU library (plugins/cpu/csrc).

It works on prefill and decode. What it does not recognise stays as it was exported; `left` says what that is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.export.passes.widen import WidenBfloat16
from deepseek_trt.plugins.cpu.operators import (
    ACTIVATIONS,
    ATTENTION,
    ATTENTION_FLOAT16,
    CPU_DOMAIN,
    FEED_FORWARD,
    HEAD,
    PREFILL_ATTENTION,
    PREFILL_ATTENTION_FLOAT16,
    PREFILL_FEED_FORWARD,
    Attributes,
    Operator,
)
from deepseek_trt.plugins.cpu.patterns import Found, OneOf, Op, match, uncast

# By the cache's type.
_ATTENTIONS: dict[ir.DataType | None, Operator] = {ir.DataType.FLOAT: ATTENTION, ir.DataType.FLOAT16: ATTENTION_FLOAT16}
_PREFILL_ATTENTIONS: dict[ir.DataType | None, Operator] = {
    ir.DataType.FLOAT: PREFILL_ATTENTION,
    ir.DataType.FLOAT16: PREFILL_ATTENTION_FLOAT16,
}
_LENGTHS = "sequence_lengths"  # an input of prefill, not of decode
_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
_GROUP = {"group": 32}
_CODES = {"int8": ir.DataType.INT8, "int4": ir.DataType.UINT8}  # by a narrow node's format
_CODE_INPUTS = {"LinearNarrow": (1,), "MoeExpertsNarrow": (3, 5, 7)}  # right behind each its scales, and no more
_ADJACENT = {"interleaved": 1}


def _product(x: str | Op | OneOf, name: str) -> OneOf:
    """A linear without a bias, its weight whole or narrow."""
    return OneOf((Op("Gemm", (x, name), _GEMM), _narrow(x, name)))


def _linear(x: str | Op | OneOf, name: str) -> OneOf:
    """A linear with a bias or without, its weight whole or narrow."""
    biased = Op("Add", (_narrow(x, name), f"{name}_bias"))
    return OneOf((Op("Gemm", (x, name), _GEMM, optional=f"{name}_bias"), _narrow(x, name), biased))


def _narrow(x: str | Op | OneOf, name: str) -> Op:
    return Op("LinearNarrow", (x, name, f"{name}_scale"), _GROUP, name=f"{name}_codes")


def _norm(x: str | Op | OneOf, name: str) -> Op:
    return Op("RMSNormalization", (x, f"{name}_weight"), {"axis": -1}, name=name)


_X = _norm("x", "norm")
_COMPRESSED = _norm(_linear(_X, "q_a"), "q_norm")
_QUERY = Op("Reshape", (_product(OneOf((_COMPRESSED, _X)), "q"), None), name="query")
_Q_NOPE = Op("Slice", (_QUERY, None, None, None, None), name="q_nope")
_Q_ROPE = Op("Slice", (_QUERY, None, None, None, None), name="q_rope")
_ABSORBED = Op("Transpose", (Op("MatMul", (Op("Transpose", (Op("Squeeze", (_Q_NOPE, None)),)), "w_uk")),))
_ROTATED = Op("RotaryEmbedding", (Op("Reshape", (_Q_ROPE, None)), "cos", "sin"), _ADJACENT)
_ABSORBED_QUERY = Op("Concat", (_ABSORBED, Op("Squeeze", (Op("Reshape", (_ROTATED, None)), None))), {"axis": -1})
_KV = Op("Reshape", (_linear(_X, "kv_a"), None))
_LATENT = Op(
    "Concat",
    (
        _norm(Op("Slice", (_KV, None, None, None, None)), "kv_norm"),
        Op("RotaryEmbedding", (Op("Slice", (_KV, None, None, None, None)), "cos", "sin"), _ADJACENT),
    ),
    {"axis": -1},
)
_MLA = Op("MlaDecode", (_ABSORBED_QUERY, _LATENT, "past", "page_table", "past_lengths"), name="attended")
_VALUE = Op("MatMul", (Op("Transpose", (_MLA,), {"perm": (1, 0, 2)}), Op("Transpose", ("w_uv",), {"perm": (0, 2, 1)})))
_ATTENTION = Op("Add", ("x", _linear(Op("Reshape", (Op("Transpose", (_VALUE,), {"perm": (1, 0, 2)}), None)), "o")))
_EXPANDED_QUERY = Op("Concat", (_Q_NOPE, Op("Reshape", (_ROTATED, None))), {"axis": -1})
_MLA_PREFILL = Op(
    "MlaPrefill",
    (_EXPANDED_QUERY, _LATENT, "past", "page_table", "past_lengths", _LENGTHS, "w_uk", "w_uv"),
    name="attended",
)
_PREFILL_ATTENTION = Op("Add", ("x", _linear(Op("Reshape", (_MLA_PREFILL, None)), "o")))

_GATE, _UP = _linear(_X, "shared_gate"), _linear(_X, "shared_up")
_ACTIVATED = OneOf(
    (
        Op("Mul", (_GATE, Op("Sigmoid", (_GATE,))), name="silu"),
        Op("Relu", (_GATE,), name="relu"),
        Op("Gelu", (_GATE,), {"approximate": "tanh"}, name="gelu_pytorch_tanh"),
        Op("Gelu", (_GATE,), name="gelu"),
    )
)
_MLP = _linear(Op("Mul", (_ACTIVATED, _UP)), "shared_down")
_LOGITS = Op("Gemm", (_X, "router"), _GEMM)
_BIASED = Op("MoeBiasedRouter", (_LOGITS, "correction"), name="routed")
_ROUTER = OneOf((Op("MoeRouter", (_LOGITS,), name="routed"), _BIASED))
_STACKS = ("gate", "gate_scale", "up", "up_scale", "down", "down_scale")
_MOE = OneOf(
    (
        Op("MoeExperts", (_X, _ROUTER, None, "gate", "up", "down"), name="experts"),
        Op("MoeExpertsNarrow", (_X, _ROUTER, None, *_STACKS), _GROUP, name="experts"),
    )
)
_FEED_FORWARD = Op("Add", ("x", OneOf((Op("Add", (_MOE, _MLP)), _MOE, _MLP))))
_HEAD = _product(_X, "head")


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
        for node in list(graph):
            if node.op_type == "Add":
                self._fuse_half(graph, node)
        self._fuse_head(graph)
        if self.fused:
            graph.opset_imports[CPU_DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)
        self.left = [node.name or node.op_type for node in graph if node.domain == DOMAIN]
        return ir.passes.PassResult(model, modified=self.fused > 0)

    def _fuse_half(self, graph: ir.Graph, node: ir.Node) -> None:
        out = node.outputs[0]
        for pattern, operators in ((_ATTENTION, _ATTENTIONS), (_PREFILL_ATTENTION, _PREFILL_ATTENTIONS)):
            if (found := match(pattern, out)) and found["past"].dtype in operators and _same_dims(found):
                return self._attention(graph, node, operators[found["past"].dtype], found)
        if (found := match(_FEED_FORWARD, out)) and _routed_together(found):
            self._feed_forward(graph, node, found)

    def _attention(self, graph: ir.Graph, at: ir.Node, operator: Operator, f: Found) -> None:
        mla = _producer(f["attended"])
        attributes: dict[str, float | int] = {
            "query_compression": int("q_a" in f),
            "scale": mla.attributes["scale"].as_float(),
            "eps": _epsilon(f["norm"]),
            "latent_eps": _epsilon(f["kv_norm"]),
        }
        node = self._insert(graph, at, operator, f, attributes)
        if node is not None:
            _move(mla.outputs[1], node.outputs[1])

    def _feed_forward(self, graph: ir.Graph, at: ir.Node, f: Found) -> None:
        attributes: dict[str, float | int] = {"eps": _epsilon(f["norm"]), "shared": int("shared_down" in f)}
        activations = {name for name in ACTIVATIONS if name in f}
        if "experts" in f:
            activations.add(_producer(f["experts"]).attributes["activation"].as_string())
            attributes |= _routing(_producer(f["routed"]))
        if len(activations) == 1:
            attributes["activation"] = ACTIVATIONS.index(activations.pop())
            lengths = {value.name: value for value in graph.inputs if value.name == _LENGTHS}
            self._insert(graph, at, PREFILL_FEED_FORWARD if lengths else FEED_FORWARD, {**f, **lengths}, attributes)

    def _fuse_head(self, graph: ir.Graph) -> None:
        found = match(_HEAD, graph.outputs[0])
        if found is None or not _formats_fit(found):
            return
        at = _producer(graph.outputs[0])
        node = _node(graph, at, HEAD, found, {"eps": _epsilon(found["norm"])})
        node.outputs[0].dtype = ir.DataType.FLOAT
        graph.insert_after(at, node)
        _move(graph.outputs[0], node.outputs[0])
        self.fused += 1

    def _insert(
        self, graph: ir.Graph, at: ir.Node, operator: Operator, f: Found, attributes: Attributes
    ) -> ir.Node | None:
        """Put the operator in the place of `at`, whose output goes on in its own type.

        Not where a bias is missing, nor where codes are of another type than their format's.
        """
        biases = _biases(operator, f, attributes)
        if biases is None or not _formats_fit(f):
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


def _formats_fit(f: Found) -> bool:
    """Whether narrow nodes have the inputs of the contract, codes of the type that their format has."""
    nodes = [_producer(value) for name, value in f.items() if name == "experts" or name.endswith("_codes")]
    return all(_codes_fit(node) for node in nodes if node.op_type in _CODE_INPUTS)


def _codes_fit(node: ir.Node) -> bool:
    wanted = _CODES.get(node.attributes["format"].as_string()) if "format" in node.attributes else None
    places = _CODE_INPUTS[node.op_type]
    if wanted is None or len(node.inputs) != places[-1] + 2:
        return False
    codes = [node.inputs[place] for place in places]
    return all(value is not None and value.dtype == wanted for value in codes)


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


def _same_dims(f: Found) -> bool:
    """Whether the slices of the query are its parts without and with rope, in this order."""
    query, w_uk, nope = f["query"].shape, f["w_uk"].shape, f["q_nope"].shape
    rope, past = f["q_rope"].shape, f["past"].shape
    if query is None or w_uk is None or nope is None or rope is None or past is None:
        return False
    same_heads = query[2] == w_uk[0]
    return same_heads and nope[3] == w_uk[1] and rope[3] == past[2] - w_uk[2] and query[3] == nope[3] + rope[3]


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
