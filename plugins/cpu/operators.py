"""The operators of the compiled CPU library: what each takes, in order, for the graph pass and for the C++ alike.

fuse.py builds nodes from these tables; csrc/ops.cpp reads them by name through the headers that are generated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CPU_DOMAIN = "deepseek_trt.cpu"
CACHE_FORMATS = ("", "int8", "fp8")  # as csrc/args.h numbers them
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_pytorch_tanh")  # in a node, an activation is its place here

Attributes = Mapping[str, float | int]
DType = Literal["float32", "float16", "int32", "int8", "weights", "linear"]

_GENERATED = "// Made from plugins/cpu/operators.py when the library is built; changes here are lost.\n#pragma once\n"
_ORT_TYPES = {
    "float32": "ort::FLOAT",
    "float16": "ort::FLOAT16",
    "int32": "ort::INT32",
    "int8": "ort::INT8",
    "weights": "ort::UNDEFINED",
}
_CPP_TYPES = {"int": "int64_t", "float": "float"}


@dataclass(frozen=True)
class Input:
    """One input of an operator; dtype "weights" is any of float32, float16 and bfloat16.

    "linear" is that, too; or codes, int8 [.., N, K] or of 4 bits uint8 [.., N, K / 2], and as one more input right
    behind them their scales, float16 [.., N, K / 32]; or fp8 codes, uint8 [.., N, K], whose scales are float32, of
    blocks of 128 x 128.

    A node has it where all the attributes that `only_with` names are there and not 0.
    """

    name: str
    dtype: DType = "weights"
    only_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attribute:
    """One attribute of an operator, which a node has as `Input` says: with itself, it is left out where it is 0."""

    name: str
    type: Literal["int", "float"] = "int"
    only_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operator:
    """One operator: inputs and attributes in the order that they have in a node, and the outputs' dtypes."""

    name: str
    inputs: tuple[Input, ...]
    attributes: tuple[Attribute, ...]
    outputs: tuple[DType, ...] = ("float32",)

    def inputs_with(self, given: Attributes) -> tuple[Input, ...]:
        """The inputs of a node with these attributes."""
        return tuple(i for i in self.inputs if _is_there(i, given))

    def ordered(self, given: Attributes) -> dict[str, float | int]:
        """The attributes in their order. Raises KeyError where one is missing."""
        return {a.name: given[a.name] for a in self.attributes if _is_there(a, given)}


def _is_there(slot: Input | Attribute, given: Attributes) -> bool:
    return all(given.get(name) for name in slot.only_with)


def _inputs(names: str, dtype: DType = "weights", only_with: tuple[str, ...] = ()) -> tuple[Input, ...]:
    return tuple(Input(name, dtype, only_with) for name in names.split(", "))


def _attributes(names: str, type: Literal["int", "float"] = "int", *only_with: str) -> tuple[Attribute, ...]:
    return tuple(Attribute(name, type, only_with) for name in names.split(", "))


def _attention(name: str, *cache: DType) -> Operator:
    """Over a cache of pools of these dtypes: latents; or codes, and rope parts with scales."""
    pools = tuple(Input(pool, dtype) for pool, dtype in zip(("past", "past_rope"), cache, strict=False))
    inputs = (
        *_inputs("x, cos, sin", "float32"),
        *pools,
        *_inputs("page_table, past_lengths, sequence_lengths", "int32"),
        Input("norm_weight"),
        Input("kv_a", "linear"),
        *_inputs("kv_norm_weight, w_uk, w_uv"),
        *_inputs("o, q", "linear"),
        Input("q_a", "linear", ("query_compression",)),
        Input("q_norm_weight", only_with=("query_compression",)),
        *_inputs("kv_a_bias, o_bias", only_with=("bias",)),
        Input("q_a_bias", only_with=("bias", "query_compression")),
    )
    attributes = (*_attributes("query_compression, bias"), *_attributes("scale, eps, latent_eps", "float"))
    if len(cache) > 1:
        attributes = (*attributes, *_attributes("cache_format, cache_group"))
    return Operator(name, inputs, attributes, ("float32", *cache))


ATTENTION = _attention("Attention", "float32")
ATTENTION_FLOAT16 = _attention("AttentionFloat16", "float16")
# Over a narrow cache, whose cache_format is a place in CACHE_FORMATS.
ATTENTION_NARROW = _attention("AttentionNarrow", "int8", "float32")
ATTENTION_NARROW_FLOAT16 = _attention("AttentionNarrowFloat16", "int8", "float16")
# The same for many new tokens a sequence.
PREFILL_ATTENTION = _attention("PrefillAttention", "float32")
PREFILL_ATTENTION_FLOAT16 = _attention("PrefillAttentionFloat16", "float16")
PREFILL_ATTENTION_NARROW = _attention("PrefillAttentionNarrow", "int8", "float32")
PREFILL_ATTENTION_NARROW_FLOAT16 = _attention("PrefillAttentionNarrowFloat16", "int8", "float16")


