"""What halves of decoder layers look like in exported graphs; parts have the names that operators.py gives them.

A linear's weight is whole (Gemm), or narrow: then its scales are found as NAME_scale, its product as NAME_codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from deepseek_trt.plugins.cpu.patterns import Found, OneOf, Op, uncast

LENGTHS = "sequence_lengths"  # an input of both graphs
_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
# By a narrow node's format: the group, and the types of codes and scales.
_PARTS = {
    "int8": (32, ir.DataType.INT8, ir.DataType.FLOAT16),
    "int4": (32, ir.DataType.UINT8, ir.DataType.FLOAT16),
    "fp8": (128, ir.DataType.UINT8, ir.DataType.FLOAT),
}
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
    return Op("LinearNarrow", (x, name, f"{name}_scale"), name=f"{name}_codes")


def _norm(x: str | Op | OneOf, name: str) -> Op:
    return Op("RMSNormalization", (x, f"{name}_weight"), {"axis": -1}, name=name)


_X = _norm("x", "norm")
_COMPRESSED = _norm(_linear(_X, "q_a"), "q_norm")
_QUERY = Op("Reshape", (_product(OneOf((_COMPRESSED, _X)), "q"), None), name="query")
_Q_NOPE = Op("Slice", (_QUERY, None, None, None, None), name="q_nope")
_Q_ROPE = Op("Slice", (_QUERY, None, None, None, None), name="q_rope")
_ABSORBED = Op("Transpose", (Op("MatMul", (Op("Transpose", (Op("Reshape", (_Q_NOPE, None)),)), "w_uk")),))
_ROTATED = Op("RotaryEmbedding", (Op("Reshape", (_Q_ROPE, None)), "cos", "sin"), _ADJACENT)
_Q_ROTATED = Op("Reshape", (Op("Reshape", (_ROTATED, None)), None))
_ABSORBED_QUERY = Op("Reshape", (Op("Concat", (_ABSORBED, _Q_ROTATED), {"axis": -1}), None))
_KV = Op("Reshape", (_linear(_X, "kv_a"), None))
_LATENT = Op(
    "Concat",
    (
        _norm(Op("Slice", (_KV, None, None, None, None)), "kv_norm"),
        Op("RotaryEmbedding", (Op("Slice", (_KV, None, None, None, None)), "cos", "sin"), _ADJACENT),
    ),
    {"axis": -1},
)
_PLACES = ("page_table", "past_lengths", LENGTHS)


def _attended(op: str, query: Op, *more: str) -> OneOf:
    """Attention over a whole cache or a narrow one."""
    whole = Op(op, (query, _LATENT, "past", *_PLACES, *more), name="attended")
    return OneOf((whole, Op(f"{op}Narrow", (query, _LATENT, "past", "past_rope", *_PLACES, *more), name="attended")))


_MLA = _attended("MlaDecode", _ABSORBED_QUERY)
_BY_HEAD = Op("Transpose", (Op("Reshape", (_MLA, None)),), {"perm": (1, 0, 2)})
_VALUE = Op("MatMul", (_BY_HEAD, Op("Transpose", ("w_uv",), {"perm": (0, 2, 1)})))
ATTENTION = Op("Add", ("x", _linear(Op("Reshape", (Op("Transpose", (_VALUE,), {"perm": (1, 0, 2)}), None)), "o")))
_EXPANDED_QUERY = Op("Concat", (_Q_NOPE, Op("Reshape", (_ROTATED, None))), {"axis": -1})
_MLA_PREFILL = _attended("MlaPrefill", _EXPANDED_QUERY, "w_uk", "w_uv")
PREFILL_ATTENTION = Op("Add", ("x", _linear(Op("Reshape", (_MLA_PREFILL, None)), "o")))

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
        Op("MoeExpertsNarrow", (_X, _ROUTER, None, *_STACKS), name="experts"),
    )
)
FEED_FORWARD = Op("Add", ("x", OneOf((Op("Add", (_MOE, _MLP)), _MOE, _MLP))))
HEAD = _product(_X, "head")


def formats_fit(f: Found) -> bool:
    """Whether narrow nodes have the inputs of the contract, codes and scales of the types that their format has."""
    nodes = [uncast(value).producer() for name, value in f.items() if name == "experts" or name.endswith("_codes")]
    return all(_codes_fit(node) for node in nodes if node is not None and node.op_type in _CODE_INPUTS)


def _codes_fit(node: ir.Node) -> bool:
    given = {name: node.attributes[name].value for name in ("format", "group") if name in node.attributes}
    group, *wanted = _PARTS.get(str(given.get("format")), (None, None, None))
    places = _CODE_INPUTS[node.op_type]
    if group is None or given.get("group") != group or len(node.inputs) != places[-1] + 2:
        return False
    return all(_types(node.inputs[place : place + 2]) == wanted for place in places)


def _types(values: Sequence[ir.Value | None]) -> list[ir.DataType | None]:
    return [None if value is None else value.dtype for value in values]
