"""docs/plugins.md is what the OpSpecs say."""

from __future__ import annotations

from pathlib import Path

from deepseek_trt.plugins.op_reference import op_reference

PAGE = Path(__file__).parent.parent.parent / "docs" / "plugins.md"


def test_page_is_up_to_date():
    message = "run: python -m deepseek_trt.plugins.op_reference > docs/plugins.md"
    assert PAGE.read_text(encoding="utf-8") == op_reference(), message
