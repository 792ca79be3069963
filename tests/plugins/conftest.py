"""One plugin library for all tests here, and a program that plays TensorRT to it, with a driver that only records."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from deepseek_trt.export.bundle import recipes
from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.plugins.aot.narrow_use import ALL_WHOLE, NarrowUse
from deepseek_trt.plugins.aot.records import Binary, Variant
from deepseek_trt.plugins.aot.variants import variants_for
from deepseek_trt.plugins.cxx import find_compiler
from deepseek_trt.plugins.tensorrt.library import PluginLibrary, build_library

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "plugins" / "tensorrt" / "csrc"
DTYPE = "bfloat16"

Drive = Callable[..., list[str]]


# Launches of the ops of a decode graph for one token a row; test_launches.py holds the recording driver's against it.
LAUNCHES_A_STEP = {"MlaQuery": 1, "MlaDecode": 2, "MlaValue": 1, "MoeLayer": 5}


@pytest.fixture
def launches_a_step() -> dict[str, int]:
    """LAUNCHES_A_STEP."""
    return LAUNCHES_A_STEP


def binary_of(variant: Variant, sm: int, is_ptx: bool = False) -> Binary:
    """A binary whose image is text that names it: nothing compiled, for everything but running it."""
    image = f"{variant.op}/{variant.kernel}/{'ptx' if is_ptx else 'sm'}{sm}/{variant.max_tokens}".encode()
    shared = 60000 if variant.kernel == "mla_decode_split" else 1000 + variant.max_tokens
    digest = hashlib.sha256(image).hexdigest()
    return Binary(variant, sm, is_ptx, variant.kernel, shared, 32 * variant.num_warps, image, digest)


def binaries_of(
    config: ModelConfig, dtype: str = DTYPE, sms: Sequence[int] = (86, 90), narrow: NarrowUse = ALL_WHOLE
) -> list[Binary]:
    """All binaries for `sms` and the PTX fallback, uncompiled."""
    compiled = [binary_of(v, sm) for sm in sms for v in variants_for(config, dtype, sm, narrow=narrow)]
    return compiled + [binary_of(v, 80, is_ptx=True) for v in variants_for(config, dtype, 86, narrow=narrow)]


@pytest.fixture(scope="session")
def plugin_config() -> ModelConfig:
    return ModelConfig(
        hidden_size=64,
        num_attention_heads=4,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=24,
        n_routed_experts=16,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=16.0,
    )


def v3_like(config: ModelConfig) -> ModelConfig:
    """The same sizes with V3's router."""
    return dataclasses.replace(config, topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.5)


@pytest.fixture(scope="session")
def v3_config(plugin_config: ModelConfig) -> ModelConfig:
    return v3_like(plugin_config)


@pytest.fixture
def small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorRT that takes fewer numbers a tensor than plugin_config's stacks of 16 experts hold."""
    monkeypatch.setattr(recipes, "TENSORRT_MOST_NUMBERS", 20_000)


@pytest.fixture(scope="session")
def v3_library(v3_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> PluginLibrary:
    """A library of a model of V3's kind, whose experts TensorRT takes in parts of 6, 6 and 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "TENSORRT_MOST_NUMBERS", 20_000)
        return build_library(binaries_of(v3_config), v3_config, DTYPE, tmp_path_factory.mktemp("v3"))


@pytest.fixture(scope="session")
def narrow_use() -> NarrowUse:
    """Every format, for linear layers and for experts; a cache of int8."""
    linear, experts = (("int8", 32), ("int4", 32), ("fp8", 16)), ("int8", "int4", "fp8")
    return NarrowUse(linear, experts, whole_experts=False, cache=NarrowCache("int8", 32, 32))


@pytest.fixture(scope="session")
def narrow_config(plugin_config: ModelConfig) -> ModelConfig:
    """Of whole groups of 32."""
    return dataclasses.replace(plugin_config, moe_intermediate_size=96)


@pytest.fixture(scope="session")
def narrow_library(
    narrow_config: ModelConfig, narrow_use: NarrowUse, tmp_path_factory: pytest.TempPathFactory
) -> PluginLibrary:
    """A library of a model whose weights and cache are narrow, in every format; its images are text."""
    binaries = binaries_of(narrow_config, narrow=narrow_use)
    return build_library(binaries, narrow_config, DTYPE, tmp_path_factory.mktemp("narrow"))


@pytest.fixture(scope="session")
def uncompiled() -> Callable[..., list[Binary]]:
    return binaries_of


@pytest.fixture(scope="session")
def plugin_library(plugin_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> PluginLibrary:
    """A library for SM 86, SM 90 and PTX; its images are text."""
    return build_library(binaries_of(plugin_config), plugin_config, DTYPE, tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program `drive` and, in `driver`, the recording libcuda.so.1."""
    folder = tmp_path_factory.mktemp("played")
    (folder / "driver").mkdir()
    wheel = importlib.util.find_spec("kernel_lens")
    assert wheel is not None
    assert wheel.origin is not None
    headers = (
        Path(wheel.origin).parent / "include" / "tensorrt"
    )  # 10.14's: drive.cpp declares later ones' changes itself
    compiler = find_compiler()
    common = ["-Os", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    common += [flag for folder in (CSRC, CSRC / "driver") for flag in ("-I", str(folder))]
    drive = [*common, "-isystem", str(headers), str(HERE / "tensorrt" / "csrc" / "drive.cpp"), "-ldl", "-o", "drive"]
    compiler.run(drive, folder)
    shared = ["-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-o", "driver/libcuda.so.1"]
    compiler.run([*common, str(HERE / "tensorrt" / "csrc" / "recording_driver.cpp"), *shared], folder)
    return folder


@pytest.fixture(scope="session")
def drive(played: Path, plugin_library: PluginLibrary, plugin_config: ModelConfig, narrow_use: NarrowUse) -> Drive:
    """drive(commands, sm=86, driver=True, library=..., FAKE_...=...): what the program prints."""
    params = played / "params.txt"
    variants = variants_for(plugin_config, DTYPE, 86)
    variants += variants_for(v3_like(plugin_config), DTYPE, 86, narrow=narrow_use)
    lines = [" ".join([v.kernel, *("8" if a.type[0] == "*" else "4" for a in v.args), "8", "8"]) for v in variants]
    params.write_text("\n".join(dict.fromkeys(lines)))

    def run(
        commands: Sequence[str],
        *,
        sm: int = 86,
        driver: bool = True,
        library: Path = plugin_library.path,
        **fakes: str,
    ) -> list[str]:
        environment = {**os.environ, "FAKE_SM": str(sm), "FAKE_PARAMS": str(params), **fakes}
        environment["LD_LIBRARY_PATH"] = str(played / "driver") if driver else ""
        return _output(played / "drive", library, commands, environment)

    return run


def _output(program: Path, library: Path, commands: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    script = "\n".join(["finder new", *commands, ""])
    done = subprocess.run(
        [program, library], input=script, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert not done.stderr
    return done.stdout.splitlines()
