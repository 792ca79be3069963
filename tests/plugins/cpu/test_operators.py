"""The tables of the CPU operators: the graph pass and the C++ follow them, and the C++ refuses what does not."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deepseek_trt.plugins.cpu.library import source_files
from deepseek_trt.plugins.cpu.operators import (
    ACTIVATIONS,
    ATTENTION,
    ATTENTION_FLOAT16,
    CPU_DOMAIN,
    FEED_FORWARD,
    HEAD,
    OPERATORS,
    PREFILL_FEED_FORWARD,
    Attribute,
    Attributes,
    Operator,
    generated_headers,
)
from deepseek_trt.plugins.cxx import find_compiler

RECORDING = Path(__file__).parent / "csrc" / "recording_kernels.cpp"
DTYPES = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "int8": np.int8}
DTYPES |= {"weights": np.float32, "linear": np.float32}
FORMATS = {
    ("int8", "float16"): 1,
    ("uint8", "float16"): 2,
    ("uint8", "float32"): 3,
}  # args.h's numbers, of codes and scales
WIDTH = 80  # room for all that a kernel records
# What recording_kernels.cpp writes: numbers of these inputs, then (number, rows, columns) of those, then sizes and
# attributes.
SCALARS: dict[str, tuple[str, ...]] = {
    "Attention": ("x", "cos", "sin", "past", "page_table", "past_lengths", "sequence_lengths"),
    "FeedForward": ("x", "correction", "sequence_lengths"),
    "Head": ("x", "sequence_lengths"),
}
MATRICES = {
    "Attention": "norm_weight kv_a kv_norm_weight w_uk w_uv o q q_a q_norm_weight kv_a_bias o_bias q_a_bias",
    "FeedForward": "norm_weight router gate up down shared_gate shared_up shared_down "
    "shared_gate_bias shared_up_bias shared_down_bias",
    "Head": "norm_weight head",
}
# (input, axis) of each size.
SIZES: dict[str, tuple[tuple[str, int], ...]] = {
    "Attention": (
        *(("past_lengths", 0), ("x", 1), ("past", 0), ("past", 1), ("page_table", 1)),
        *(("w_uk", 0), ("w_uk", 1), ("w_uv", 1), ("w_uk", 2), ("cos", 1)),
    ),
    "FeedForward": (("x", 0), ("x", 1), ("router", 0), ("gate", 1), ("sequence_lengths", 0)),
    "Head": (("x", 0), ("x", 1), ("sequence_lengths", 0)),
}
ATTRIBUTES = {
    "Attention": ("scale", "eps", "latent_eps"),
    "FeedForward": ("eps", "activation", "top_k", "groups", "top_groups", "normalised", "factor"),
    "Head": ("eps",),
}
SCALARS["AttentionNarrow"] = (*SCALARS["Attention"][:4], "past_rope", *SCALARS["Attention"][4:])
MATRICES["AttentionNarrow"] = MATRICES["Attention"]
SIZES["AttentionNarrow"] = (*SIZES["Attention"], ("past", 2), ("past_rope", 2))
ATTRIBUTES["AttentionNarrow"] = (*ATTRIBUTES["Attention"], "cache_format", "cache_group")
for values in (SCALARS, SIZES, MATRICES, ATTRIBUTES):
    values |= {f"Prefill{kind}": values[kind] for kind in ("Attention", "AttentionNarrow", "FeedForward")}
SHAPES = {
    "sequence_lengths": (2,),
    "x": (2, WIDTH),
    "past": (5, 3, 4),
    "past_rope": (5, 3, 7),
    "page_table": (2, 6),
    "past_lengths": (2,),
    "head": (WIDTH, 3),
}


def backwards(operator: Operator) -> Operator:
    return dataclasses.replace(operator, inputs=operator.inputs[::-1], attributes=operator.attributes[::-1])


TABLES = {"as shipped": OPERATORS, "backwards": tuple(backwards(operator) for operator in OPERATORS)}
Build = Callable[[str], Path]
Tensors = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """recording(table): a library of these tables whose kernels record."""

    @functools.cache
    def build(table: str) -> Path:
        folder = tmp_path_factory.mktemp("recording")
        for name, data in source_files(TABLES[table]).items():
            (folder / name).write_bytes(data)
        flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Werror", f"-I{folder}"]
        sources = ["ops.cpp", "team.cpp", str(RECORDING), "-lpthread"]
        find_compiler().run([*flags, *sources, "-o", "recording.so"], folder)
        return folder / "recording.so"

    return build


def combinations(operator: Operator) -> Iterator[dict[str, float | int]]:
    """Attributes of an operator's nodes: every choice of what they switch, distinct numbers for the rest."""
    switches = sorted({name for i in operator.inputs for name in i.only_with})
    for bits in itertools.product((0, 1), repeat=len(switches)):
        switched = dict(zip(switches, bits, strict=True))
        rest = {a.name: number(a, k) for k, a in enumerate(operator.attributes) if a.name not in switches}
        yield operator.ordered(rest | switched)


