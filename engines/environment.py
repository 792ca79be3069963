"""Environment: what this machine and this installation are, as a bug report needs it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.engines.sessions.tensorrt.cuda import visible_gpu
from deepseek_trt.export.reading.hub import hub_cache
from deepseek_trt.export.trust.cache import cache_folder

_PACKAGES = (
    "deepseek-trt",
    "torch",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime-gpu",
    "onnxruntime",
    "polygraphy",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "triton",
    "tensorrt-rtx",
    "tensorrt-rtx-cu13",
    "tensorrt",
    "tensorrt-cu13",
    "cuda-bindings",
    "ziglang",
)
# What compiled operators and kernels choose by.
_CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16")


@dataclass(frozen=True)
class Environment:
    """Sizes are bytes; `gpu` is the first GPU's name; `caches` are folders by what they hold, whether or not there."""

    versions: dict[str, str]
    python: str
    system: str
    cpu: str
    cores: int
    cpu_features: tuple[str, ...]
    memory: int
    gpu: str | None
    caches: dict[str, str]


def read_environment() -> Environment:
    """Ask the machine; nothing heavy is imported."""
    return Environment(
        versions=package_versions(),
        python=platform.python_version(),
        system=platform.platform(),
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_features=tuple(name for name in _CPU_FEATURES if name in _cpu_info("flags").split()),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        gpu=visible_gpu(),
        caches={"compiled operators and checked weights": str(cache_folder()), "hub snapshots": str(hub_cache())},
    )


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what is computed, of those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's name, or its architecture where the system does not say."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str:
    """A line of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
