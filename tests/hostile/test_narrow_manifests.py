"""Manifests of narrow bundles that somebody changed and sealed anew: what does not fit together is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_trt.export.bundle.folder import MANIFEST_FILE, Bundle
from deepseek_trt.export.bundle.manifest import sha256_of
from deepseek_trt.export.errors import BundleError

NAME = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def bundle(demo_checkpoint, bundle_of, tmp_path) -> Path:
    return Path(shutil.copytree(bundle_of(demo_checkpoint, quantize="fp8").path, tmp_path / "bundle"))


def change(bundle: Path, mend: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]) -> str:
    """What opening the bundle says once `mend` has changed the manifest, or the records of the scales and codes."""
    raw = json.loads((bundle / MANIFEST_FILE).read_text())
    records = {record["recipe"]["name"]: record for record in raw["weights"]}
    mend(raw, records[f"{NAME}_scale"], records[NAME])
    del raw["sha256"]
    (bundle / MANIFEST_FILE).write_text(json.dumps({**raw, "sha256": sha256_of(raw)}))
    with pytest.raises(BundleError) as refused:
        Bundle.open(bundle)
    return str(refused.value)


def narrow(**values: Any) -> Callable[..., None]:
    def mend(raw: dict[str, Any], scales: dict[str, Any], codes: dict[str, Any]) -> None:
        for record in (scales, codes):
            record["recipe"]["narrow"] |= values

    return mend


def with_rules(**values: Any) -> Callable[..., None]:
    """In both parts and in the rules, so that these agree."""

    def mend(raw: dict[str, Any], scales: dict[str, Any], codes: dict[str, Any]) -> None:
        narrow(**values)(raw, scales, codes)
        raw["quantization"]["rules"].append({**raw["quantization"]["rules"][0], **values})

    return mend


def shape(part: int, change: Callable[[list[int]], list[int]]) -> Callable[..., None]:
    def mend(raw: dict[str, Any], *records: dict[str, Any]) -> None:
        recipe = records[part]["recipe"]
        recipe["shape"] = change(recipe["shape"])

    return mend


def dtype(part: int, name: str) -> Callable[..., None]:
    return lambda raw, *records: records[part].update(dtype=name)


def without_quantization(raw: dict[str, Any], *records: dict[str, Any]) -> None:
    raw["quantization"] = None


WRONG = {
    "another format": (narrow(format="int8"), f"{NAME}_scale' has the dtype 'float32'"),
    "a format that nobody knows": (narrow(format="fp6"), f"{NAME}_scale' has the format 'fp6'"),
    "another group": (narrow(group=32), f"'{NAME}' is narrow in a way that quantization does not name"),
    "another group, and its rule": (with_rules(group=64), f"'{NAME}' and '{NAME}_scale' do not fit together"),
    "a group of 0": (with_rules(group=0), f"'{NAME}' and '{NAME}_scale' do not fit together"),
    "another method": (narrow(method="published"), f"'{NAME}' is narrow in a way that quantization does not name"),
    "a method that fp8 has not": (with_rules(method="least_squares"), "do not fit together"),
    "scales of a group a row": (shape(0, lambda s: [s[0] * 128, s[1]]), "do not fit together"),
    "a scale fewer": (shape(0, lambda s: [s[0], s[1] + 1]), "do not fit together"),
    "another row": (shape(1, lambda s: [s[0] + 128, s[1]]), "do not fit together"),
    "codes of one dim": (shape(1, lambda s: [s[0] * s[1]]), f"'{NAME}'"),
    "scales in float16": (dtype(0, "float16"), f"{NAME}_scale' has the dtype 'float16'"),
    "codes as bytes": (dtype(1, "uint8"), f"{NAME}' has the dtype 'uint8'"),
    "no quantization": (without_quantization, "quantization does not belong to the weights"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_by_name(bundle: Path, what: str) -> None:
    mend, words = WRONG[what]
    said = change(bundle, mend)
    assert words in said
    assert MANIFEST_FILE in said
