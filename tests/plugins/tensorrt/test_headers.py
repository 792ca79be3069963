"""Where headers are looked for, and that all that are here declare what the plugins were written for."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from deepseek_trt.export.errors import BuildError
from deepseek_trt.plugins.tensorrt import headers
from deepseek_trt.plugins.tensorrt.headers import find_headers


def test_headers_that_are_missing_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(headers, "_candidates", lambda: iter([tmp_path]))
    with pytest.raises(BuildError, match="set TENSORRT_ROOT to an unpacked TensorRT"):
        find_headers()


@pytest.mark.parametrize("indirect", [False, True])
def test_headers_of_tensorrt_root_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, indirect: bool) -> None:
    include = tmp_path / "include"
    include.mkdir()
    (include / "NvInferRuntime.h").touch()
    names = ("MAJOR", "MINOR", "PATCH")
    lines = [
        f"#define NV_TENSORRT_{n} {f'TRT_{n}_ENTERPRISE' if indirect else i + 11} //!< {n}" for i, n in enumerate(names)
    ]
    lines += [f"#define TRT_{n}_ENTERPRISE {i + 11}" for i, n in enumerate(names)]
    (include / "NvInferVersion.h").write_text("\n".join(lines))
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    assert (find_headers().folder, find_headers().version) == (include, "11.12.13")

    (include / "NvInferVersion.h").write_text("\n".join(lines).replace("11", "8"))
    with pytest.raises(BuildError, match=r"TensorRT 8\.12\.13; 10\.14 or newer is needed"):
        find_headers()


# The functions of each interface that a plugin implements or is called through, in the order of the virtual table.
INTERFACES = {
    "IVersionedInterface": ["getAPILanguage", "getInterfaceInfo", "~IVersionedInterface"],
    "IPluginV3": ["getCapabilityInterface", "clone"],
    "IPluginV3OneCore": ["getPluginName", "getPluginVersion", "getPluginNamespace"],
    "IPluginV3OneBuild": [
        "configurePlugin",
        "getOutputDataTypes",
        "getOutputShapes",
        "supportsFormatCombination",
        "getNbOutputs",
        "getWorkspaceSize",
        "getValidTactics",
        "getNbTactics",
        "getTimingCacheID",
        "getFormatCombinationLimit",
        "getMetadataString",
        "getAliasedInput",  # version 2's
    ],
    "IPluginV3OneRuntime": ["setTactic", "onShapeChange", "enqueue", "attachToContext", "getFieldsToSerialize"],
    "IPluginCreatorV3One": [
        "createPlugin",
        "getFieldNames",
        "getPluginName",
        "getPluginVersion",
        "getPluginNamespace",
    ],
    "VExprBuilder": ["constant", "operation", "declareSizeTensor"],
}


def _all_headers() -> list[Path]:
    """Every folder of NvInfer headers on this machine."""
    assert importlib.util.find_spec("kernel_lens")
    return [folder for folder in headers._candidates() if (folder / "NvInferRuntime.h").is_file()]


@pytest.mark.parametrize("folder", _all_headers(), ids=str)
def test_headers_declare_the_interfaces_that_plugins_were_written_for(folder: Path) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("NvInfer*.h")))
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    for name, functions in INTERFACES.items():
        bodies = re.findall(rf"class {name}\b[^;{{]*\{{(.*?)\n\}};", text, re.DOTALL)
        assert bodies, name
        found = [f for body in bodies for f in re.findall(r"virtual[^;{]*?(~?\w+)\s*\(", body)]
        kept = [f for f in found if f in functions or not f.startswith("~")]
        assert kept == functions, name
