"""README and docs: its tables are those of docs, and every section that a command makes can be made again."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from readme_tables import TABLES, Table  # noqa: E402  benchmarks are scripts, not a package
from section import sections  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.file)
def test_readme_states_what_docs_state(table: Table) -> None:
    assert table.text() in README, "run `python benchmarks/readme.py WORKDIR --remake README`"
    assert table.put(README) == README


def test_every_section_names_a_command_that_is_there() -> None:
    found = list(sections())
    assert {section.file.name for section in found} >= {"accuracy.md", "performance.md", "scale.md", "serving.md"}
    assert all((ROOT / section.command.split()[0]).is_file() for section in found)


def test_no_marker_is_left_open() -> None:
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = file.read_text(encoding="utf-8")
        opened = len(re.findall(r"^<!-- python benchmarks/", text, re.MULTILINE))
        assert opened == text.count("<!-- end -->"), file


def test_every_page_is_linked() -> None:
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"docs/\w+\.md", README))
