"""The library in TensorRT-RTX, which builds engines with no GPU; what it launches is test_launches.py's."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BackendError, BuildError
from deepseek_trt.plugins.aot.records import Binary
from deepseek_trt.plugins.fused import FUSED_OPS
from deepseek_trt.plugins.kernels import KERNEL_OPS
from deepseek_trt.plugins.narrow_ops import PLUGIN_OPS
from deepseek_trt.plugins.tensorrt import loading, rtx_shim
from deepseek_trt.plugins.tensorrt.library import PluginLibrary, build_library
from deepseek_trt.plugins.tensorrt.loading import load_library
from deepseek_trt.plugins.tensorrt.manifest import MANIFEST
from deepseek_trt.plugins.tensorrt.op_tables import fixed_sizes

OF_OTHERS = {"MoeBiasedRouter", *(name for name in KERNEL_OPS if "Narrow" in name)}
OF_V2 = {*KERNEL_OPS, *(op.name for op in FUSED_OPS)} - OF_OTHERS

ATTRIBUTES: dict[str, dict[str, Any]] = {
    "MlaPrefill": {"scale": 0.125},
    "MlaDecode": {"scale": 0.125, "kv_lora_rank": 32},
    "MoeRouter": {"top_k": 3, "n_group": 4, "topk_group": 2, "norm_topk_prob": 0, "routed_scaling_factor": 16.0},
    "MoeBiasedRouter": {"top_k": 3, "n_group": 4, "topk_group": 2, "norm_topk_prob": 1, "routed_scaling_factor": 2.5},
    "MoeExperts": {"activation": "silu"},
}
ATTRIBUTES |= {"MlaQuery": {"eps": 1e-6}, "MlaValue": {}}
ATTRIBUTES["MoeLayer"] = {**ATTRIBUTES["MoeRouter"], "biased": 0}

Play = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def play() -> Play:
    """Builds the cases in a process of their own."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

    def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, str(Path(__file__).with_name("play_tensorrt.py"))]
        done = subprocess.run(
            command, input=json.dumps(cases), capture_output=True, text=True, env=environment, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def case(
    op: str, library: PluginLibrary, config: ModelConfig, dtype: str = "bfloat16", **changes: Any
) -> dict[str, Any]:
    """One op to build; changes are attributes (None: left out) or sizes."""
    attributes = {k: v for k, v in (ATTRIBUTES[op] | changes).items() if k in ATTRIBUTES[op] and v is not None}
    sizes = fixed_sizes(config) | {k: v for k, v in changes.items() if k not in ATTRIBUTES[op]}
    return {"op": op, "library": str(library.path), "dtype": dtype, "attributes": attributes, "sizes": sizes}


@pytest.mark.tensorrt
def test_every_op_builds(
    play: Play,
    plugin_library: PluginLibrary,
    plugin_config: ModelConfig,
    v3_library: PluginLibrary,
    v3_config: ModelConfig,
) -> None:
    """Each model's router is in its own library."""
    of_v2 = [op.name for op in PLUGIN_OPS if op.name in OF_V2]
    libraries = [plugin_library] * len(of_v2) + [v3_library]
    cases = [case(name, plugin_library, plugin_config) for name in of_v2]
    results = play([*cases, case("MoeBiasedRouter", v3_library, v3_config)])
    for result, library in zip(results, libraries, strict=True):
        assert result["layers"] == ["PLUGIN_V3"]
        assert result["plan"], result["errors"]
        assert result["errors"] == []
        assert result["library"] == library.sha256


@pytest.mark.tensorrt
def test_errors_reach_tensorrts_logger(play: Play, plugin_library: PluginLibrary, plugin_config: ModelConfig) -> None:
    wrong = {
        "MlaDecode: input query, axis 2 (H) is 8, but this plugin library was made for a model where it is 4": case(
            "MlaDecode", plugin_library, plugin_config, H=8
        ),
        "MlaDecode: input query is float16, but this plugin library takes bfloat16": case(
            "MlaDecode", plugin_library, plugin_config, dtype="float16"
        ),
        'MlaDecode: attribute "kv_lora_rank" is missing': case(
            "MlaDecode", plugin_library, plugin_config, kv_lora_rank=None
        ),
        'MoeExperts: attribute "activation" is "relu", but the plugin computes "silu" only': case(
            "MoeExperts", plugin_library, plugin_config, activation="relu"
        ),
        'MoeRouter: attribute "topk_group" asks for 3': case("MoeRouter", plugin_library, plugin_config, topk_group=3),
    }
    for message, result in zip(wrong, play(list(wrong.values())), strict=True):
        assert result["plan"] is None
        assert any(error.startswith(message) for error in result["errors"]), (message, result["errors"])


@pytest.mark.tensorrt
def test_another_library_takes_the_place(
    play: Play,
    plugin_library: PluginLibrary,
    plugin_config: ModelConfig,
    uncompiled: Callable[..., list[Binary]],
    tmp_path: Path,
) -> None:
    other = dataclasses.replace(plugin_config, num_attention_heads=8)
    built = build_library(uncompiled(other, sms=(86,)), other, "bfloat16", tmp_path)
    first, second = case("MlaDecode", plugin_library, plugin_config), case("MlaDecode", built, other)
    results = play([first, second, first, second])
    assert [r["library"] for r in results] == [plugin_library.sha256, built.sha256] * 2
    assert all(r["plan"] for r in results), results


class Registry:
    """Stands in for TensorRT's."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.calls: list[str] = []

    def load_library(self, path: str) -> object:
        self.calls.append(f"load {Path(path).parent.name}")
        return None if self.refuses else path

    def deregister_library(self, handle: object) -> None:
        self.calls.append(f"deregister {Path(str(handle)).parent.name}")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(loading, "_held", {})
    monkeypatch.setattr(ctypes, "CDLL", lambda path: path)
    return Registry()


def module_of(registry: Registry) -> ModuleType:
    module = ModuleType("tensorrt")
    module.__dict__["get_plugin_registry"] = lambda: registry
    return module


def copy_to(folder: Path, library: PluginLibrary) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(library.path.with_name(MANIFEST), folder)
    return Path(shutil.copy(library.path, folder))


def grow(path: Path, library: PluginLibrary) -> None:
    """Make the library at `path` another one, and its manifest fit it."""
    path.write_bytes(path.read_bytes() + b"more")
    manifest = path.with_name(MANIFEST)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace(library.sha256, digest))


def test_library_is_loaded_once(registry: Registry, plugin_library: PluginLibrary, tmp_path: Path) -> None:
    paths = [copy_to(tmp_path / name, plugin_library) for name in ("one", "two", "three")]
    module = module_of(registry)
    assert load_library(paths[0], module) == load_library(paths[0], module) == load_library(paths[1], module)
    first = len(registry.calls)
    assert first == 1
    grow(paths[2], plugin_library)
    load_library(paths[2], module)
    assert [call.split()[0] for call in registry.calls] == ["load", "deregister", "load"]


def test_library_built_anew_takes_the_place_of_the_one_before(
    registry: Registry, plugin_library: PluginLibrary, tmp_path: Path
) -> None:
    path = copy_to(tmp_path / "one", plugin_library)
    before = load_library(path, module_of(registry))
    grow(path, plugin_library)
    with pytest.raises(BuildError, match="changed while it was opened"):
        load_library(path, module_of(registry), before.sha256)
    load_library(path, module_of(registry))
    assert [call.split()[0] for call in registry.calls] == ["load", "deregister", "load"]


def test_refused_or_changed_library_is_said(registry: Registry, plugin_library: PluginLibrary, tmp_path: Path) -> None:
    path = copy_to(tmp_path / "one", plugin_library)
    with pytest.raises(BackendError, match="tensorrt does not take"):
        load_library(path, module_of(Registry(refuses=True)))
    path.write_bytes(b"changed")
    with pytest.raises(BuildError, match="is not the file that"):
        load_library(path, module_of(registry))
    assert registry.calls == []


def test_shim_is_for_tensorrt_rtx_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rtx_shim.prepare(ModuleType("tensorrt"))
    assert not list(tmp_path.iterdir())


@pytest.mark.tensorrt
def test_shim_gives_the_missing_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    script = (
        "import ctypes, tensorrt_rtx\n"
        "from deepseek_trt.plugins.tensorrt.rtx_shim import prepare\n"
        "for _ in range(2): prepare(tensorrt_rtx)\n"
        "print(ctypes.CDLL('libtensorrt_rtx.so').getInferLibVersion())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
    assert int(done.stdout) > 0
    assert len(list(tmp_path.glob("deepseek-trt/rtx-shim-*/libtensorrt_rtx.so"))) == 1
