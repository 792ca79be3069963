"""The built library: what it exports and needs, that it is built once, and that damage is noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BuildError
from deepseek_trt.export.trust.cache import cache_folder
from deepseek_trt.plugins.aot.compile import compile_all
from deepseek_trt.plugins.aot.records import Binary
from deepseek_trt.plugins.cxx import Compiler, find_compiler
from deepseek_trt.plugins.fused import FUSED_OPS
from deepseek_trt.plugins.kernels import KERNEL_OPS
from deepseek_trt.plugins.narrow_ops import PLUGIN_OPS
from deepseek_trt.plugins.tensorrt.library import PluginLibrary, build_library
from deepseek_trt.plugins.tensorrt.manifest import MANIFEST, read_manifest

OF_OTHERS = {"MoeBiasedRouter", *(name for name in KERNEL_OPS if "Narrow" in name)}  # of other models
OF_V2 = {*KERNEL_OPS, *(op.name for op in FUSED_OPS)} - OF_OTHERS  # with plugins in its library

Uncompiled = Callable[..., list[Binary]]

SHT_DYNAMIC, SHT_DYNSYM, SHT_GNU_VERNEED = 6, 11, 0x6FFFFFFE
DT_NEEDED, DT_RPATH, DT_RUNPATH = 1, 15, 29


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of an ELF file: its type, its bytes, and those of the string table that belongs to it."""

    type: int
    data: bytes
    strings: bytes

    def name_at(self, offset: int) -> str:
        return self.strings[offset : self.strings.index(b"\0", offset)].decode()


