"""Where the NvInfer headers lie: in a TensorRT on this machine, or in a wheel that carries them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.export.errors import BuildError

_SYSTEM_FOLDER = Path("/usr/include/x86_64-linux-gnu")  # the distribution package libnvinfer-headers-dev
_OLDEST = (10, 14)  # the oldest whose plugin interfaces were compared with later ones


@dataclass(frozen=True)
class Headers:
    """A folder with NvInferRuntime.h, its TensorRT version, and the sha256 of the files."""

    folder: Path
    version: str
    sha256: str


def find_headers() -> Headers:
    """The first NvInfer headers found. Raises BuildError where there are none, or only too old ones."""
    looked = list(_candidates())
    for folder in looked:
        if (folder / "NvInferRuntime.h").is_file():
            return _read(folder)
    places = ", ".join(str(folder) for folder in looked)
    raise BuildError(
        f"no NvInfer headers found (looked in {places}): set TENSORRT_ROOT to an unpacked TensorRT, "
        "install libnvinfer-headers-dev, or run `pip install kernel-lens`"
    )


def _candidates() -> Iterator[Path]:
    root = os.environ.get("TENSORRT_ROOT")
    if root:
        yield Path(root) / "include"
    yield _SYSTEM_FOLDER
    wheel = importlib.util.find_spec("kernel_lens")
    if wheel is not None and wheel.origin is not None:
        yield Path(wheel.origin).parent / "include" / "tensorrt"


def _read(folder: Path) -> Headers:
    version = _version(folder)
    if version < _OLDEST:
        found, oldest = ".".join(map(str, version)), ".".join(map(str, _OLDEST))
        raise BuildError(
            f"the NvInfer headers in {folder} are TensorRT {found}; {oldest} or newer is needed: update it"
        )
    digest = hashlib.sha256()
    for path in sorted(folder.glob("NvInfer*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return Headers(folder, ".".join(map(str, version)), digest.hexdigest())


def _version(folder: Path) -> tuple[int, ...]:
    """(major, minor, patch) from NvInferVersion.h; newer headers name the numbers through a second macro."""
    text = (folder / "NvInferVersion.h").read_text(encoding="utf-8")
    macros = dict(re.findall(r"^#define\s+(\w+)\s+(\w+)", text, re.MULTILINE))
    parts = [macros.get(f"NV_TENSORRT_{part}", "") for part in ("MAJOR", "MINOR", "PATCH")]
    numbers = [macros.get(part, part) for part in parts]
    if not all(number.isdigit() for number in numbers):
        raise BuildError(f"{folder / 'NvInferVersion.h'} names no version: reinstall the headers")
    return tuple(int(number) for number in numbers)
