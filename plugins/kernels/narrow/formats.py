"""What a narrow format is to a kernel: the number by which it goes, and the type of its scales. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepseek_trt.export.bundle.narrow import FORMATS
from deepseek_trt.export.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor

INT8_CODE, INT4_CODE, FP8_CODE = 0, 1, 2  # the kernels' FORMAT


@dataclass(frozen=True)
class KernelFormat:
    """`code` is the kernels' FORMAT, `scale` Triton's type of the scales; a step of a product takes `step` columns."""

    name: str
    code: int
    scale: str
    step: int

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return FORMATS[self.name].group

    @property
    def packed(self) -> int:
        """Codes in a byte."""
        return FORMATS[self.name].packed


# Of whole numbers a step is a group, of which one scale a row is applied to the step's sum.
KERNEL_FORMATS = {
    made.name: made
    for made in (
        KernelFormat("int8", INT8_CODE, "fp16", 32),
        KernelFormat("int4", INT4_CODE, "fp16", 32),
        KernelFormat("fp8", FP8_CODE, "fp32", 64),
    )
}


def kernel_format(name: str, group: int) -> KernelFormat:
    """The format of an op's attributes. Raises BackendError where kernels know no such one."""
    found = KERNEL_FORMATS.get(name)
    if found is None or found.group != group:
        known = ", ".join(f"{kind.name} in groups of {kind.group}" for kind in KERNEL_FORMATS.values())
        raise BackendError(f"the kernels know {known}, not {name!r} in groups of {group}: use the ort backend")
    return found


def codes_of(tensor: Tensor) -> Tensor:
    """A tensor of codes as the bytes that kernels read."""
    import torch

    return tensor.contiguous().view(torch.int8)
