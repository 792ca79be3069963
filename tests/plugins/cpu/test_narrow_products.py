"""Products of narrow weights by themselves: against float64, and what they promise beyond.

The operator is Head with norm weights of one: y = W (x / rms(x)).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from deepseek_trt.plugins.cpu.library import cpu_library
from deepseek_trt.plugins.cpu.operators import CPU_DOMAIN, HEAD

GROUP, BLOCK = 32, 128
EPS = 1e-6
TYPES = {"int8": TensorProto.INT8, "int4": TensorProto.UINT8}
Given = Mapping[str, npt.NDArray[Any]]


def codes_of(rng: np.random.Generator, form: str, rows: int, columns: int) -> tuple[npt.NDArray[Any], ...]:
    """Codes as they are stored, their scales, and the numbers that they stand for."""
    low, high = (-127, 128) if form == "int8" else (-8, 8)
    codes = rng.integers(low, high, (rows, columns))
    scales = (rng.uniform(0.001, 0.02, (rows, columns // GROUP))).astype(np.float16)
    numbers = codes * repeated(scales)
    if form == "int8":
        return codes.astype(np.int8), scales, numbers
    stored = (codes + 8).astype(np.uint8)
    return stored[:, ::2] | stored[:, 1::2] << 4, scales, numbers


def repeated(scales: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.repeat(scales.astype(np.float64), GROUP, axis=1)


@functools.cache
def session_of(head: int, scale: int | None, threads: int = 1) -> onnxruntime.InferenceSession:
    """Head with inputs of these types."""
    types = {"x": TensorProto.FLOAT, "norm_weight": TensorProto.FLOAT, "head": head}
    types |= {} if scale is None else {"head_scale": scale}
    inputs = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in types.items()]
    node = helper.make_node(HEAD.name, list(types), ["y"], domain=CPU_DOMAIN, padded=0, eps=EPS)
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CPU_DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], "one", inputs, out), opset_imports=opsets, ir_version=10)
    library = cpu_library().path
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    ctypes.CDLL(str(library)).deepseek_trt_cpu_threads(threads)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(given: Given, threads: int = 1) -> npt.NDArray[np.float32]:
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in given.items()}
    session = session_of(types["head"], types.get("head_scale"), threads)
    y: npt.NDArray[np.float32] = session.run(None, dict(given))[0]
    return y


def head_of(x: npt.NDArray[np.float32], codes: npt.NDArray[Any], scales: npt.NDArray[Any]) -> Given:
    return {"x": x, "norm_weight": np.ones(x.shape[1], np.float32), "head": codes, "head_scale": scales}


def normed(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPS)


def bound(
    x: npt.NDArray[np.float64], numbers: npt.NDArray[np.float64], scales: npt.NDArray[Any], form: str
) -> npt.NDArray[np.float64]:
    """How far products may be off, [tokens, rows].

    A token's number is off by at most half of 1/32767 of its group's largest, and by as much again by the float32 norm
    and division where they fall beside a half: 0.51. The rest is float32: numbers of K/32 groups are added in a lane,
    16 lanes and a few products after that, each rounding by at most 2^-24 of what is summed in sizes. int4's codes
    are summed as they are stored, 8 greater.
    """
    tokens, groups = len(x), x.shape[1] // GROUP
    most = np.abs(x).reshape(tokens, groups, GROUP).max(axis=2)
    sizes = np.abs(numbers).reshape(len(numbers), groups, GROUP).sum(axis=2)
    summed = np.abs(numbers) + (8 * repeated(scales) if form == "int4" else 0)
    rounded: npt.NDArray[np.float64] = 0.51 / 32767 * most @ sizes.T
    return rounded + (groups + 24) * 2.0**-24 * np.abs(x) @ summed.T


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(TYPES)),
    rows=st.integers(1, 70),
    groups=st.sampled_from([1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 44]),
    tokens=st.integers(1, 21),
    seed=st.integers(0, 2**31),
)
def test_products_are_right_at_every_shape(form: str, rows: int, groups: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Sizes of whole groups differ, as outliers make them do.
    sizes = np.repeat(10.0 ** rng.uniform(-4, 2, (tokens, groups)), GROUP, axis=1)
    x = (rng.standard_normal((tokens, groups * GROUP)) * sizes).astype(np.float32)
    codes, scales, numbers = codes_of(rng, form, rows, groups * GROUP)
    got = run(head_of(x, codes, scales))
    wanted = normed(x) @ numbers.T
    assert (np.abs(got - wanted) <= bound(normed(x), numbers, scales, form)).all()


@pytest.mark.parametrize("form", TYPES)
def test_extremes_are_exact(form: str) -> None:
    """The largest codes and tokens of one sign: sums of four products are just what float32 holds."""
    columns = 5 * GROUP
    least = np.full((3, columns), -128, np.int8) if form == "int8" else np.zeros((3, columns // 2), np.uint8)
    scales = np.ones((3, columns // GROUP), np.float16)
    got = run(head_of(np.ones((2, columns), np.float32), least, scales))
    wanted = columns * (-128.0 if form == "int8" else -8.0)
    np.testing.assert_allclose(got, wanted, rtol=2e-6)  # the float32 of 1 / rms and 1 / 32767, and some sums


@pytest.mark.parametrize("form", TYPES)
@pytest.mark.parametrize("columns", [32, 96, 544, 1408])
def test_a_row_depends_on_neither_batch_nor_threads(form: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((19, columns)).astype(np.float32)
    codes, scales, _ = codes_of(rng, form, 131, columns)
    together = run(head_of(x, codes, scales), threads=2)
    for first, count in ((0, 1), (3, 2), (5, 4), (1, 7), (2, 17)):
        np.testing.assert_array_equal(run(head_of(x[first : first + count], codes, scales)), together[first:][:count])
    some = run(head_of(x, codes[70:], scales[70:]))
    np.testing.assert_array_equal(some, together[:, 70:])


@pytest.mark.parametrize("form", TYPES)
def test_what_is_not_finite_is_not_hidden(form: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 96)).astype(np.float32)
    x[1, 40], x[2, 95] = np.nan, np.inf
    codes, scales, _ = codes_of(rng, form, 5, 96)
    assert np.isfinite(run(head_of(x, codes, scales))).all(axis=1).tolist() == [True, False, False, True]
    scales[3, 2] = np.nan
    assert np.isfinite(run(head_of(x[:1], codes, scales)))[0].tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("form", TYPES)
def test_nothing_and_next_to_nothing(form: str) -> None:
    """Zeros stay zeros; beside a group of ordinary numbers, the smallest of float32 are nothing."""
    rng = np.random.default_rng(2)
    x = np.zeros((3, 96), np.float32)
    x[1, 32:64] = rng.standard_normal(32)
    x[2] = x[1]
    x[2, :32] = 1e-42
    codes, scales, _ = codes_of(rng, form, 5, 96)
    got = run(head_of(x, codes, scales))
    assert (got[0] == 0).all()
    assert (got[1] == got[2]).all()
    assert (got[1] != 0).any()


def shaped(name: str, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Callable[[Given], Given]:
    return lambda given: {**given, name: change(given[name])}


@pytest.mark.parametrize("form", TYPES)
@pytest.mark.parametrize(
    ("mend", "words"),
    [
        (shaped("head_scale", lambda s: s[:, :-1]), "head_scale does not fit"),
        (shaped("head_scale", lambda s: s[:-1]), "head_scale does not fit"),
        (shaped("head_scale", lambda s: s.T), "head_scale does not fit"),
        (shaped("head_scale", lambda s: s.astype(np.int32)), "head_scale is of another type, ONNX's number 6"),
        (shaped("head", lambda codes: codes[:, :-1]), "head does not fit"),
        (shaped("head", lambda codes: codes[:, : codes.shape[1] // 2]), "head does not fit"),
        (lambda given: {k: v for k, v in given.items() if k != "head_scale"}, "input head_scale is missing"),
        (lambda given: {**given, "x": given["x"][:, :48], "norm_weight": np.ones(48, np.float32)}, "head does not fit"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(form: str, mend: Callable[[Given], Given], words: str) -> None:
    rng = np.random.default_rng(3)
    codes, scales, _ = codes_of(rng, form, 7, 96)
    with pytest.raises(Exception, match=words):
        run(mend(head_of(np.ones((2, 96), np.float32), codes, scales)))


def test_columns_must_be_whole_groups() -> None:
    codes, scales = np.ones((7, 48), np.int8), np.ones((7, 1), np.float16)
    with pytest.raises(Exception, match="head does not fit"):
        run(head_of(np.ones((2, 48), np.float32), codes, scales))


def test_whole_weights_with_a_scale_are_refused() -> None:
    with pytest.raises(Exception, match="it takes 3 inputs; the node has 4 inputs"):
        run(head_of(np.ones((2, 96), np.float32), np.ones((7, 96), np.float32), np.ones((7, 3), np.float16)))


def test_scales_of_another_format_are_refused() -> None:
    """What codes are, their scales say where both are bytes: with other scales, codes of 4 bits are half as many."""
    for form, words in (("int8", "head_scale is of another type, ONNX's number 1"), ("int4", "head does not fit")):
        codes, scales, _ = codes_of(np.random.default_rng(3), form, 7, 96)
        with pytest.raises(Exception, match=words):
            run(head_of(np.ones((2, 96), np.float32), codes, scales.astype(np.float32)))


# fp8


def blocks_of(rng: np.random.Generator, rows: int, columns: int) -> tuple[npt.NDArray[Any], ...]:
    """Codes of all bits but NaN's, scales of blocks, and the numbers that they stand for."""
    codes = rng.choice(np.delete(np.arange(256), [0x7F, 0xFF]), (rows, columns)).astype(np.uint8)
    scales = rng.uniform(1e-5, 1e-3, (-(-rows // BLOCK), -(-columns // BLOCK))).astype(np.float32)
    exponent, mantissa = codes >> 3 & 15, (codes & 7).astype(np.float64)
    sizes = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent.astype(np.float64) - 10))
    spread = np.repeat(np.repeat(scales.astype(np.float64), BLOCK, 0)[:rows], BLOCK, 1)[:, :columns]
    return codes, scales, np.where(codes & 128, -sizes, sizes) * spread


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 5, 70, 127, 128, 129, 260]),
    columns=st.sampled_from([1, 15, 16, 17, 100, 127, 128, 129, 144, 300, 513]),
    tokens=st.integers(1, 21),
    seed=st.integers(0, 2**31),
)
def test_fp8_products_are_right_at_every_shape(rows: int, columns: int, tokens: int, seed: int) -> None:
    """Off by what float32 rounds: of each number once, of the norm, and of the sums of 32 lanes."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, columns)) * 10.0 ** rng.uniform(-4, 2, (tokens, columns))).astype(np.float32)
    codes, scales, numbers = blocks_of(rng, rows, columns)
    got, wide = run(head_of(x, codes, scales)), normed(x)
    assert (np.abs(got - wide @ numbers.T) <= (columns / 32 + 16) * 2.0**-24 * np.abs(wide) @ np.abs(numbers).T).all()


@pytest.mark.parametrize("columns", [33, 128, 1408])
def test_a_row_of_fp8_depends_on_neither_batch_nor_threads(columns: int) -> None:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((19, columns)).astype(np.float32)
    codes, scales, _ = blocks_of(rng, 259, columns)
    together = run(head_of(x, codes, scales), threads=2)
    for first, count in ((0, 1), (3, 2), (5, 4), (1, 7), (2, 17)):
        np.testing.assert_array_equal(run(head_of(x[first : first + count], codes, scales)), together[first:][:count])
    np.testing.assert_array_equal(run(head_of(x, codes[128:], scales[1:])), together[:, 128:])


def test_subnormal_codes_zeros_of_both_signs_and_scales_of_zero() -> None:
    codes, scales = np.zeros((130, 130), np.uint8), np.ones((2, 2), np.float32)
    codes[0, :8] = codes[129, :8] = np.arange(8)  # 0 to 7 * 2^-9
    codes[1, :2], codes[2] = 0x80, 0x7E
    scales[0, 1] = 0.0
    got = run(head_of(np.ones((1, 130), np.float32), codes, scales))[0] * np.sqrt(1 + EPS)
    np.testing.assert_allclose(got[[0, 1, 2, 129]], [28 / 512, 0, 128 * 448, 28 / 512], rtol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-127, 2.0**110])
def test_scales_at_both_ends_of_float32(scale: float) -> None:
    codes = np.full((3, 128), 0x38, np.uint8)  # 1.0
    got = run(head_of(np.ones((2, 128), np.float32), codes, np.full((1, 1), scale, np.float32)))
    np.testing.assert_allclose(got, 128 * np.float64(scale), rtol=1e-6)


def test_what_is_not_finite_in_fp8_is_not_hidden() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 200)).astype(np.float32)
    x[1, 40], x[2, 199] = np.nan, np.inf
    codes, scales, _ = blocks_of(rng, 130, 200)
    codes[codes & 0x7F == 0] = 1
    assert np.isfinite(run(head_of(x, codes, scales))).all(axis=1).tolist() == [True, False, False, True]
    scales[1, 1] = np.nan
    assert np.isfinite(run(head_of(x[:1], codes, scales)))[0].tolist() == [True] * 128 + [False] * 2


@pytest.mark.parametrize(
    ("mend", "words"),
    [
        (shaped("head_scale", lambda s: s[:, :-1]), "head_scale does not fit"),
        (shaped("head_scale", lambda s: s[:-1]), "head_scale does not fit"),
        (shaped("head_scale", lambda s: s.astype(np.float16)), "head does not fit"),
        (shaped("head_scale", lambda s: s.astype(np.float64)), "head_scale is of another type, ONNX's number 11"),
        (shaped("head", lambda codes: codes[:, :-1]), "head does not fit"),
    ],
)
def test_fp8_that_does_not_fit_is_refused_by_name(mend: Callable[[Given], Given], words: str) -> None:
    codes, scales, _ = blocks_of(np.random.default_rng(3), 130, 300)
    with pytest.raises(Exception, match=words):
        run(mend(head_of(np.ones((2, 300), np.float32), codes, scales)))
