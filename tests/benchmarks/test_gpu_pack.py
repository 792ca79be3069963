"""scripts/gpu-check --pack: it runs on a Python that has torch, triton, numpy, onnx and cuda-bindings alone."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_check import pack  # noqa: E402  benchmarks are no package of the product
from gpu_check.__main__ import size_of  # noqa: E402

BARE = ("torch", "triton", "numpy", "onnx", "cuda-bindings")


def needed_by(names):
    """The distributions of these names, and all that they require here."""
    found, left = {}, list(names)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = metadata.distribution(name)
            required = map(Requirement, found[name].requires or ())
            left += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found.values()


def bare_python(folder: Path) -> Path:
    """A Python whose packages are links to those."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    link(needed_by(BARE), site)
    return folder / "bin" / "python"


def link(distributions, site: Path) -> None:
    for distribution in distributions:
        for top in {file.parts[0] for file in distribution.files} - {".."}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))


def bring_along(site: Path, names) -> None:
    """The packages of a pack for this very Python, which need no network so."""
    site.mkdir()
    link(map(metadata.distribution, names), site)
    (site / "python").write_text(f"{sys.version_info[0]}.{sys.version_info[1]}\n")


def rehearse(there: Path, python: Path, out: Path):
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    variables |= {"XDG_CACHE_HOME": str(out / "cache"), "HOME": str(out)}  # nothing that was compiled before
    command = [there / "gpu-check" / "scripts" / "gpu-check", "--rehearse", "--out", out]
    done = subprocess.run(
        command,
        env={**variables, "PYTHON": str(python), "OMP_NUM_THREADS": "1"},
        cwd=there,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "gpu-check.json").read_text())["rows"]


@pytest.mark.slow
def test_the_unpacked_pack_rehearses_on_a_bare_python(tmp_path):
    """Compiles the libraries where build/gpu-check does not hold them yet: many minutes."""
    file, there = tmp_path / "gpu-check.tar.xz", tmp_path / "there"
    command = [ROOT / "scripts" / "gpu-check", "--pack", file, "--python", "none"]
    subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, check=True)
    assert file.stat().st_size < pack.MOST
    with tarfile.open(file) as tar:
        tar.extractall(there, filter="data")
    prepared = there / "gpu-check" / "build" / "gpu-check"
    bring_along(prepared / "site", pack.PACKAGES)
    bring_along(prepared / "site-rtx", (*pack.RTX, *pack.RTX_OF_ALL))
    rows = rehearse(there, bare_python(tmp_path / "bare"), tmp_path / "out")
    parts = {
        part: {row["what"]: row for row in rows if row["part"] == part} for part in ("kernels", "speed", "engines")
    }
    for dtype in ("float32", "bfloat16", "bfloat16-int4", "bfloat16-fp8"):
        for target in ("cubin 90", "PTX 80"):
            assert parts["kernels"][f"demo {dtype} {target} all"]["result"] == "good"
    assert {row["result"] for row in parts["speed"].values()} == {"good"}
    too_large = [row for row in parts["kernels"].values() if "too large" in row["note"]]
    assert len(too_large) == 2 * 5 + 1  # a cubin and a PTX row of each published model's library: read, not launched
    assert all("'tensorrt'" in row["note"] for row in parts["engines"].values() if row["result"] == "not run")
    for dtype in ("float32", "bfloat16"):
        assert "plugin layers {'MlaPrefill': 5" in parts["engines"][f"demo {dtype} rtx build"]["note"]
        assert parts["engines"][f"demo {dtype} rtx tokens"]["result"] == "good"


def test_parts_are_the_whole(tmp_path):
    data, file = bytes(range(256)) * 10, tmp_path / "p.tar.xz"
    (tmp_path / "p.tar.xz.07").write_bytes(b"of a larger pack before")
    parts = list(pack._write(data, pack.Request(file, 1000, "3.12")))
    assert [part.name for part in parts] == ["p.tar.xz.00", "p.tar.xz.01", "p.tar.xz.02"]
    assert b"".join(part.read_bytes() for part in sorted(tmp_path.iterdir())) == data


def test_a_whole_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "MOST", 10)
    with pytest.raises(SystemExit, match="--parts 64M"):
        list(pack._write(bytes(11), pack.Request(tmp_path / "p", None, "3.12")))
    assert not list(tmp_path.iterdir())


def test_equal_contents_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(name.encode())
        os.utime(tmp_path / name / "file", (1, 1))
    contents = [(tmp_path / name / "file", name) for name in ("a", "b")]
    first = pack._archive(contents)
    os.utime(tmp_path / "a" / "file", (9, 9))
    assert pack._archive(contents) == first


def test_two_archives_after_each_other_unpack_as_one(tmp_path):
    """As TensorRT-RTX's, which is kept compressed, stands after the rest."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    both = b"".join(pack._archive([(tmp_path / name, name)]) for name in ("a", "b"))
    subprocess.run(["tar", "xJi", "-C", tmp_path], input=both, check=True)
    assert sorted(path.name for path in (tmp_path / "gpu-check").iterdir()) == ["a", "b"]


@pytest.mark.parametrize(("text", "size"), [("64M", 64 * 2**20), ("100", 100), ("1k", 1024), ("2G", 2**31)])
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "M", "0", "-1", "64MB", "1.5M"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        size_of(text)
