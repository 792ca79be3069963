"""Dtypes: one record for each that graphs hold. No numpy here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """A dtype by its name in torch and numpy (bfloat16: ml_dtypes').

    nbytes are of one number; `onnx` is the number in TensorProto of what graphs hold it as, `safetensors` its name in a
    shard's header.
    `computed_in` is the dtype that ONNX Runtime's CPU provider computes in where the graph says this one.
    """

    name: str
    nbytes: int
    onnx: int
    safetensors: str
    computed_in: str


_DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float32", 4, 1, "F32", "float32"),
        Dtype("float16", 2, 10, "F16", "float16"),
        Dtype("bfloat16", 2, 16, "BF16", "float32"),
        Dtype("int64", 8, 7, "I64", "int64"),
        Dtype("int32", 4, 6, "I32", "int32"),
        Dtype("int8", 1, 3, "I8", "int8"),
        Dtype("uint8", 1, 2, "U8", "uint8"),
        Dtype("float8_e4m3fn", 1, 2, "F8_E4M3", "float8_e4m3fn"),  # as bytes: ONNX Runtime picks no rows of float8
    )
}
# Half the distance from 1 to the next larger number.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# What weights may be, by their names in safetensors.
WEIGHT_DTYPES = {_DTYPES[name].safetensors: name for name in ("float32", "float16", "bfloat16")}


def dtype_of(name: str) -> Dtype:
    """The record of a dtype that graphs hold; KeyError for another."""
    return _DTYPES[name]


def dtype_bytes(name: str) -> int:
    """Bytes of one number."""
    return _DTYPES[name].nbytes


def computed_in(name: str) -> str:
    """The dtype that ONNX Runtime's CPU provider computes in where a graph says `name`."""
    return _DTYPES[name].computed_in
