"""The manifest beside a plugin library: what went in, for which model and chips, and the library's sha256."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deepseek_trt.export.errors import BuildError
from deepseek_trt.export.files import stream_sha256
from deepseek_trt.export.text.wording import shown
from deepseek_trt.export.trust.own_json import own_record, read_own
from deepseek_trt.export.trust.real_files import open_real
from deepseek_trt.plugins.aot.records import Binary

PLUGINS_FOLDER = "plugins"  # in the bundle
LIBRARY = "libdeepseek_trt_plugins.so"
MANIFEST = "libdeepseek_trt_plugins.json"
SCHEMA = 2
_MEND = "run `deepseek-trt plugins` again"


@dataclass(frozen=True)
class Manifest:
    """What a plugin library holds.

    `library_id` is in the library too, and in the plans built with it; it follows from `inputs_sha256`. `sizes` are the
    model's, by the ops' size symbols. `binaries` has one row for each compiled kernel, images by sha256.
    """

    schema: int
    made_by: str
    sha256: str
    library_id: str
    inputs_sha256: str
    dtype: str
    sizes: Mapping[str, int]
    ops: Sequence[str]
    sms: Sequence[int]
    ptx_sms: Sequence[int]
    versions: Mapping[str, str]
    binaries: Sequence[Mapping[str, Any]]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def read_manifest(library: Path) -> Manifest:
    """The manifest of `library`. Raises BuildError where it is missing or does not describe this very file."""
    path = library.with_name(MANIFEST)
    raw = read_own(library.parent, MANIFEST, BuildError, _MEND)
    manifest = own_record(Manifest, raw, ("schema", SCHEMA), path, BuildError, _MEND)
    with open_real(library.parent, library.name, BuildError, _MEND) as stream:
        found = stream_sha256(stream)
    if found != manifest.sha256:
        digests = f"sha256 {found}, not {shown(manifest.sha256)}"
        raise BuildError(f"{library} is not the file that {path.name} describes ({digests}): {_MEND}")
    return manifest


def binary_row(binary: Binary, offset: int) -> dict[str, Any]:
    """The manifest's row of a binary, whose image lies so many bytes into the library."""
    v = binary.variant
    return {
        "op": v.op,
        "kernel": v.kernel,
        "dtype": v.dtype,
        "max_tokens": v.max_tokens,
        "sm": binary.sm,
        "is_ptx": binary.is_ptx,
        "entry": binary.entry,
        "shared_bytes": binary.shared_bytes,
        "threads": binary.threads,
        "offset": offset,
        "bytes": len(binary.image),
        "sha256": binary.sha256,
        "constants": dict(v.constexprs),
    }


def version_of(distribution: str) -> str:
    """The installed version, or "unknown"."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
