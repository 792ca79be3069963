"""report.json's schema: no field changes without a new version, and docs/accuracy.md names them all."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import typing
from pathlib import Path

import pytest

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.validate.report.report import SCHEMA_VERSION, AccuracyReport

# sha256 of the fields of each schema version, as fields() lists them. A mismatch means that report.json has changed:
# raise SCHEMA_VERSION, say so in docs/accuracy.md, and add the new sum.
SCHEMAS = {7: "153598fffb7627c7bdea4ddc2aad01453ccd83308871952476fdd47d7d0efe77"}
DOCS = Path(__file__).parents[3] / "docs" / "accuracy.md"


def fields(kind: type, at: str = "") -> list[str]:
    """ "path: type" of every field, into the dataclasses that the report is made of; the model's config is export's."""
    found, hints = [], typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        path, hint = f"{at}.{field.name}" if at else field.name, hints[field.name]
        inner = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t) and t is not ModelConfig]
        found.append(f"{path}: {field.type}")
        for each in inner:
            found += fields(each, path)
    return found


def test_fields_change_with_the_version_only():
    found = "\n".join(fields(AccuracyReport))
    assert hashlib.sha256(found.encode()).hexdigest() == SCHEMAS[SCHEMA_VERSION], found


@pytest.mark.parametrize("name", sorted({path.partition(":")[0] for path in fields(AccuracyReport)}))
def test_every_field_is_documented(name):
    table = DOCS.read_text(encoding="utf-8").partition("## report.json")[2]
    assert re.search(rf"`[^`]*\b{name.rpartition('.')[2]}\b[^`]*`", table)


def test_the_version_is_in_the_docs():
    assert f"## report.json, schema {SCHEMA_VERSION}" in DOCS.read_text(encoding="utf-8")