def _feed_forward(name: str) -> Operator:
    inputs = (
        Input("x", "float32"),
        Input("sequence_lengths", "int32"),
        Input("norm_weight"),
        Input("router", only_with=("experts",)),
        *_inputs("gate, up, down", "linear", ("experts",)),
        Input("correction", "float32", ("experts", "biased")),
        *_inputs("shared_gate, shared_up, shared_down", "linear", ("shared",)),
        *_inputs("shared_gate_bias, shared_up_bias, shared_down_bias", only_with=("shared", "bias")),
    )
    attributes = (
        Attribute("eps", "float"),
        *_attributes("shared, bias"),
        *_attributes("experts, biased, top_k, groups, top_groups, normalised", "int", "experts"),
        Attribute("factor", "float", ("experts",)),
        Attribute("activation"),
    )
    return Operator(name, inputs, attributes)


FEED_FORWARD = _feed_forward("FeedForward")
PREFILL_FEED_FORWARD = _feed_forward("PrefillFeedForward")
# padded: x holds all tokens of right-padded sequences, else those alone that get logits.
HEAD = Operator(
    "Head",
    (
        Input("x", "float32"),
        Input("sequence_lengths", "int32", ("padded",)),
        Input("norm_weight"),
        Input("head", "linear"),
    ),
    (Attribute("padded"), Attribute("eps", "float")),
)

PREFILL_OPERATORS = (
    PREFILL_ATTENTION,
    PREFILL_ATTENTION_FLOAT16,
    PREFILL_ATTENTION_NARROW,
    PREFILL_ATTENTION_NARROW_FLOAT16,
    PREFILL_FEED_FORWARD,
)
DECODE_ATTENTIONS = (ATTENTION, ATTENTION_FLOAT16, ATTENTION_NARROW, ATTENTION_NARROW_FLOAT16)
OPERATORS = (*DECODE_ATTENTIONS, FEED_FORWARD, HEAD, *PREFILL_OPERATORS)
# Of the rotations' angles, number by number: ONNX Runtime's own give other last bits in the rest of a block than in it,
# and where blocks end depends on the batch and on threads.
ANGLES = {name: Operator(name, (Input("x", "float32"),), ()) for name in ("Cos", "Sin")}


def generated_headers(operators: Sequence[Operator] = OPERATORS) -> dict[str, bytes]:
    """The headers of csrc that follow from the tables, by file name."""
    texts = {"activation.h": _activation_header(), "operators.h": _operators_header([*operators, *ANGLES.values()])}
    return {name: text.encode() for name, text in texts.items()}


def _activation_header() -> str:
    numbers = ", ".join(f"{name.upper()} = {number}" for number, name in enumerate(ACTIVATIONS))
    count = f"constexpr int ACTIVATIONS = {len(ACTIVATIONS)};"
    return f"{_GENERATED}\nenum class Activation : int {{ {numbers} }};\n{count}\n"


def _operators_header(operators: Sequence[Operator]) -> str:
    structs = "\n".join(_struct(operator) for operator in operators)
    return f"""{_GENERATED}
#include "node.h"

namespace operators {{

constexpr const char* CPU_DOMAIN = "{CPU_DOMAIN}";

{structs}
}}  // namespace operators
"""


def _struct(operator: Operator) -> str:
    # What depends on other attributes is read after them.
    attributes = sorted(operator.attributes, key=lambda a: bool(set(a.only_with) - {a.name}))
    return f"""struct {operator.name} {{
    static constexpr const char* NAME = "{operator.name}";
    static constexpr int OUTPUTS[] = {{{", ".join(_ORT_TYPES[dtype] for dtype in operator.outputs)}}};

    struct Attributes {{
        {_lines((f"{_CPP_TYPES[a.type]} {a.name} = 0;" for a in operator.attributes), 8)}

        explicit Attributes(const AttributeReader& node) {{
            {_lines((_read_attribute(a) for a in attributes), 12)}
        }}
    }};

    struct Inputs {{
        Tensor {", ".join(i.name for i in operator.inputs)};

        Inputs(const Attributes& node, InputReader in) {{
            {_lines((_read_input(i) for i in operator.inputs), 12)}
            in.end();
        }}
    }};
}};
"""


def _read_attribute(a: Attribute) -> str:
    condition = f'node.has("{a.name}")' if a.name in a.only_with else " && ".join(a.only_with)
    return f'{_if(condition)}node.read({a.name}, "{a.name}");'


def _read_input(i: Input) -> str:
    condition = " && ".join(f"node.{name}" for name in i.only_with)
    call = f'read_linear({i.name}, "{i.name}")'
    if i.dtype != "linear":
        call = f'read({i.name}, "{i.name}", {_ORT_TYPES[i.dtype]})'
    return f"{_if(condition)}in.{call};"


def _if(condition: str) -> str:
    return f"if ({condition}) " if condition else ""


def _lines(lines: Iterable[str], indent: int) -> str:
    return f"\n{' ' * indent}".join(lines)
