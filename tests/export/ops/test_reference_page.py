"""docs/plugins.md is what the OpSpecs say."""

from __future__ import annotations

from pathlib import Path

from deepseek_trt.export.ops.reference_page import op_reference

PAGE = Path(__file__).parents[3] / "docs" / "plugins.md"


def test_page_is_up_to_date():
    message = "run: python -m deepseek_trt.export.ops.reference_page > docs/plugins.md"
    assert PAGE.read_text(encoding="utf-8") == op_reference(), message
