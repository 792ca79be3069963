"""Codes and scales: as near to the numbers as formats allow, the same on any threads, and refused beyond float16."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE
from deepseek_trt.export.bundle.narrow import CODES, FORMATS, Narrow
from deepseek_trt.export.bundle.recipes import Piece, Recipe, narrow_pair
from deepseek_trt.export.bundle.widened import widened
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.reading.header import read_header
from deepseek_trt.export.writing.quantize import WORST, quantize
from deepseek_trt.export.writing.weight_file import write_weights

KINDS = [("int8", "absmax"), ("int8", "least_squares"), ("int4", "absmax"), ("int4", "least_squares")]


def made(numbers: np.ndarray, format: str, method: str, threads: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    narrow = Narrow(format, 32, method, CODES)
    with ThreadPoolExecutor(threads) as pool:
        found = quantize(numbers.reshape(-1), narrow, pool)
    codes = found.codes.view(FORMATS[format].dtype).reshape(narrow.shape(numbers.shape))
    scales = found.scales.reshape(*numbers.shape[:-1], -1)
    return codes, scales, widened(codes, scales, narrow)


@pytest.mark.parametrize(("format", "method"), KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_number_is_near(format: str, method: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal((64, 96)) * np.exp(rng.standard_normal((64, 96)))).astype(dtype) * 0.05
    codes, scales, near = made(numbers, format, method)
    assert scales.dtype == np.float16
    assert codes.dtype == np.dtype(FORMATS[format].dtype)
    error = np.linalg.norm((near - numbers).reshape(-1, 32), axis=1)
    assert (error <= 1.05 * WORST[format] * np.linalg.norm(numbers.astype(np.float32).reshape(-1, 32), axis=1)).all()
    if format == "int8":
        assert codes.min() >= -127


@pytest.mark.parametrize("seed", range(3))
def test_least_squares_is_no_worse_than_any_scale_of_a_fine_grid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal((200, 32)).astype(np.float32)
    *_, near = made(numbers, "int4", "least_squares")
    *_, plain = made(numbers, "int4", "absmax")
    best = np.full(len(numbers), np.inf)
    largest = np.abs(numbers).max(1)
    for divisor in np.linspace(5, 11, 300):
        for sign in (-1, 1):
            scale = (sign * largest / divisor).astype(np.float16).astype(np.float32)[:, None]
            grid = np.clip(np.rint(numbers / scale), -8, 7) * scale
            best = np.minimum(best, ((grid - numbers) ** 2).sum(1))
    errors = ((near - numbers) ** 2).sum(1)
    assert errors.sum() <= 1.02 * best.sum()
    assert errors.sum() <= 0.75 * ((plain - numbers) ** 2).sum()


@pytest.mark.parametrize(("format", "method"), KINDS)
def test_the_same_on_any_threads_and_chunks(format: str, method: str) -> None:
    numbers = np.random.default_rng(1).standard_normal((300, 64)).astype(np.float32)
    one, many = made(numbers, format, method), made(numbers, format, method, threads=4)
    parts = [made(numbers[rows], format, method) for rows in (slice(0, 7), slice(7, 300))]
    for whole, other, *cut in zip(one, many, *parts, strict=True):
        assert np.array_equal(whole, other)
        assert np.array_equal(whole, np.concatenate(cut))


@pytest.mark.parametrize(("format", "method"), KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-4])
def test_groups_of_one_number_are_exact_but_for_the_scale(format: str, method: str, value: float) -> None:
    numbers = np.full((2, 32), value, dtype=np.float32)
    *_, near = made(numbers, format, method)
    assert np.abs(near - numbers).max() <= 2.0**-10 * abs(value) + 5e-7


def test_codes_of_a_byte_stand_low_first() -> None:
    numbers = np.zeros((1, 32), dtype=np.float32)
    numbers[0, :4] = 7, -7, 1, 2
    codes, scales, near = made(numbers, "int4", "absmax")
    assert scales.tolist() == [[1.0]]
    assert codes[0, :3].tolist() == [15 + 16 * 1, 9 + 16 * 10, 8 + 16 * 8]
    assert np.array_equal(near, numbers)


# In the weights file


def write(tmp_path, tensor: torch.Tensor, format: str, method: str = "absmax", name: str = WEIGHTS_FILE):
    source = tmp_path / "source.safetensors"
    save_file({"w": tensor}, source)
    stored = {t.name: t for t in read_header(source)}
    whole = Recipe("w", tuple(tensor.shape), (Piece("w", 0, len(tensor), len(tensor), 1),))
    pair = narrow_pair(whole, format, 32, method)
    return write_weights(pair, stored, "bfloat16", tmp_path / name, lambda done: None), tmp_path / name


@pytest.mark.parametrize(("format", "method"), KINDS)
def test_scales_then_codes(tmp_path, format: str, method: str, monkeypatch) -> None:
    monkeypatch.setattr("deepseek_trt.export.bundle.assemble.CHUNK", 256)
    tensor = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    written, path = write(tmp_path, tensor, format, method)
    codes, scales, near = made(tensor.float().numpy(), format, method)
    found = load_file(path)
    assert list(found) == ["w_scale", "w"] or sorted(found) == ["w", "w_scale"]
    assert np.array_equal(found["w"].numpy(), codes)
    assert np.array_equal(found["w_scale"].numpy(), scales)
    assert [w.name for w in written] == ["w_scale", "w"]
    assert written[0].offset < written[1].offset
    for one in written:
        data = path.read_bytes()[one.offset : one.offset + one.nbytes]
        assert hashlib.sha256(data).hexdigest() == one.sha256
    expected = np.linalg.norm(near - tensor.float().numpy()) / np.linalg.norm(tensor.float().numpy())
    assert written[1].error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(
    ("factor", "words"), [(1e9, "holds numbers up to .* whose scales are beyond float16"), (1e-12, "so small that")]
)
def test_scales_that_float16_cannot_hold_are_refused_by_name(tmp_path, format: str, factor: float, words: str) -> None:
    tensor = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * factor
    with pytest.raises(CheckpointError, match=f"^w holds numbers {words.removeprefix('holds numbers ')}"):
        write(tmp_path, tensor, format)
