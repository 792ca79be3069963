"""The user's cache: whatever lies there, what is given is what was made, or it is made anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_trt.export.errors import BuildError
from deepseek_trt.export.trust import cache
from deepseek_trt.export.trust.cache import cache_folder, keep_bytes, kept_bytes, kept_file, own_cache

DATA = b"\x7fELF and more"


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch) -> Path:
    """Where caches lie, and a private folder beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(cache, "_said", set())
    monkeypatch.setattr(cache, "private_folder", lambda: tmp_path / "private")
    return tmp_path / "caches"


def made(times: list[int] | None = None) -> Path:
    """The file, and in `times` one number more each time that it had to be made."""

    def make(path: Path) -> None:
        path.write_bytes(DATA)
        if times is not None:
            times.append(len(times))

    return kept_file("cpu", "ops.so", make)


def zero(path: Path) -> None:
    path.write_bytes(bytes(len(DATA)))


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(DATA[:3]),
    "zeroed": zero,
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "a link": a_link,
    "a folder": a_folder,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "writable by others": lambda path: path.chmod(0o777),
    "without its hash": lambda path: path.with_name("ops.so.sha256").unlink(),
    "with another hash": lambda path: path.with_name("ops.so.sha256").write_text("0" * 64),
    "with a hash that is a folder": lambda path: a_folder(path.with_name("ops.so.sha256")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_again(base, damage):
    times: list[int] = []
    path = made(times)
    assert made(times) == path == base / "deepseek-trt" / "cpu" / "ops.so"
    assert times == [0]
    DAMAGES[damage](path)
    again = made(times)
    assert (again, again.read_bytes(), times) == (path, DATA, [0, 1])
    assert not again.is_symlink()
    assert made(times).read_bytes() == DATA
    assert times == [0, 1]
    assert again.stat().st_mode & 0o077 == 0


def a_linked_cache(base: Path) -> None:
    (base.parent / "theirs").mkdir()
    base.mkdir()
    (base / "deepseek-trt").symlink_to(base.parent / "theirs")


def an_open_cache(base: Path) -> None:
    (base / "deepseek-trt").mkdir(parents=True)
    (base / "deepseek-trt").chmod(0o777)


def an_open_part(base: Path) -> None:
    (base / "deepseek-trt" / "cpu").mkdir(parents=True)
    (base / "deepseek-trt" / "cpu").chmod(0o770)


def an_open_parent(base: Path) -> None:
    base.mkdir()
    base.chmod(0o777)


UNUSABLE = {
    "a link": (a_linked_cache, "is a link"),
    "open to others": (an_open_cache, "others can write"),
    "a part open to its group": (an_open_part, "others can write"),
    "in a folder open to others": (an_open_parent, "others can write"),
    "in a file": (lambda base: base.write_text(""), "cannot be made"),
    "a file": (lambda base: (base.mkdir(), (base / "deepseek-trt").write_text("")), "cannot be made"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_cache_of_others_is_not_used_and_that_is_said(base, caplog, what):
    prepare, words = UNUSABLE[what]
    prepare(base)
    for _ in range(2):
        assert made().read_bytes() == DATA
        assert base.parent / "private" in made().parents
    keep_bytes("cpu", "a", b"kernels")
    assert kept_bytes("cpu", "a") is None
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if words in line and str(cache_folder()) in line]) == 1, said


def test_a_file_that_somebody_planted_is_not_taken(base):
    folder = own_cache("cpu")
    (folder / "ops.so").write_bytes(b"planted")
    assert made().read_bytes() == DATA


def test_a_read_only_cache_gives_what_is_whole(base, monkeypatch, caplog):
    times: list[int] = []
    path = made(times)
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)
    assert (made(times), times) == (path, [0])
    path.write_bytes(b"")
    assert (made(times).read_bytes(), times) == (DATA, [0, 1])
    assert base not in made(times).parents
    assert "cannot be written" in caplog.text


def test_a_cache_is_private_whatever_the_umask(base):
    before = os.umask(0)
    try:
        made()
    finally:
        os.umask(before)
    for path in (base / "deepseek-trt", base / "deepseek-trt" / "cpu", base / "deepseek-trt" / "cpu" / "ops.so"):
        assert path.stat().st_mode & 0o022 == 0


def test_a_full_disk_is_said(base):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(BuildError, match="No space left on device"):
        kept_file("cpu", "ops.so", full)
    assert list((base / "deepseek-trt" / "cpu").iterdir()) == []


def test_bytes_are_kept(base):
    assert kept_bytes("tensorrt", "a") is None
    keep_bytes("tensorrt", "a", b"kernels")
    assert kept_bytes("tensorrt", "a") == b"kernels"
    (base / "deepseek-trt" / "tensorrt" / "a").write_bytes(b"planted")
    assert kept_bytes("tensorrt", "a") is None
