"""python -m deepseek_trt is the command, where its script is not on the PATH."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "model-repository"),
        (["check", "--help"], 0, "deepseek-trt check"),
        (["unheard-of"], 2, "No such command"),
        (["check", "/nowhere"], 1, "error: /nowhere"),
    ],
)
def test_the_module_is_the_command(arguments, code, words):
    run = subprocess.run(
        [sys.executable, "-m", "deepseek_trt", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == code
    assert words in run.stdout + run.stderr
