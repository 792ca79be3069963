"""docs/python.md does what it says, word for word, with the demo model as the folder "checkpoint"."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepseek_trt.validate.cases import long_cases

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run(blocks, folder, demo_checkpoint, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(long_cases, "GREEDY_STEPS", 1)
    (folder / "checkpoint").symlink_to(demo_checkpoint)
    (folder / "my-text.txt").write_text("Return the number of the given value, and nothing else. " * 30)
    names: dict = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)


def is_slow(block):
    return "validate_bundle" in block or "build_plans" in block


def test_examples_run(tmp_path, demo_checkpoint, monkeypatch, capsys):
    run([block for block in BLOCKS if not is_slow(block)], tmp_path, demo_checkpoint, monkeypatch)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "True text-generation 84"
    assert "(2, 128)" in shown[-2]
    assert "not-there is not a bundle" in shown[-1]


@pytest.mark.slow
@pytest.mark.tensorrt
def test_slow_examples_run(tmp_path, demo_checkpoint, monkeypatch, capsys):
    run([BLOCKS[0], *filter(is_slow, BLOCKS)], tmp_path, demo_checkpoint, monkeypatch)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "True ['ort']"
    assert "MlaDecode" in shown[-1]
