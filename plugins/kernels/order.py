"""Programmatic dependent launch: on SM 90 and newer a kernel starts while the one before it on the stream still runs.

Such a kernel calls `after_previous_kernel` before it reads or writes memory, and takes a constant PDL for it, which the
table of variants sets to 1 where the chip can. The launcher marks its launches then. A kernel without the call is never
marked, and so waits for all before it.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def after_previous_kernel(PDL: tl.constexpr):
    """Wait until the kernel before has ended and its writes are seen, and let the next one start waiting as well.

    As every kernel waits before it ends, what came before the one before has ended, too.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
