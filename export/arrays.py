"""The types of numpy arrays that pass between folders, and numpy's dtype by name."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Floats = npt.NDArray[np.float32]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


_OTHERS: dict[str, npt.DTypeLike] = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": np.uint8}
# The numbers that the codes 0 to 255 of float8_e4m3fn stand for; 0x7f and 0xff are NaN.
E4M3: Floats = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def numpy_dtype(name: str) -> npt.DTypeLike:
    """The dtype of that name; bfloat16 is ml_dtypes', codes of float8_e4m3fn are bytes."""
    return _OTHERS.get(name) or np.dtype(name)
