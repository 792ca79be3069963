"""Disks that are full or read-only, and names that cannot be: one sentence, exit code 1, and nothing half done."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from deepseek_trt.export.bundle.folder import MANIFEST_FILE

MEBI = 2**20
_MOUNT = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'


def can_mount() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", _MOUNT, "sh", "size=1m", "/mnt", "true"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="this user may not mount a tmpfs in a namespace of its own")


@pytest.fixture(scope="module")
def bundle(demo_checkpoint, bundle_of, tmp_path_factory) -> Path:
    return Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path_factory.mktemp("denied") / "bundle"))


def arguments(command: str, place: Path, checkpoint: Path, bundle: Path) -> tuple[object, ...]:
    """The command that writes to `place`; plugins and build write into a bundle of their own beside it."""
    own = place.parent / "own"
    if command in ("plugins", "build") and not own.exists():
        shutil.copytree(bundle, own)
    sizes = ("--max-batch-size", "2", "--max-input-len", "32", "--max-seq-len", "64")
    return {
        "export": ("export", checkpoint, place),
        "export by reference": ("export", checkpoint, place, "--by-reference"),
        "model-repository": ("model-repository", bundle, place, "--backend", "ort"),
        "validate": ("validate", bundle, "--backend", "ort", "--no-independent", "--report", place),
        "demo": ("demo", place),
        "plugins": ("plugins", own, "--sm", "86", "--no-fallback"),
        "build": ("build", own, "--sm", "86", *sizes),
    }[command]


QUICK = ("export", "model-repository")
SLOW = ("export by reference", "validate", "demo")
writing = pytest.mark.parametrize("command", [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)])


def check_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """One sentence, that says one of `words`."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert any(word in done.stderr for word in words), done.stderr


@needs_mount
@writing
@pytest.mark.parametrize("size", ["64k", "512k", pytest.param("5m", marks=pytest.mark.slow)])
def test_a_full_disk(program, tmp_path, demo_checkpoint, bundle, command, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    given = arguments(command, disk / "out", demo_checkpoint, bundle)
    done = program.run(*given, before=["unshare", "-m", "sh", "-c", _MOUNT, "sh", f"size={size}", disk])
    if (command, size) == ("validate", "5m"):  # a report has room there
        assert done.returncode == 0, done.stderr
    else:
        check_refused(done, "No space left", "GB free")


@needs_mount
@writing
def test_a_read_only_disk(program, tmp_path, demo_checkpoint, bundle, command):
    disk = tmp_path / "disk"
    disk.mkdir()
    given = arguments(command, disk / "out", demo_checkpoint, bundle)
    done = program.run(*given, before=["unshare", "-m", "sh", "-c", _MOUNT, "sh", "ro", disk])
    check_refused(done, "Read-only file system", "may write")


@pytest.mark.slow
@needs_mount
@pytest.mark.parametrize("room", [64, 256, 1024, None])
@pytest.mark.parametrize("command", ["plugins", "build"])
def test_a_bundle_on_such_a_disk(program, tmp_path, demo_checkpoint, bundle, command, room):
    """The bundle itself lies there and leaves so many KiB, or may not be written."""
    own = tmp_path / "own"
    shutil.copytree(bundle, own)
    script = (
        'mount -t tmpfs -o "$1" none "$2" && cp -r "$3/." "$2" && { [ "$1" != size=64m ] || mount -o remount,ro "$2"; }'
    )
    script += ' && shift 3 && exec "$@"'
    pages = sum(-(-path.stat().st_size // 4096) for path in bundle.rglob("*"))
    options = "size=64m" if room is None else f"size={4 * pages + room}k"
    given = arguments(command, tmp_path / "none", demo_checkpoint, bundle)
    done = program.run(*given, before=["unshare", "-m", "sh", "-c", script, "sh", options, own, bundle])
    assert done.returncode in (0, 1)
    if done.returncode:
        check_refused(
            done, "No space left", "Read-only", "NoSpaceLeft", "failed with exit code", "cannot build", "quota"
        )


@writing
def test_files_that_grow_too_large(program, tmp_path, demo_checkpoint, bundle, command):
    """As a quota: the room is there, but writing fails midway. Nothing is left, and the next run is whole."""
    limits = (MEBI, MEBI)
    given = arguments(command, tmp_path / "out", demo_checkpoint, bundle)
    done = program.run(*given, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    if command in ("validate", "export by reference"):  # their files are smaller
        assert done.returncode in (0, 1)
    else:
        check_refused(done, "File too large")
    assert not (tmp_path / "out" / MANIFEST_FILE).exists() or done.returncode == 0
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".partial")]


@pytest.mark.parametrize("command", [*QUICK, pytest.param("validate", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["a file", "below a file", "300 letters", "below 300 letters", "in /proc"])
def test_places_that_cannot_be(tmp_path, demo_checkpoint, bundle, command, place):
    """In this process: each is refused before work is done."""
    from click.testing import CliRunner

    from deepseek_trt.cli.main import main

    (tmp_path / "file").write_text("precious")
    out = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "out",
        "300 letters": tmp_path / ("n" * 300),
        "below 300 letters": tmp_path / ("n" * 300) / "out",
        "in /proc": Path("/proc/out"),
    }[place]
    result = CliRunner().invoke(main, [os.fspath(a) for a in arguments(command, out, demo_checkpoint, bundle)])
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (1, True), result.exception
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
