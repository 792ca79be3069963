"""fp8 codes and scales of whole numbers: within half a step, the same on any threads and chunks, at any size."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE
from deepseek_trt.export.bundle.narrow import CODES, Narrow
from deepseek_trt.export.bundle.recipes import Piece, Recipe, narrow_pair
from deepseek_trt.export.bundle.widened import widened
from deepseek_trt.export.reading.header import read_header
from deepseek_trt.export.writing.quantize_fp8 import quantize_blocks, rows_of_blocks
from deepseek_trt.export.writing.weight_file import write_weights

SHAPES = [(1, 1), (128, 128), (130, 257), (300, 64), (5, 2300)]


def made(numbers: np.ndarray, threads: int = 1, chunk: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flat = numbers.reshape(-1)
    chunks = (flat[at : at + chunk] for at in range(0, flat.size, chunk))
    with ThreadPoolExecutor(threads) as pool:
        parts = [quantize_blocks(rows, pool) for rows in rows_of_blocks(chunks, *numbers.shape[-2:])]
    narrow = Narrow("fp8", 128, "absmax", CODES)
    codes = np.concatenate([part.codes.reshape(-1) for part in parts]).reshape(numbers.shape)
    *stack, rows, columns = numbers.shape
    scales = np.concatenate([part.scales for part in parts]).reshape(*stack, -(-rows // 128), -(-columns // 128))
    return codes, scales, widened(codes, scales, narrow)


def block_largest(numbers: np.ndarray) -> np.ndarray:
    """Of each number the largest of its block, by a loop."""
    out = np.empty_like(numbers)
    for row in range(0, numbers.shape[0], 128):
        for column in range(0, numbers.shape[1], 128):
            block = slice(row, row + 128), slice(column, column + 128)
            out[block] = np.abs(numbers[block]).max()
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
def test_every_number_is_within_half_a_step(shape: tuple[int, int], factor: float) -> None:
    rng = np.random.default_rng(shape[1])
    numbers = (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape)) * factor).astype(np.float32)
    codes, scales, near = made(numbers)
    largest = block_largest(numbers)
    half = np.maximum(np.abs(numbers) / 16, largest / 448 / 1024)
    assert (np.abs(near - numbers) <= half * (1 + 1e-5)).all()
    assert not ((codes & 0x7F) == 0x7F).any()
    np.testing.assert_array_equal(np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]], largest / 448)


def test_codes_are_the_nearest_and_ties_go_to_even() -> None:
    """448 makes the scale 1: what lies between two codes goes to the nearer one, half-way to the even one."""
    numbers = np.zeros((1, 128), dtype=np.float32)
    numbers[0, :9] = 448, 1.0625, 1.1875, 1.07, -1.0625, 2.0**-10, 3 * 2.0**-10, -(2.0**-9), 431.0
    codes, scales, near = made(numbers)
    assert scales.tolist() == [[1.0]]
    assert near[0, :9].tolist() == [448, 1.0, 1.25, 1.125, -1.0, 0.0, 2.0**-8, -(2.0**-9), 416.0]
    assert codes[0, :2].tolist() == [0x7E, 0x38]


def test_the_same_on_any_threads_and_chunks() -> None:
    numbers = np.random.default_rng(1).standard_normal((3, 200, 2100)).astype(np.float32)
    one = made(numbers)
    for other in (made(numbers, threads=4), made(numbers, chunk=77), made(numbers, chunk=10**7)):
        for a, b in zip(one, other, strict=True):
            assert np.array_equal(a, b)
    for index in range(3):
        for a, b in zip(one, made(numbers[index]), strict=True):
            assert np.array_equal(a[index], b)


def test_blocks_of_zeros_and_the_sign_of_zero() -> None:
    numbers = np.zeros((130, 130), dtype=np.float32)
    numbers[129, 129], numbers[129, 128] = -3.0, -0.0
    codes, scales, near = made(numbers)
    assert scales[0].tolist() == [0.0, 0.0]
    assert codes[129, 128:].tolist() == [0x80, 0xFE]
    assert not codes[:129].any()
    assert near[129, 129] == pytest.approx(-3.0)


@pytest.mark.parametrize("largest", [1e-44, 1.4e-45, 3e-39, 3.4028234e38])
def test_where_float32_ends(largest: float) -> None:
    numbers = np.linspace(-1, 1, 256, dtype=np.float64).reshape(2, 128) * largest
    numbers = numbers.astype(np.float32)
    *_, near = made(numbers)
    assert np.isfinite(near).all()
    assert (np.abs(near - numbers) <= np.abs(numbers) / 16 + largest / 448 / 1024 + 1.5e-45).all()


def written(tmp_path, tensor: torch.Tensor, method: str, scale: torch.Tensor | None = None):
    source = tmp_path / "source.safetensors"
    save_file({"w": tensor} | ({} if scale is None else {"s": scale}), source)
    stored = {t.name: t for t in read_header(source)}
    piece = Piece("w", 0, len(tensor), len(tensor), 1, None if scale is None else "s")
    pair = narrow_pair(Recipe("w", tuple(tensor.shape), (piece,)), "fp8", 128, method)
    path = tmp_path / WEIGHTS_FILE
    return write_weights(pair, stored, "bfloat16", path, lambda done: None), path


def test_scales_then_codes_in_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("deepseek_trt.export.bundle.assemble.CHUNK", 256)
    tensor = torch.randn(150, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    records, path = written(tmp_path, tensor, "absmax")
    codes, scales, near = made(tensor.float().numpy())
    found = load_file(path)
    assert (found["w"].dtype, found["w_scale"].dtype) == (torch.float8_e4m3fn, torch.float32)
    assert np.array_equal(found["w"].view(torch.uint8).numpy(), codes)
    assert np.array_equal(found["w_scale"].numpy(), scales)
    assert [record.name for record in records] == ["w_scale", "w"]
    for one in records:
        assert hashlib.sha256(path.read_bytes()[one.offset : one.offset + one.nbytes]).hexdigest() == one.sha256
    off = np.linalg.norm(near - tensor.float().numpy()) / np.linalg.norm(tensor.float().numpy())
    assert records[1].error == pytest.approx(off, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_published_codes_and_scales_are_kept(tmp_path, kind: torch.dtype) -> None:
    codes = torch.randint(0, 256, (300, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes[(codes & 0x7F) == 0x7F] = 0x80
    scale = torch.exp2(-torch.arange(6.0).reshape(3, 2)).to(kind)
    records, path = written(tmp_path, codes.view(torch.float8_e4m3fn), "published", scale)
    found = load_file(path)
    assert torch.equal(found["w"].view(torch.uint8), codes)
    assert torch.equal(found["w_scale"], scale.float())
    assert records[1].odd == ()


@pytest.mark.parametrize(("code", "step"), [(0x7F, 1.0), (0xFF, 1.0), (0x38, float("nan")), (0x7E, 1e37)])
def test_what_is_not_finite_is_counted(tmp_path, code: int, step: float) -> None:
    codes = torch.full((130, 3), 0x38, dtype=torch.uint8)
    codes[129, 2] = code
    scale = torch.tensor([[1.0], [step]])
    records, _ = written(tmp_path, codes.view(torch.float8_e4m3fn), "published", scale)
    assert [(odd.source, odd.nonfinite) for odd in records[1].odd] == [("w", 6 if step != step else 1)]
