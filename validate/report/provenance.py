"""Where a report comes from: files by their sha256, versions, seed, command and time."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from datetime import datetime, timezone

from deepseek_trt.engines.environment import cpu_name, package_versions
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.validate.report.integrity import Integrity


@dataclass(frozen=True)
class CheckpointFile:
    """A part of the checkpoint as export read it; sha256 is None where it is gone, has changed, or was not hashed."""

    name: str
    size: int
    mtime_ns: int
    sha256: str | None


@dataclass(frozen=True)
class Provenance:
    """`started` and `seconds` are the only fields that differ between two runs of one command.

    `sha256` holds the bundle's files by name: graphs, weights, plans and the plugin library among them.
    `reference_weights` says where the reference's weights were read: "bundle" or "checkpoint".
    """

    bundle: str
    fingerprint: str
    sha256: dict[str, str]
    checkpoint_files: tuple[CheckpointFile, ...]
    reference_weights: str
    exported_with: dict[str, str]
    versions: dict[str, str]
    python: str
    machine: str
    seed: int
    command: str
    started: str
    seconds: float


def collect_provenance(
    bundle: Bundle, integrity: Integrity, seed: int, reference_weights: str, command: str, started: float
) -> Provenance:
    return Provenance(
        bundle=bundle.path.name,
        fingerprint=bundle.manifest.fingerprint,
        sha256=integrity.sha256,
        checkpoint_files=tuple(
            CheckpointFile(s.name, s.size, s.mtime_ns, integrity.checkpoint_sha256.get(s.name))
            for s in bundle.manifest.sources
        ),
        reference_weights=reference_weights,
        exported_with=bundle.manifest.versions,
        versions=package_versions(),
        python=platform.python_version(),
        machine=cpu_name(),
        seed=seed,
        command=command,
        started=datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 3),
    )
