"""docs/python.md does what it says, word for word, with the demo model as the folder "checkpoint"."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run(blocks, folder, demo_checkpoint, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "checkpoint").symlink_to(demo_checkpoint)
    names: dict = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)


def test_examples_run(tmp_path, demo_checkpoint, monkeypatch, capsys):
    run([b for b in BLOCKS if "build_plans" not in b], tmp_path, demo_checkpoint, monkeypatch)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "True text-generation 84"
    assert shown[1] == "True"
    assert "(2, 128)" in shown[-2]
    assert "not-there is not a bundle" in shown[-1]


@pytest.mark.slow
@pytest.mark.tensorrt
def test_engines_are_built(tmp_path, demo_checkpoint, monkeypatch, capsys):
    run(
        [
            b
            for b in BLOCKS
            if 'export_bundle(ExportRequest(Path("checkpoint"), Path("bundle")' in b or "build_plans" in b
        ],
        tmp_path,
        demo_checkpoint,
        monkeypatch,
    )
    assert "MlaDecode" in capsys.readouterr().out
