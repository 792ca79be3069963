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


def numpy_dtype(name: str) -> npt.DTypeLike:
    """The dtype of that name; bfloat16 is ml_dtypes'."""
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
