"""Kernels of a plugin library that the session launches itself: their images, read from the library and loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.engines.sessions.tensorrt.device import Device
from deepseek_trt.export.errors import BackendError, BuildError
from deepseek_trt.export.trust.real_files import open_real
from deepseek_trt.plugins.kernels.chips import runs_on
from deepseek_trt.plugins.tensorrt.manifest import Manifest

AGAIN = "run deepseek-trt plugins, then deepseek-trt build"


@dataclass(frozen=True)
class Kernel:
    """One loaded kernel, all of whose arguments are addresses; `sizes` are its constants by name."""

    handle: Any
    threads: int
    shared_bytes: int
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Loaded:
    """An op's kernels by name; `note` says what a user should know about how they run, or is empty."""

    kernels: Mapping[str, Kernel]
    note: str = ""


def load_kernels(device: Device, library: Path, manifest: Manifest, op: str) -> Loaded:
    """The kernels of `op` for the device: compiled for its chip, else the PTX, also where a driver refuses what was
    compiled, as plugins choose (csrc/driver).

    Raises BackendError where the library has none that load, and BuildError where it is damaged.
    """
    rows = [row for row in manifest.binaries if row["op"] == op]
    failure = ""
    for target in _targets(rows, device.sm):
        chosen = [row for row in rows if (row["is_ptx"], row["sm"]) == target]
        try:
            kernels = {row["kernel"]: _load(device, library, row) for row in chosen}
        except BackendError as error:
            failure = failure or str(error)
            continue
        kind = "PTX" if target[0] else "binaries"
        better = f"{op} runs {kind} for SM {target[1]}, slower than it could: better code does not load ({failure})"
        return Loaded(kernels, better if failure else "")
    why = failure or f"none for SM {device.sm}"
    raise BackendError(f"{library.name} gives no {op} kernels ({why}): {AGAIN}")


def _targets(rows: Sequence[Mapping[str, Any]], sm: int) -> list[tuple[bool, int]]:
    """(is PTX, SM) of what the chip runs, the most suitable first: the rule of csrc/driver/binary.h."""
    found = {(bool(r["is_ptx"]), int(r["sm"])) for r in rows}
    usable = [(ptx, own) for ptx, own in found if (own <= sm if ptx else runs_on(own, sm))]
    return sorted(usable, key=lambda target: (target[0], -target[1]))


def _load(device: Device, library: Path, row: Mapping[str, Any]) -> Kernel:
    with open_real(library.parent, library.name, BuildError, AGAIN) as stream:
        stream.seek(row["offset"])
        image = stream.read(row["bytes"])
    if hashlib.sha256(image).hexdigest() != row["sha256"]:
        raise BuildError(f"{library} does not hold {row['kernel']} where its manifest says: {AGAIN}")
    handle = device.load_kernel(image, row["entry"], row["shared_bytes"])
    return Kernel(handle, row["threads"], row["shared_bytes"], row["constants"])
