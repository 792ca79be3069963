"""Products of narrow weights give the same bits for each instruction set, and those of a plain loop.

AVX-512's way is tried on any machine, compiled for AVX2; SSE4 takes the way of processors without either.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from deepseek_trt.plugins.cpu.library import source_files
from deepseek_trt.plugins.cxx import find_compiler

FLAGS = ["-std=c++17", "-O1", "-g0", "-ffp-contract=off", "-Wno-psabi", "-DNDEBUG", "-DISA=v3"]
WAYS = {"v2": ["-mcpu=x86_64_v2"], "v3": ["-mcpu=x86_64_v3"], "v4": ["-mcpu=x86_64_v3", "-D__AVX512F__"]}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels for x86-64")
def test_the_instruction_set_changes_no_bit(tmp_path: Path) -> None:
    for name, data in source_files().items():
        (tmp_path / name).write_bytes(data)
    driver = str(Path(__file__).parent / "csrc" / "narrow_sums.cpp")
    found = set()
    for name, more in WAYS.items():
        find_compiler().run([*FLAGS, *more, f"-I{tmp_path}", driver, "-o", name], tmp_path)
        found |= {printed(tmp_path / name), printed(tmp_path / name, "alone")}
    assert len(found) == 1
    assert len(set(found.pop().splitlines())) == 60


def printed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
