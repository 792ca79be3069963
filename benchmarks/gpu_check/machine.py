"""The part "machine": what the figures are of."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

import torch

from gpu_check.items import Gpu, Item, Setting
from gpu_check.rows import Row

PART = "machine"


def items(setting: Setting, gpu: Gpu) -> list[Item]:
    return [Item("machine", lambda: [_described(setting, gpu)])]


def _described(setting: Setting, gpu: Gpu) -> Row:
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy", "onnx", "cuda-bindings"))
    software = f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores"
    if setting.rehearsal:
        return Row(PART, f"rehearsal on a CPU as SM {gpu.sm}", "good", f"no figure here is of a GPU; {software}")
    memory = torch.cuda.get_device_properties(0)
    what = f"{gpu.name} (SM {gpu.sm})"
    facts = (
        f"{memory.total_memory / 1e9:.0f} GB, {memory.multi_processor_count} SMs, L2 {gpu.cache_bytes() / 1e6:.0f} MB"
    )
    return Row(PART, what, "good", f"{facts}, driver {_driver()}, {software}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
