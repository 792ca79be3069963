"""The pack: what a check needs on a bare machine, as one file, or as several where one may not be large enough.

It holds the checkout's files that run, what prepare.py made, and Python packages that such a machine lacks.
TensorRT-RTX's library alone fills most of 64 MiB, so it is packed only where the pack may be cut into parts.
"""

from __future__ import annotations

import io
import lzma
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import files, version
from pathlib import Path

from gpu_check.places import ROOT, Prepared
from gpu_check.prepare import keep

MOST = 64 * 2**20  # bytes of a pack that is not cut into parts
RUNS = (
    "LICENSE",
    "scripts/gpu-check",
    "benchmarks/gpu_check",
    "benchmarks/gpu_model.py",
    "api",
    "export",
    "plugins",
    "engines",
)
# What the runtime imports beside torch, triton, numpy, onnx and cuda-bindings and what those bring.
PACKAGES = ("onnx-ir", "ml_dtypes", "tokenizers", "packaging")
RTX = ("tensorrt-rtx-cu13-bindings",)  # a wheel for each Python; the others are for all, and are taken from here
RTX_OF_ALL = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu13-libs")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# lzma's presets: TensorRT-RTX takes several times as long by 6, and two parts of 64 MiB by either.
_PRESET, _RTX_PRESET = 6, 1


@dataclass(frozen=True)
class Request:
    """Where the pack goes, the most bytes of a part (None: one file without TensorRT-RTX), and the Python it is for."""

    file: Path
    part_bytes: int | None
    python: str


def pack(prepared: Prepared, request: Request) -> tuple[Path, ...]:
    """Write the pack, and say how it is unpacked. Exits with a message where one file would be larger than MOST."""
    sites = []
    if request.python != "none":
        sites.append(prepared.sites[0])
        _packages(sites[0], PACKAGES, (), request.python)
    data = _archive(_contents(prepared, sites))
    if request.part_bytes and request.python != "none":
        data += _rtx(prepared, request.python)
    request.file.parent.mkdir(parents=True, exist_ok=True)
    written = tuple(_write(data, request))
    for file in written:
        print(f"{file} {file.stat().st_size / 2**20:.1f} MiB")
    names = f"{request.file}.*" if request.part_bytes else str(request.file)
    print(f"there: cat {names} | tar xJi && gpu-check/scripts/gpu-check")
    return written


def _packages(folder: Path, names: Sequence[str], same: Sequence[str], python: str) -> str:
    """Fill `folder` with the versions that are installed here, for `python`; gives what they are.

    Wheels of `names` are fetched, `same` are copied.
    """
    pinned = [f"{name}=={version(name)}" for name in names]
    what = " ".join((python, *pinned, *(f"{name}=={version(name)}" for name in same)))

    def make(to: Path) -> None:
        _install(to, pinned, python)
        for file in (file for name in same for file in files(name) or () if file.parts[0] != ".."):
            (to / file.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), to / file)

    keep(folder, what, make)
    return what


def _rtx(prepared: Prepared, python: str) -> bytes:
    """TensorRT-RTX as an archive of its own, which is kept: compressing it takes minutes."""
    site, kept = prepared.sites[1], prepared.folder / "rtx-archive"
    what = _packages(site, RTX, RTX_OF_ALL, python)

    def make(folder: Path) -> None:
        (folder / "rtx.tar.xz").write_bytes(_archive(_placed(site, prepared), _RTX_PRESET))

    keep(kept, what, make)
    return (kept / "rtx.tar.xz").read_bytes()


def _archive(contents: Iterable[tuple[Path, str]], preset: int = _PRESET) -> bytes:
    """A tar of the files by their names, compressed as xz; machine code is filtered before."""
    data = io.BytesIO()
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": 2**26}]
    with (
        lzma.LZMAFile(data, "wb", format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path, name in contents:
            tar.add(path, f"gpu-check/{name}", recursive=False, filter=_plain)
    return data.getvalue()


def _install(folder: Path, packages: Sequence[str], python: str) -> None:
    """Put the packages' wheels for `python` into `folder`, and say which Python they are for."""
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    options = ["--target", str(folder), "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    done = subprocess.run([*command, *options, *platforms, *packages], stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(f"pip has no {', '.join(packages)} for Python {python}: give another --python, or none")
    (folder / "python").write_text(python + "\n", encoding="utf-8")


def _contents(prepared: Prepared, sites: list[Path]) -> Iterator[tuple[Path, str]]:
    """Every file and its name in the pack, in a fixed order."""
    for name in RUNS:
        for path in _files(ROOT / name):
            yield path, str(path.relative_to(ROOT))
    for folder in (prepared.libraries, prepared.demo, *sites):
        yield from _placed(folder, prepared)


def _placed(folder: Path, prepared: Prepared) -> Iterator[tuple[Path, str]]:
    for path in _files(folder):
        yield path, f"build/gpu-check/{path.relative_to(prepared.folder)}"


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [p for p in found if "__pycache__" not in p.parts and p.suffix != ".made"]


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without times and owners: equal contents are equal bytes."""
    info.mtime = info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def _write(data: bytes, request: Request) -> Iterator[Path]:
    if request.part_bytes is None:
        if len(data) > MOST:
            sys.exit(
                f"the pack would be {len(data) / 2**20:.1f} MiB, more than {MOST / 2**20:.0f}: cut it, e.g. --parts 64M"
            )
        request.file.write_bytes(data)
        yield request.file
        return
    for old in request.file.parent.glob(f"{request.file.name}.[0-9][0-9]"):
        old.unlink()
    for index, start in enumerate(range(0, len(data), request.part_bytes)):
        part = request.file.with_name(f"{request.file.name}.{index:02}")
        part.write_bytes(data[start : start + request.part_bytes])
        yield part
