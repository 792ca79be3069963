"""Kernels of both instruction sets give the same bits: their tiles differ, their sums do not. Several tokens of a
decode give those of one after the other.

AVX-512's tiles are tried on any machine: its constants are compiled for AVX2.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from deepseek_trt.plugins.cpu.library import source_files
from deepseek_trt.plugins.cxx import find_compiler

FLAGS = ["-std=c++17", "-O2", "-g0", "-ffp-contract=off", "-Wno-psabi", "-DNDEBUG", "-mcpu=x86_64_v3", "-DISA=v3"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels for x86-64")
def test_tiles_and_threads_change_no_bit(tmp_path: Path) -> None:
    for name, data in source_files().items():
        (tmp_path / name).write_bytes(data)
    driver = str(Path(__file__).parent / "csrc" / "prefill_sums.cpp")
    found = set()
    for name, more in {"v3": [], "v4": ["-D__AVX512F__"]}.items():
        arguments = [*FLAGS, *more, f"-I{tmp_path}", driver, "kernels.cpp", "team.cpp", "-o", name, "-lpthread"]
        find_compiler().run(arguments, tmp_path)
        for threads in (1, 3):
            command = [tmp_path / name, *["more"] * (threads - 1)]
            found.add(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert len(found) == 1
    lines = set(found.pop().splitlines())
    assert len(lines) == 34
    assert all(line.endswith(" alike") and "not" not in line for line in lines)