def number(attribute: Attribute, place: int) -> float | int:
    if attribute.name == "activation":
        return len(ACTIVATIONS) - 1
    return 0.5 + place if attribute.type == "float" else 2 + place if attribute.name != "normalised" else 1


def tensors_of(operator: Operator, attributes: Attributes) -> Tensors:
    """The operator's inputs, each full of a number of its own and of a shape of its own."""
    numbers = {name: 10 + k for k, name in enumerate(sorted(i.name for i in operator.inputs))}
    return {
        i.name: np.full(SHAPES.get(i.name, (numbers[i.name], 3, 2)), numbers[i.name], DTYPES[i.dtype])
        for i in operator.inputs_with(attributes)
    }


def run(library: Path, operator: Operator, attributes: Attributes, given: Tensors) -> list[float]:
    """The first row of what a node with these inputs gives, in their order."""
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in given.items()}
    inputs = [helper.make_tensor_value_info(name, types[name], array.shape) for name, array in given.items()]
    outputs = [f"out{i}" for i in range(len(operator.outputs))]
    node = helper.make_node(operator.name, list(given), outputs, domain=CPU_DOMAIN, **attributes)
    out = [helper.make_tensor_value_info("out0", TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CPU_DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], "one", inputs, out), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["out0"], dict(given))[0].ravel().tolist()


def expected(operator: Operator, attributes: Attributes, given: Tensors) -> list[float]:
    kind = operator.name.removesuffix("Float16")
    row = [float(given[name].flat[0]) if name in given else 0.0 for name in SCALARS[kind]]
    for name in MATRICES[kind].split():
        row += matrix(given.get(name), given.get(f"{name}_scale"))
    row += [given[name].shape[axis] if name in given else 0 for name, axis in SIZES[kind]]
    return [*row, *(attributes.get(name, 0) for name in ATTRIBUTES[kind])]


