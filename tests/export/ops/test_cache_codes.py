"""The MLA ops over a narrow cache: torch's reference, the ONNX body in ONNX Runtime, and codes made by hand agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.export.ops.cache.codes import narrowed, widened
from deepseek_trt.export.ops.cache.mla_decode_narrow import MLA_DECODE_NARROW
from deepseek_trt.export.ops.cache.mla_prefill_narrow import MLA_PREFILL_NARROW
from deepseek_trt.export.ops.functions import function_from_spec
from deepseek_trt.export.ops.mla_decode import mla_decode
from deepseek_trt.export.ops.spec import OPSET, OpSpec

TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
# Of numbers around 1: the sums of some hundred products, each rounded to the dtype.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2}
H, N, R, V, PAGE = 3, 16, 8, 24, 4


def case(op: str, rank: int, group: int, format: str, dtype: str, steps: int = 3) -> dict[str, torch.Tensor]:
    """Inputs of the op: rows of other lengths, NaN where nothing is cached, latents of many sizes."""
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    past, table = torch.tensor([6, 0, 3], dtype=torch.int32), torch.tensor([[1, 2, 3], [4, 8, 8], [6, 5, 8]])
    sizes = torch.logspace(-2, 1, 9 * PAGE).view(9, PAGE, 1)
    codes, rest = narrowed((drawn(9, PAGE, rank + R) * sizes).to(kind), rank, format, group)
    rest[8], codes[8] = torch.nan, 127
    given = {
        "query": drawn(3, steps, H, N + R if op == "MlaPrefillNarrow" else rank + R).to(kind),
        "latent": (drawn(3, steps, rank + R) * torch.logspace(-1, 1, steps)[:, None]).to(kind),
        "past_latent": codes,
        "past_rope": rest,
        "page_table": table.int(),
        "past_lengths": past,
        "sequence_lengths": torch.tensor([steps, 1, steps - 1], dtype=torch.int32),
    }
    if op == "MlaPrefillNarrow":
        given |= {"w_uk": (drawn(H, N, rank) * 0.1).to(kind), "w_uv": (drawn(H, V, rank) * 0.1).to(kind)}
    return given


def run_body(spec: OpSpec, attributes: dict[str, Any], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    values = [
        ir.Value(name=n, type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape(a.shape))
        for n, a in feeds.items()
    ]
    node = ir.node(spec.name, values, attributes, domain=DOMAIN, num_outputs=len(spec.outputs))
    for made, output in zip(node.outputs, spec.outputs, strict=True):
        made.name = output.name
        made.type = ir.TensorType(ir.DataType.INT8 if output.dtype == "codes" else values[0].dtype)
        made.shape = ir.Shape([f"{output.name}_{i}" for i in range(len(output.dims))])
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="one")
    proto = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function_from_spec(spec, attributes)]))
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("rank", "group"), [(32, 32), (256, 128)])
@pytest.mark.parametrize("spec", [MLA_PREFILL_NARROW, MLA_DECODE_NARROW], ids=lambda spec: spec.name)
def test_the_body_is_the_reference(spec: OpSpec, rank: int, group: int, format: str, dtype: str) -> None:
    given = case(spec.name, rank, group, format, dtype)
    attributes: dict[str, Any] = {"scale": 0.2, "kv_lora_rank": rank, "format": format, "group": group}
    attributes = {a.name: attributes[a.name] for a in spec.attributes}
    attended, codes, rest = spec.reference(*given.values(), *attributes.values())
    ours = run_body(spec, attributes, {name: tensor.numpy() for name, tensor in given.items()})
    assert ours[1].dtype == np.int8
    np.testing.assert_array_equal(ours[1], codes.numpy())
    np.testing.assert_array_equal(ours[2], rest.numpy())  # NaN where they were
    live = np.arange(3) < given["sequence_lengths"].numpy()[:, None]
    expected, found = attended.float().numpy()[live], ours[0].astype(np.float32)[live]
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_attention_is_that_over_the_numbers_that_codes_stand_for(format: str) -> None:
    """What has gone through the codes, given to the op over a whole cache, is attended to alike."""
    given = case("MlaDecodeNarrow", 256, 128, format, "float32")
    attended, codes, rest = MLA_DECODE_NARROW.reference(*given.values(), 0.2, 256, format, 128)
    pool = widened(given["past_latent"], given["past_rope"], format, 128)
    rounded = widened(*narrowed(given["latent"], 256, format, 128), format, 128)
    places = given["page_table"], given["past_lengths"], given["sequence_lengths"]
    whole, present = mla_decode(given["query"], rounded, pool, *places, 0.2, 256)
    live = torch.arange(3) < given["sequence_lengths"][:, None]
    torch.testing.assert_close(attended[live], whole[live], rtol=0, atol=0)
    torch.testing.assert_close(widened(codes, rest, format, 128), present, rtol=0, atol=0, equal_nan=True)


def test_codes_and_scales_by_hand() -> None:
    numbers = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, 63.4, 0.0, 9.0]])  # 1 rope number behind
    codes, rest = narrowed(numbers, 8, "int8", 8)
    assert codes.tolist() == [[127, -127, 0, 2, 2, 0, 63, 0]]  # ties to even
    assert rest.tolist() == [[9.0, 1.0]]
    codes, rest = narrowed(torch.tensor([[448.0, 17.0, 19.0, 2.0**-9, -448.0, 2.0**-10, 0.0, 1.0]]), 8, "fp8", 8)
    bits = codes.view(torch.uint8).tolist()
    assert bits == [[0x7E, 0x58, 0x5A, 0x01, 0xFE, 0x00, 0x00, 0x38]]  # 16, 20: ties to even
    assert rest.tolist() == [[1.0]]


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_what_has_no_scale(format: str) -> None:
    """Zeros are zeros; numbers too small for a float16 scale are, too; what is not finite makes its group NaN alone."""
    zeros = torch.zeros(1, 256 + R, dtype=torch.float16)
    codes, rest = narrowed(zeros, 256, format, 128)
    assert not codes.any()
    assert not rest.any()
    small = zeros + 1e-7
    assert not widened(*narrowed(small, 256, format, 128), format, 128)[:, :256].any()
    for strange in (torch.nan, torch.inf, -torch.inf):
        broken = torch.ones(1, 256 + R)
        broken[0, 3] = strange
        read = widened(*narrowed(broken, 256, format, 128), format, 128)
        assert read[0, :128].isnan().all()
        assert torch.equal(read[0, 128:], torch.ones(128 + R))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("format", "half"), [("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_numbers_are_off_by_half_a_step(format: str, half: float, dtype: str) -> None:
    """int8: of the largest of the group; fp8: of themselves, or of 2^-10 scales. A scale that is rounded down by the
    dtype leaves the largest code within reach: 127 (1 + 2^-9) rounds to 127.
    """
    x = torch.randn(500, 256 + R, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    codes, rest = narrowed(x, 256, format, 128)
    numbers = codes.view(torch.float8_e4m3fn).double() if format == "fp8" else codes.double()
    scales = rest[:, R:].double().repeat_interleave(128, 1)
    own = x[:, :256].double()
    largest = own.view(500, 2, 128).abs().amax(-1).repeat_interleave(128, 1)
    limit = half * largest if format == "int8" else half * own.abs() + 2.0**-10 * scales
    assert ((numbers * scales - own).abs() <= limit * (1 + 2.0**-8)).all()
    assert torch.equal(rest[:, :R], x[:, 256:])
