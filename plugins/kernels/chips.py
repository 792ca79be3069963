"""The chips binaries are made for, and what sets them apart for a kernel. No Triton here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from deepseek_trt.export.errors import BackendError, BuildError

if TYPE_CHECKING:
    from torch import Tensor

ChipClass = Literal["small", "ampere", "hopper", "blackwell"]

# Dynamic shared memory one block may use, in bytes, by SM version (CUDA programming guide, "technical specifications").
SHARED_LIMITS = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
    121: 101376,
}
OLDEST = min(SHARED_LIMITS)
INTERPRETED_BLOCKS = 4  # that the interpreter is taken to run at a time: enough to cut sequences in pieces
INTERPRETER = 0  # stands for an SM version where kernels are interpreted on the CPU


def shared_limit(sm: int) -> int:
    """Bytes of dynamic shared memory a block may use on `sm`. Raises BuildError for a chip that is not in the table."""
    if sm not in SHARED_LIMITS:
        known = ", ".join(map(str, SHARED_LIMITS))
        raise BuildError(f"SM {sm} is not supported; give one of {known}: chips in between run the PTX made for SM 80")
    return SHARED_LIMITS[sm]


def chip_class(sm: int) -> ChipClass:
    """What tiles `sm` takes: "small" by its shared memory (86, 89, 120, 121), the others by their matrix unit."""
    limit = shared_limit(sm)
    if limit == SHARED_LIMITS[86]:
        return "small"
    return "ampere" if sm < 90 else "hopper" if sm < 100 else "blackwell"


def runs_on(own: int, sm: int) -> bool:
    """Whether code compiled for `own` runs on `sm`: the rule of csrc/driver/binary.h."""
    return own == sm or (own // 10 == sm // 10 == 8 and own <= sm)


def compiled_for(sm: int) -> tuple[int, ...]:
    """The chip to compile for so that `sm` runs compiled code: itself or an earlier 8.x; none where only PTX runs."""
    return tuple(sorted(own for own in SHARED_LIMITS if runs_on(own, sm))[-1:])


def chip_of(tensor: Tensor) -> int:
    """The SM version of a tensor's device; INTERPRETER on the CPU."""
    if tensor.device.type == "cpu":
        from deepseek_trt.plugins.kernels import interpreter

        interpreter.require()
        return INTERPRETER
    if tensor.device.type != "cuda":
        raise BackendError(f"the kernels run on NVIDIA GPUs and on the CPU, not on {tensor.device}: move the tensors")
    import torch

    major, minor = torch.cuda.get_device_capability(tensor.device)
    sm = 10 * major + minor
    if sm < OLDEST:
        raise BackendError(f"the kernels need SM {OLDEST} or newer; this GPU is SM {sm}: use another backend")
    return sm if sm in SHARED_LIMITS else 86  # the smallest tiles run everywhere


def resident_blocks(tensor: Tensor) -> int:
    """Blocks of a kernel that a tensor's device runs at a time, taken to be one an SM: a plugin asks the driver."""
    if tensor.device.type == "cpu":
        return INTERPRETED_BLOCKS
    import torch

    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def dtype_name(tensor: Tensor) -> str:
    """A tensor's dtype as config.json spells it, e.g. bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")
