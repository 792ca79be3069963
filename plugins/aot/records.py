"""What passes from the kernels through ahead-of-time compilation to the plugin library."""

from __future__ import annotations

from dataclasses import dataclass

POINTER_ALIGNMENT = 16  # bytes: kernels are compiled to load that much at a time from wherever a pointer leads


@dataclass(frozen=True)
class KernelArg:
    """One argument that a kernel takes at launch, in Python order. type is Triton's: "*bf16", "*i32", "i32", "fp32"."""

    name: str
    type: str


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants fixed: a row of the table of what gets compiled.

    max_tokens is the bucket: the launcher takes the row with the smallest max_tokens not below its token count; 0 means
    any count. constexprs hold the model's dims and the tile sizes by name; the launcher reads tiles for its grid.
    """

    kernel: str
    op: str
    dtype: str
    max_tokens: int
    constexprs: tuple[tuple[str, int], ...]
    args: tuple[KernelArg, ...]
    num_warps: int
    num_stages: int

    @property
    def overlaps(self) -> bool:
        """Whether it waits for the kernel before it by itself, so that it may be started early."""
        return bool(dict(self.constexprs).get("PDL"))


@dataclass(frozen=True)
class Binary:
    """A variant compiled for one chip. sm is e.g. 86; a PTX fallback has is_ptx set and the sm it was made for."""

    variant: Variant
    sm: int
    is_ptx: bool
    entry: str
    shared_bytes: int
    threads: int
    image: bytes
    sha256: str