def elf_sections(data: bytes) -> dict[int, Section]:
    """The sections of a 64-bit ELF file, by type."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    rows = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    contents = [data[row[4] : row[4] + row[5]] for row in rows]
    return {row[1]: Section(row[1], contents[i], contents[row[6]]) for i, row in enumerate(rows)}


def exported(data: bytes) -> set[str]:
    section = elf_sections(data)[SHT_DYNSYM]
    symbols = struct.iter_unpack("<IBBHQQ", section.data)
    return {section.name_at(name) for name, _, _, index, _, _ in symbols if name and index}


def dynamic(data: bytes, *tags: int) -> set[str]:
    section = elf_sections(data)[SHT_DYNAMIC]
    return {section.name_at(value) for tag, value in struct.iter_unpack("<QQ", section.data) if tag in tags}


def needed_versions(data: bytes) -> set[str]:
    """E.g. GLIBC_2.14: the symbol versions asked of other libraries."""
    section = elf_sections(data)[SHT_GNU_VERNEED]
    found, at = set(), 0
    while True:
        _, count, _, aux, following = struct.unpack_from("<HHIII", section.data, at)
        inner = at + aux
        for _ in range(count):
            _, _, _, name, step = struct.unpack_from("<IHHII", section.data, inner)
            found.add(section.name_at(name))
            inner += step
        if not following:
            return found
        at += following


def test_exports_two_symbols(plugin_library: PluginLibrary) -> None:
    assert exported(plugin_library.path.read_bytes()) == {"setLoggerFinder", "getCreators"}


def test_needs_glibc_alone(plugin_library: PluginLibrary) -> None:
    data = plugin_library.path.read_bytes()
    needed = dynamic(data, DT_NEEDED)
    assert needed <= {"libc.so.6", "libdl.so.2", "libpthread.so.0", "libm.so.6", "ld-linux-x86-64.so.2"}
    assert not dynamic(data, DT_RPATH, DT_RUNPATH)


def test_runs_on_old_glibc(plugin_library: PluginLibrary) -> None:
    versions = needed_versions(plugin_library.path.read_bytes())
    assert versions
    assert all(name.startswith("GLIBC_2.") and tuple(map(int, name[6:].split("."))) <= (2, 17) for name in versions)


def test_holds_no_path(plugin_library: PluginLibrary) -> None:
    data = plugin_library.path.read_bytes()
    assert str(plugin_library.path.parent).encode() not in data
    assert b".plugins-" not in data
    assert str(Path.home()).encode() + b"/" not in data


def test_manifest_describes_library(plugin_library: PluginLibrary, plugin_config: ModelConfig) -> None:
    manifest = read_manifest(plugin_library.path)
    assert manifest.sha256 == plugin_library.sha256 == hashlib.sha256(plugin_library.path.read_bytes()).hexdigest()
    assert manifest.library_id.encode() in plugin_library.path.read_bytes()
    assert (manifest.dtype, list(manifest.sms), list(manifest.ptx_sms)) == ("bfloat16", [86, 90], [80])
    assert list(manifest.ops) == [op.name for op in PLUGIN_OPS if op.name in OF_V2]
    assert manifest.sizes["H"] == plugin_config.num_attention_heads
    assert manifest.versions.keys() == {"triton", "ptxas", "compiler", "nvinfer_headers"}
    row = next(r for r in manifest.binaries if r["kernel"] == "moe_gate_up" and r["sm"] == 90 and r["max_tokens"])
    assert row["constants"]["INTER"] == plugin_config.moe_intermediate_size


def test_manifest_says_where_images_lie(plugin_library: PluginLibrary) -> None:
    """What a session launches itself it reads from there; plugins have their images by symbols."""
    data, manifest = plugin_library.path.read_bytes(), read_manifest(plugin_library.path)
    for row in manifest.binaries:
        image = data[row["offset"] : row["offset"] + row["bytes"]]
        assert hashlib.sha256(image).hexdigest() == row["sha256"]
    found = {(row["kernel"], row["sm"], row["is_ptx"]) for row in manifest.binaries if row["op"] == "Sampling"}
    assert found == {(k, *chip) for k in ("sample_adjust", "sample_pick") for chip in ((86, 0), (90, 0), (80, 1))}
    assert "Sampling" not in manifest.ops


def test_second_build_does_nothing(
    plugin_library: PluginLibrary, plugin_config: ModelConfig, uncompiled: Uncompiled
) -> None:
    said: list[str] = []
    folder = plugin_library.path.parent
    again = build_library(uncompiled(plugin_config), plugin_config, "bfloat16", folder, say=said.append)
    assert again == dataclasses.replace(plugin_library, built=False)
    assert said == [f"{plugin_library.path} is up to date"]


def test_build_is_reproducible(
    plugin_library: PluginLibrary, plugin_config: ModelConfig, uncompiled: Uncompiled, tmp_path: Path
) -> None:
    """Also over a damaged library, which is built again."""
    (tmp_path / plugin_library.path.name).write_bytes(b"half a library")
    shutil.copy(plugin_library.path.with_name(MANIFEST), tmp_path)
    said: list[str] = []
    binaries = uncompiled(plugin_config)[::-1]
    again = build_library(binaries, plugin_config, "bfloat16", tmp_path, say=said.append)
    assert (again.sha256, again.built) == (plugin_library.sha256, True)
    assert len(said) == 1
    assert said[0].startswith(f"compiling {again.path} with zig")
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, again.path.name]


def test_holds_compiled_kernels(plugin_config: ModelConfig, tmp_path: Path) -> None:
    binaries = compile_all(plugin_config, "float16", [86], fallback=False)
    built = build_library(binaries, plugin_config, "float16", tmp_path)
    data = built.path.read_bytes()
    assert all(binary.image in data for binary in binaries)
    assert {row["sha256"] for row in read_manifest(built.path).binaries} == {b.sha256 for b in binaries}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_other_compiler_and_float32_serve(plugin_config: ModelConfig, uncompiled: Uncompiled, tmp_path: Path) -> None:
    binaries = uncompiled(plugin_config, "float32", sms=(86,))
    built = build_library(binaries, plugin_config, "float32", tmp_path, cxx="g++")
    assert exported(built.path.read_bytes()) == {"setLoggerFinder", "getCreators"}
    assert read_manifest(built.path).versions["compiler"].startswith("g++")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "there is no compiler"),
        ("exit 1", "give --cxx a C\\+\\+ compiler"),
        ('test "$1" = --version && echo "cc 1.0" && exit 0; echo "no such header" >&2; exit 3', "3:\nno such header"),
    ],
)
def test_compiler_that_fails_is_said(
    plugin_config: ModelConfig, uncompiled: Uncompiled, tmp_path: Path, script: str | None, message: str
) -> None:
    cxx = tmp_path / "cxx"
    if script is not None:
        cxx.write_text(f"#!/bin/sh\n{script}\n")
        cxx.chmod(0o755)
    out = tmp_path / "out"
    with pytest.raises(BuildError, match=message):
        build_library(uncompiled(plugin_config), plugin_config, "bfloat16", out, cxx=str(cxx))
    assert not out.exists() or not list(out.iterdir())


def test_cold_compiler_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "a minute or two" in find_compiler().first_run_note
    (cache_folder() / find_compiler().cache).mkdir(parents=True)
    assert find_compiler().first_run_note == ""
    assert Compiler(("c++",), "c++ 1.0").first_run_note == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.unlink(), "is missing: run `deepseek-trt plugins` again"),
        (lambda p: p.write_bytes(b"x"), "is not the file that libdeepseek_trt_plugins.json describes"),
        (lambda p: p.with_name(MANIFEST).unlink(), "libdeepseek_trt_plugins.json is missing"),
        (lambda p: p.with_name(MANIFEST).write_text("{"), "is not JSON"),
        (lambda p: p.with_name(MANIFEST).write_text("{}"), "schema None is not 2"),
        (lambda p: _edit(p.with_name(MANIFEST), sms="86"), "sms is '86', where a list is needed"),
        (lambda p: _edit(p.with_name(MANIFEST), more=1), "more is a key that nothing here knows"),
        (lambda p: _edit(p.with_name(MANIFEST), schema=0), "schema 0 is not 2"),
    ],
)
def test_damage_is_said(
    plugin_library: PluginLibrary, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / plugin_library.path.name
    shutil.copy(plugin_library.path, path)
    shutil.copy(plugin_library.path.with_name(MANIFEST), tmp_path)
    change(path)
    with pytest.raises(BuildError, match=re.escape(message)):
        read_manifest(path)


def _edit(manifest: Path, **changes: object) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))
