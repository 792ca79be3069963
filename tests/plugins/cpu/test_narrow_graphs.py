"""Graphs with narrow weights through the pass and the compiled operators, against whole weights of the same numbers.

A checkpoint holds numbers that int8 or int4 codes and their scales give. Its bundle, run by the exported bodies, is
what the graphs with LinearNarrow and MoeExpertsNarrow, made of the same trace, are compared with.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from deepseek_trt.engines.sessions import ort as sessions
from deepseek_trt.engines.sessions.loading import load_weights
from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.plugins.cpu.fuse import FuseForCpu, fused_bytes
from deepseek_trt.plugins.cpu.operators import ANGLES, CPU_DOMAIN

Run = Callable[[Session], list[npt.NDArray[Any]]]
GROUP, BLOCK = 32, 128
MOST = {"int8": 127, "int4": 8, "fp8": 448}
# Columns are whole groups, an odd number of them too; rows are what they may be.
BASE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "torch_dtype": "float32",
    "vocab_size": 61,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "hidden_act": "silu",
}
GROUPS = {"n_group": 4, "topk_group": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4 experts": {"moe_intermediate_size": 64, "n_shared_experts": 2},
    "int4, biases, query compression": {
        **{"q_lora_rank": 64, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    },
    "tied, relu, no shared experts": {"tie_word_embeddings": True, "hidden_act": "relu", "n_shared_experts": None},
    "int4 experts, sigmoid routing": {
        **{**GROUPS, "model_type": "deepseek_v3", "topk_method": "noaux_tc", "norm_topk_prob": True},
    },
    "int8, some columns no groups": {"intermediate_size": 100, "v_head_dim": 14, "q_lora_rank": 12},
    "fp8, blocks that are not whole": {
        **{"hidden_size": 144, "moe_intermediate_size": 136, "n_shared_experts": 2, "v_head_dim": 46},
        **{"intermediate_size": 300, "q_lora_rank": 20, "attention_bias": True},
    },
    "fp8, bfloat16": {"torch_dtype": "bfloat16", "mlp_bias": True},
    "fp8 experts, others int8": {"moe_intermediate_size": 160},
    "int4 experts, float16": {"torch_dtype": "float16", "norm_topk_prob": True},
    "int4 experts, bfloat16": {"torch_dtype": "bfloat16", "attention_bias": True},
}
# Of the largest logit. Each product with a narrow weight rounds tokens to 2^-16 of a group's largest, which adds some
# 2e-5 (in root mean square) of its own size; a dozen follow each other here, which norms keep near one.
TOLERANCE = 12 * 2e-5
TOLERANCE_FP8 = 5e-6  # which takes tokens as they are
# Exported bodies round what they compute to float16, which bodies of narrow weights do, too.
TOLERANCE_FLOAT16 = 8 * 2.0**-11


def form_of(variant: str, weight: str, shape: tuple[int, ...]) -> str | None:
    """The format of a weight of a traced graph or a checkpoint; None where it stays whole."""
    linear = weight.endswith("_proj.weight") or "kv_a_proj" in weight or ".experts." in weight or "lm_head" in weight
    if not linear or len(shape) < 2 or "kv_b_proj" in weight or "norm" in weight:
        return None
    if variant.startswith("fp8") and ("experts," not in variant or ".experts." in weight):
        return "fp8"
    if shape[-1] % GROUP:
        return None
    whole_int4 = variant.startswith("int4,")
    return "int4" if whole_int4 or ("int4" in variant and ".experts." in weight) else "int8"


def drawn(rng: np.random.Generator, form: str, shape: tuple[int, ...], exact: bool) -> npt.NDArray[np.float32]:
    """Numbers of codes and scales, one code of each group the largest; `exact`: in bfloat16, too. Those of fp8 are."""
    if form == "fp8":
        return drawn_fp8(rng, shape)
    most = MOST[form]
    codes = rng.integers(-most, most, (*shape[:-1], shape[-1] // GROUP, GROUP))
    codes[..., rng.integers(GROUP)] = -most
    size = 2.0 / most / np.sqrt(shape[-1])
    scales = (size * rng.uniform(0.5, 1.5, codes.shape[:-1])).astype(np.float16)
    if exact:
        scales = np.exp2(np.round(np.log2(scales.astype(np.float32)))).astype(np.float16)
    return (codes * scales[..., None].astype(np.float32)).astype(np.float32).reshape(shape)


def spread(scales: npt.NDArray[Any], rows: int, columns: int) -> npt.NDArray[Any]:
    """The scale of each number's block."""
    return np.repeat(np.repeat(scales, BLOCK, -2)[..., :rows, :], BLOCK, -1)[..., :columns]