def matrix(t: np.ndarray[Any, Any] | None, scale: np.ndarray[Any, Any] | None) -> list[float]:
    if t is None:
        return [0.0] * 3
    form = 0 if scale is None else FORMATS[t.dtype.name, scale.dtype.name]
    row = [float(t.flat[0]), t.size // t.shape[-1], t.shape[-1] * (2 if form == 2 else 1)]
    return row if scale is None else [*row, form, *matrix(scale, None)]


def narrowed(operator: Operator, given: Tensors, place: int) -> Tensors:
    """Every linear's weight as codes, of int8, int4 or fp8 as its place among them says, counted from `place` on."""
    linears = [i.name for i in operator.inputs if i.dtype == "linear" and i.name in given]
    out: dict[str, np.ndarray[Any, Any]] = {}
    for name, tensor in given.items():
        if name not in linears:
            out[name] = tensor
            continue
        k = linears.index(name)
        codes, scales = ((np.uint8, np.float16), (np.int8, np.float16), (np.uint8, np.float32))[(k + place) % 3]
        out[name] = tensor.astype(codes)
        out[f"{name}_scale"] = np.full((3 + k, 2, 1), 0.5 + k, scales)
    return out


@pytest.mark.parametrize("place", range(len(OPERATORS)), ids=[operator.name for operator in OPERATORS])
@pytest.mark.parametrize("table", TABLES)
def test_every_linear_may_be_narrow(recording: Build, table: str, place: int) -> None:
    operator = TABLES[table][place]
    attributes = list(combinations(operator))[-1]
    for first in range(3):
        given = narrowed(operator, tensors_of(operator, attributes), first)
        wanted = expected(operator, attributes, given)
        assert run(recording(table), operator, attributes, given)[: len(wanted)] == wanted


@pytest.mark.parametrize("place", range(len(OPERATORS)), ids=[operator.name for operator in OPERATORS])
@pytest.mark.parametrize("table", TABLES)
def test_every_combination_is_read_by_name(recording: Build, table: str, place: int) -> None:
    operator = TABLES[table][place]
    for attributes in combinations(operator):
        given = tensors_of(operator, attributes)
        wanted = expected(operator, attributes, given)
        assert run(recording(table), operator, attributes, given)[: len(wanted)] == wanted


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda given: {key: value for key, value in given.items() if key != name}


@pytest.mark.parametrize(
    ("operator", "mend", "words"),
    [
        (ATTENTION, without("q_a_bias"), "Attention: input q_a_bias is missing; the node has 18 inputs"),
        (ATTENTION, without("kv_a"), "Attention: input q_a_bias is missing; the node has 18 inputs"),
        (ATTENTION, without("past"), "Attention: input past is of another type, ONNX's number 6"),
        (FEED_FORWARD, lambda g: {**g, "more": g["x"]}, "FeedForward: it takes 14 inputs; the node has 15 inputs"),
        (PREFILL_FEED_FORWARD, without("sequence_lengths"), "PrefillFeedForward: input sequence_lengths is of another"),
        (HEAD, lambda g: {**g, "x": g["x"].astype(np.float16)}, "Head: input x is of another type, ONNX's number 10"),
        (HEAD, lambda g: {**g, "head": g["head"].astype(np.int32)}, "Head: input head is of another type"),
        (HEAD, lambda g: {**g, "head": g["head"].astype(np.int8)}, "Head: input head_scale is missing"),
        (ATTENTION, lambda g: {**g, "kv_a": g["kv_a"].astype(np.int8)}, "Attention: input kv_a_scale is of another"),
        (ATTENTION, lambda g: {**g, "w_uk": g["w_uk"].astype(np.int8)}, "Attention: input w_uk is of another type"),
        (FEED_FORWARD, lambda g: {**g, "router": g["router"].astype(np.uint8)}, "input router is of another type"),
    ],
)
def test_other_inputs_are_refused_by_name(
    recording: Build, operator: Operator, mend: Callable[[Tensors], Tensors], words: str
) -> None:
    attributes = list(combinations(operator))[-1]
    with pytest.raises(Exception, match=words):
        run(recording("as shipped"), operator, attributes, mend(tensors_of(operator, attributes)))


@pytest.mark.parametrize(("operator", "name"), [(ATTENTION_FLOAT16, "scale"), (FEED_FORWARD, "top_k"), (HEAD, "eps")])
def test_a_missing_attribute_is_refused_by_name(recording: Build, operator: Operator, name: str) -> None:
    attributes = list(combinations(operator))[-1]
    given = tensors_of(operator, attributes)
    del attributes[name]
    with pytest.raises(Exception, match=f"{operator.name}: attribute {name} is missing"):
        run(recording("as shipped"), operator, attributes, given)


def test_the_headers_follow_from_the_tables_alone() -> None:
    assert generated_headers() == generated_headers()
    assert generated_headers() != generated_headers(TABLES["backwards"])
    assert all(data.startswith(b"// Made from plugins/cpu/operators.py") for data in generated_headers().values())
    assert source_files().items() >= generated_headers().items()
