"""The ops over narrow weights: torch's reference, the ONNX body in ONNX Runtime, and numbers unpacked by hand agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.export.ops.functions import function_from_spec
from deepseek_trt.export.ops.linear_narrow import LINEAR_NARROW
from deepseek_trt.export.ops.moe_experts_narrow import MOE_EXPERTS_NARROW
from deepseek_trt.export.ops.spec import OPSET, OpSpec

DTYPES = ("float32", "float16")
TOLERANCE = {"float32": 2e-6, "float16": 2e-3}


def narrow(rng: np.random.Generator, format: str, *shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales, and the numbers, which are made the other way round: numbers first, then packed by hand."""
    if format == "fp8":
        return blocks(rng, *shape)
    low, high = (-127, 127) if format == "int8" else (-8, 7)
    numbers = rng.integers(low, high + 1, shape)
    numbers.flat[:2] = low, high
    scale = (0.02 * (1 + rng.random((*shape[:-1], shape[-1] // 32))) / high).astype(np.float16)
    scale[..., 0] *= -1  # a scale may be negative
    codes = numbers.astype(np.int8)
    if format == "int4":
        biased = (numbers + 8).astype(np.uint8)
        codes = biased[..., 0::2] + 16 * biased[..., 1::2]
    return codes, scale, numbers.astype(np.float32) * np.repeat(scale.astype(np.float32), 32, axis=-1)


def blocks(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every code of E4M3 but NaN, as torch widens it, and scales of blocks, of which some are 0 or subnormal."""
    codes = rng.choice(np.delete(np.arange(256), [0x7F, 0xFF]), shape).astype(np.uint8)
    *stack, rows, columns = shape
    scale = (rng.random((*stack, -(-rows // 128), -(-columns // 128))) / 4480).astype(np.float32)
    scale.flat[-1] = 0.0 if scale.size > 1 else scale.flat[-1]
    numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    spread = np.repeat(np.repeat(scale, 128, axis=-2)[..., :rows, :], 128, axis=-1)[..., :columns]
    return codes, scale, numbers * spread


def group_of(format: str) -> int:
    return 128 if format == "fp8" else 32


def run_body(spec: OpSpec, attributes: dict[str, Any], feeds: dict[str, np.ndarray], dtype: str) -> np.ndarray:
    values = [
        ir.Value(name=n, type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape(a.shape))
        for n, a in feeds.items()
    ]
    node = ir.node(spec.name, values, attributes, domain=DOMAIN)
    node.outputs[0].name = "output"
    node.outputs[0].shape = ir.Shape(["tokens", "width"])
    node.outputs[0].type = ir.TensorType(ir.DataType[dtype.upper().replace("FLOAT32", "FLOAT")])
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="one")
    model = ir.Model(graph, ir_version=10, functions=[function_from_spec(spec, attributes)])
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def close(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> None:
    assert ours.dtype == theirs.dtype == np.dtype(dtype)
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    assert np.abs(ours - theirs).max() <= TOLERANCE[dtype] * np.abs(theirs).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("format", "tokens", "rows", "columns"),
    [(format, *sizes) for format in ("int8", "int4") for sizes in ((1, 1, 32), (5, 24, 96), (3, 7, 64))]
    + [("fp8", *sizes) for sizes in ((1, 1, 1), (5, 24, 96), (3, 300, 130), (2, 128, 256))],
)
def test_linear(format: str, dtype: str, tokens: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    codes, scale, numbers = narrow(rng, format, rows, columns)
    x = rng.standard_normal((tokens, columns)).astype(dtype)
    attributes = {"format": format, "group": group_of(format)}
    tensors = [torch.from_numpy(a) for a in (x, codes, scale)]
    reference = LINEAR_NARROW.reference(*tensors, *attributes.values()).numpy()
    assert reference.shape == LINEAR_NARROW.fake(*tensors, *attributes.values()).shape
    by_hand = (x.astype(np.float32) @ numbers.T).astype(dtype)
    close(reference, by_hand, dtype)
    close(run_body(LINEAR_NARROW, attributes, {"x": x, "weight": codes, "weight_scale": scale}, dtype), by_hand, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_experts(format: str, dtype: str, activation: str) -> None:
    rng = np.random.default_rng(3)
    experts, hidden, inner, tokens, top = 6, 64, 32 if format != "fp8" else 140, 7, 2
    x = rng.standard_normal((tokens, hidden)).astype(dtype)
    weights = rng.random((tokens, top)).astype(np.float32)
    ids = np.array([rng.choice(experts - 1, top, replace=False) for _ in range(tokens)], dtype=np.int32)
    stacks = [narrow(rng, format, experts, *shape) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))]
    arrays = [x, weights, ids, *(part for codes, scale, _ in stacks for part in (codes, scale))]
    attributes = {"activation": activation, "format": format, "group": group_of(format)}
    tensors = [torch.from_numpy(a) for a in arrays]
    reference = MOE_EXPERTS_NARROW.reference(*tensors, *attributes.values())
    gate, up, down = (torch.from_numpy(numbers) for _, _, numbers in stacks)
    act = torch.nn.functional.silu if activation == "silu" else torch.relu
    by_hand = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for rank in range(top):
            e, row = int(ids[token, rank]), torch.from_numpy(x[token].astype(np.float32))
            by_hand[token] += float(weights[token, rank]) * (down[e] @ (act(gate[e] @ row) * (up[e] @ row)))
    close(reference.numpy(), by_hand.numpy().astype(dtype), dtype)
    feeds = dict(zip([i.name for i in MOE_EXPERTS_NARROW.inputs], arrays, strict=True))
    close(run_body(MOE_EXPERTS_NARROW, attributes, feeds, dtype), by_hand.numpy().astype(dtype), dtype)


def test_bfloat16_reference_computes_in_float32() -> None:
    codes, scale, numbers = narrow(np.random.default_rng(1), "int4", 8, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = LINEAR_NARROW.reference(x, torch.from_numpy(codes), torch.from_numpy(scale), "int4", 32)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (x.float() @ torch.from_numpy(numbers).T).bfloat16())


def test_every_code_of_fp8_is_the_number_that_torch_says() -> None:
    codes = np.arange(256, dtype=np.uint8)[None]
    feeds = {"x": np.eye(256, dtype=np.float32), "weight": codes, "weight_scale": np.ones((1, 2), np.float32)}
    usual = np.delete(np.arange(256), [0x7F, 0xFF])
    body = run_body(LINEAR_NARROW, {"format": "fp8", "group": 128}, feeds, "float32")[:, 0]
    assert np.isnan(body).all()  # a row with NaN
    feeds["weight"] = np.where(np.isin(codes, usual), codes, 0).astype(np.uint8)
    body = run_body(LINEAR_NARROW, {"format": "fp8", "group": 128}, feeds, "float32")[:, 0]
    expected = torch.from_numpy(feeds["weight"]).view(torch.float8_e4m3fn).float().numpy()[0]
    assert np.array_equal(body, expected)
