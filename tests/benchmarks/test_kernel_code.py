"""The compiled attention kernels: loads run ahead of the math, nothing spills, all fits; and how that is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernel_code

from deepseek_trt.plugins.aot import compile as aot
from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS, chip_class

LOOP = """
    %0 = ttg.local_alloc %q : (tensor<16x512xbf16, #b>) -> !ttg.memdesc<16x512xbf16, #s, #smem>
    %1 = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #s, #smem, mutable>
    %2 = ttg.local_alloc : () -> !ttg.memdesc<3x32x512xbf16, #s, #smem, mutable>
    %3 = ttg.local_alloc : () -> !ttg.memdesc<BUFFERSx32x64xbf16, #s, #smem, mutable>
    %4 = scf.for %i = %c0 to %c1 step %c32 iter_args(%a = %b) -> (i32) {
      %5 = ttg.async_wait %a, %c {num = 2 : i32}
      %6 = scf.if %d -> (i32) {
        scf.yield %e : i32
      }
      %7 = ttg.async_copy_global_to_local %f, %g mask %h : tensor<32x512x!tt.ptr<bf16>>
      %8 = ttg.async_commit_group tokens %7
      %9 = ttg.async_copy_global_to_local %f, %g mask %h : tensor<32x64x!tt.ptr<bf16>>
      %10 = ttg.async_commit_group tokens %9
      %11 = ttg.async_wait %a, %c {num = LATE : i32}
      scf.yield %5 : i32
    }
    %12 = ttg.async_wait {num = 0 : i32}
"""


IN_REGISTERS = """
    %4:3 = scf.for %i = %c0 to %c1 step %c16 iter_args(%a = %b, %c = %d, %e = %f) -> (i32, i32, i32) {
      %5 = tt.load %p, %m, %z : tensor<16x512x!tt.ptr<i8>, #blocked>
      %6 = tt.load %p, %m, %z : tensor<16x64x!tt.ptr<bf16>, #blocked>
      %7 = tt.load %t : !tt.ptr<i32>
      %8 = tt.dot USED, %c, %e : tensor<16x16xf32>
      scf.yield %8, %5, %6 : i32, i32, i32
    }
"""


@pytest.mark.parametrize(("used", "pending"), [("%a", 2), ("%6", 1)])
def test_reads_what_is_handed_on_in_registers(used, pending):
    """A tile that the iteration itself uses does not run ahead."""
    found = kernel_code.read_overlap(IN_REGISTERS.replace("USED", used))
    assert found == kernel_code.Overlap(1, loads=2, pending=pending, in_registers=True)
    assert found.runs_ahead == (pending == 2)


@pytest.mark.parametrize(("buffers", "late", "ahead"), [(2, 3, True), (2, 0, False), (1, 3, False), (3, 1, False)])
def test_reads_the_loop_and_nothing_else(buffers, late, ahead):
    """Its buffers, not the queries' and barriers; its waits, not the one after it."""
    found = kernel_code.read_overlap(LOOP.replace("BUFFERS", str(buffers)).replace("LATE", str(late)))
    assert found == kernel_code.Overlap(buffers, loads=2, pending=min(2, late))
    assert found.runs_ahead == ahead


def test_a_kernel_without_loads_ahead_has_no_overlap():
    assert kernel_code.read_overlap(LOOP.replace("async_copy_global_to_local", "load")) is None


def test_two_loops_are_not_guessed_between():
    with pytest.raises(ValueError, match="2 loops"):
        kernel_code.read_overlap(LOOP + LOOP)


def runs_ahead(kernel, dtype, sm):
    """Whether what ships for the chip does: decode in float32 is too large for the smallest."""
    too_large = dtype == "float32" and kernel == "mla_decode_split" and chip_class(sm) == "small"
    return kernel in kernel_code.LOADS_AHEAD and not too_large


def check(dtype, sm):
    for compiled in aot.compile_requests(kernel_code.attention_requests(sm, dtype), jobs=2):
        kernel = compiled.binary.variant.kernel
        assert compiled.spill_bytes == 0, kernel
        assert compiled.binary.shared_bytes <= SHARED_LIMITS[sm], kernel
        if runs_ahead(kernel, dtype, sm):
            overlap = kernel_code.read_overlap(compiled.ttgir)
            assert overlap is not None, kernel
            assert overlap.runs_ahead, (kernel, overlap)


def test_loads_run_ahead():
    check("bfloat16", 90)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sm", kernel_code.SMS)
def test_loads_run_ahead_on_every_chip(dtype, sm):
    check(dtype, sm)