def drawn_fp8(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The first number of each block is the largest, and scales are powers of two."""
    *stack, rows, columns = shape
    codes = rng.choice(np.delete(np.arange(256), [0x7F, 0xFF]), shape).astype(np.uint8)
    codes[..., ::BLOCK, ::BLOCK] = 0x7E
    size = np.log2(1 / 448 / np.sqrt(columns)) + 1
    scales = np.exp2(np.round(size + rng.uniform(-1, 1, (*stack, -(-rows // BLOCK), -(-columns // BLOCK)))))
    numbers = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (numbers * spread(scales, rows, columns)).astype(np.float32)


def fp8_taken_apart(numbers: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    numbers = numbers.astype(np.float32)
    scales = np.abs(numbers[..., ::BLOCK, ::BLOCK]) / np.float32(448)
    codes = (numbers / spread(scales, *numbers.shape[-2:])).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes.astype(np.float32) * spread(scales, *numbers.shape[-2:]), numbers)
    return codes.view(np.uint8), scales


def taken_apart(form: str, numbers: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The codes as they are stored, and the scales of what `drawn` gave."""
    if form == "fp8":
        return fp8_taken_apart(numbers)
    groups = numbers.astype(np.float32).reshape(*numbers.shape[:-1], -1, GROUP)
    scales = (np.abs(groups).max(axis=-1) / np.float32(MOST[form])).astype(np.float16)
    codes = np.rint(groups / scales[..., None].astype(np.float32))
    np.testing.assert_array_equal(codes * scales[..., None].astype(np.float32), groups)
    codes = codes.reshape(numbers.shape)
    if form == "int8":
        return codes.astype(np.int8), scales
    stored = (codes + 8).astype(np.uint8)
    return stored[..., ::2] | stored[..., 1::2] << 4, scales


@dataclass(frozen=True)
class Narrow:
    """A variant's bundle, whose weights are whole, and what stands for them."""

    name: str
    bundle: Bundle
    whole: dict[str, npt.NDArray[Any]]
    narrow: dict[str, npt.NDArray[Any]]

    def graph(self, graph: str) -> bytes:
        """The traced graph with nodes of narrow weights."""
        model = ir.serde.deserialize_model(onnx.load_from_string(self.bundle.traced_bytes(graph)))
        for node in list(model.graph):
            if node.op_type == "Gemm" and node.inputs[1].name in self.narrow:
                self._narrow_linear(model.graph, node)
            elif node.op_type == "MoeExperts" and node.inputs[3].name in self.narrow:
                self._narrow_experts(model.graph, node)
        return bytes(ir.to_proto(model).SerializeToString())

    def session(self, monkeypatch: pytest.MonkeyPatch, pages: int, threads: int) -> OrtSession:
        with monkeypatch.context() as patch:
            patch.setattr(sessions, "fused_graph", lambda _, graph: fused_bytes(self.graph(graph)))
            patch.setattr(sessions, "load_weights", lambda *_: {**self.whole, **self.narrow})
            session = OrtSession(self.bundle, pages, threads)
        assert "as exported" not in session.note
        return session

    def _narrow_linear(self, graph: ir.Graph, node: ir.Node) -> None:
        x, weight, *bias = node.inputs
        made = self._node("LinearNarrow", [x, *self._values(graph, weight)], weight.name, {})
        out = made.outputs[0]
        graph.insert_before(node, made)
        if bias:
            add = ir.node("Add", [out, bias[0]])
            graph.insert_before(node, add)
            out = add.outputs[0]
        self._replace(node.outputs[0], out)
        graph.remove(node, safe=True)

    def _narrow_experts(self, graph: ir.Graph, node: ir.Node) -> None:
        stacks = [value for stack in node.inputs[3:] for value in self._values(graph, stack)]
        name = node.inputs[3].name
        more = {"activation": node.attributes["activation"].as_string()}
        made = self._node("MoeExpertsNarrow", [*node.inputs[:3], *stacks], name, more)
        graph.insert_before(node, made)
        self._replace(node.outputs[0], made.outputs[0])
        graph.remove(node, safe=True)

    def _node(self, kind: str, inputs: list[ir.Value], weight: str, more: dict[str, str]) -> ir.Node:
        form = "int8" if self.narrow[weight].dtype == np.int8 else "int4"
        form = "fp8" if self.narrow[f"{weight}_scale"].dtype == np.float32 else form
        group = BLOCK if form == "fp8" else GROUP
        return ir.node(kind, inputs, {**more, "format": form, "group": group}, domain=DOMAIN, name=f"{kind} {weight}")

    def _values(self, graph: ir.Graph, weight: ir.Value) -> list[ir.Value]:
        """Initializers of codes and scales; the first is the whole weight's, changed."""
        values = []
        for name in (weight.name, f"{weight.name}_scale"):
            array = self.narrow[name]
            value = graph.initializers[name] if name in graph.initializers else ir.Value(name=name)
            dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
            value.dtype, value.shape = dtype, shape
            place = ("weights.safetensors", 0, array.nbytes)
            value.const_value = ir.ExternalTensor(*place, dtype, shape=shape, name=name)
            graph.initializers[name] = value
            values.append(value)
        return values

    @staticmethod
    def _replace(old: ir.Value, new: ir.Value) -> None:
        name, new.dtype, new.shape = old.name, old.dtype, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{name}.whole", name


@pytest.fixture(scope="module")
def variant(weights: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Narrow]:
    @functools.cache
    def make(name: str) -> Narrow:
        raw = {**BASE, **VARIANTS[name]}
        folder = tmp_path_factory.mktemp("variant")
        tensors, rng = weights.random_weights(dict(weights.shapes_of(raw))), np.random.default_rng(0)
        for weight, tensor in tensors.items():
            form = form_of(name, weight, tuple(tensor.shape))
            if form is not None:
                exact = raw["torch_dtype"] != "float32"
                tensors[weight] = torch.from_numpy(drawn(rng, form, tuple(tensor.shape), exact))
        dtype = getattr(torch, raw["torch_dtype"])
        save_file({n: t.to(dtype).contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(raw))
        bundle = export_bundle(ExportRequest(folder, folder / "out", page_size=4)).bundle
        whole, narrow = load_weights(bundle, mapped=True), {}
        for weight in list(whole):
            form = form_of(name, weight, whole[weight].shape)
            if form is not None:
                narrow[weight], narrow[f"{weight}_scale"] = taken_apart(form, whole.pop(weight))
        return Narrow(name, bundle, whole, narrow)

    return make


def tolerance_of(narrow: Narrow) -> float:
    if narrow.bundle.manifest.dtype == "float16":
        return TOLERANCE_FLOAT16
    return TOLERANCE if any(a.dtype == np.float16 for a in narrow.narrow.values()) else TOLERANCE_FP8


def compare(wanted: OrtSession, got: OrtSession, run: Run, tolerance: float) -> None:
    for a, b in zip(run(wanted), run(got), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())
    for layer in range(wanted.cache.layers):
        x, y = (s.pool(layer)[1:].astype(np.float32) for s in (wanted, got))  # page 0 is scratch
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance * np.nanmax(np.abs(x)))


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_is_right(
    variant: Callable[[str], Narrow], decode_twice: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    narrow = variant(name)
    exported = OrtSession(narrow.bundle, 40, 1, compiled=False)
    compare(exported, narrow.session(monkeypatch, 40, 2), decode_twice, tolerance_of(narrow))


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_is_right(
    variant: Callable[[str], Narrow], prefill_all: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    narrow = variant(name)
    exported = OrtSession(narrow.bundle, 460, 1, compiled=False)
    got = narrow.session(monkeypatch, 460, 2)
    compare(exported, got, prefill_all, tolerance_of(narrow))


@pytest.mark.parametrize("name", ["int8", "int4, biases, query compression", "fp8, blocks that are not whole"])
def test_threads_and_batch_change_no_bit(
    variant: Callable[[str], Narrow], prefill_all: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one, several = (variant(name).session(monkeypatch, 460, threads) for threads in (1, 3))
    for a, b in zip(prefill_all(one), prefill_all(several), strict=True):
        np.testing.assert_array_equal(a, b)
    table = 1 + np.arange(5 * 12, dtype=np.int32).reshape(5, 12)
    ids, lengths = np.arange(5)[:, None], np.array([3, 40, 0, 17, 9], dtype=np.int32)
    one.fill(0.25)
    together = one.decode(ids, np.ones_like(lengths), lengths, table)
    several.fill(0.25)
    for row in range(5):
        alone = several.decode(ids[row : row + 1], np.ones(1, np.int32), lengths[row : row + 1], table[row : row + 1])
        np.testing.assert_array_equal(alone[0], together[row])


def changed(data: bytes, change: Callable[[ir.Model], None]) -> FuseForCpu:
    model = ir.serde.deserialize_model(onnx.load_from_string(data))
    change(model)
    fuse = FuseForCpu()
    fuse(model)
    assert sum(n.domain == CPU_DOMAIN and n.op_type not in ANGLES for n in model.graph) == fuse.fused
    return fuse


def first(model: ir.Model, kind: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == kind)


def set_group(model: ir.Model, kind: str) -> None:
    first(model, kind).attributes["group"] = ir.AttrInt64("group", 64)


def set_format(model: ir.Model, kind: str) -> None:
    first(model, kind).attributes["format"] = ir.AttrString("format", "fp8")


def set_codes(model: ir.Model, kind: str) -> None:
    node = first(model, kind)
    value = node.inputs[3 if kind == "MoeExpertsNarrow" else 1]
    value.dtype = ir.DataType.UINT8 if value.dtype == ir.DataType.INT8 else ir.DataType.INT8


def give_more(model: ir.Model, kind: str) -> None:
    node = first(model, kind)
    node.resize_inputs(len(node.inputs) + 1)
    node.replace_input_with(len(node.inputs) - 1, node.inputs[-2])


@pytest.mark.parametrize("change", [set_group, set_format, set_codes, give_more])
@pytest.mark.parametrize("kind", ["LinearNarrow", "MoeExpertsNarrow"])
def test_what_is_not_recognised_stays_and_is_named(
    variant: Callable[[str], Narrow], change: Callable[[ir.Model, str], None], kind: str
) -> None:
    data = variant("int4 experts").graph("decode")
    assert changed(data, lambda _: None).fused == 5
    assert changed(data, lambda _: None).left == []
    fuse = changed(data, lambda model: change(model, kind))
    assert fuse.fused == 4
    assert any(name.startswith(kind) for name in fuse.left)


def test_a_sum_with_something_else_is_no_bias(variant: Callable[[str], Narrow]) -> None:
    def add_input(model: ir.Model) -> None:
        node = next(n for n in model.graph if n.op_type == "Add" and n.inputs[0].producer().op_type == "LinearNarrow")
        node.replace_input_with(1, node.inputs[0].producer().inputs[0])

    fuse = changed(variant("int4, biases, query compression").graph("decode"), add_input)
    assert fuse.fused == 4
    assert any(name.startswith("LinearNarrow") for name in fuse.left)
