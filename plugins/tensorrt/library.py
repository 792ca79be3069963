"""The plugin library: kernels and TensorRT plugins of one model and dtype in one shared object, built with no GPU.

`libdeepseek_trt_plugins.so` stands beside `libdeepseek_trt_plugins.json`, its manifest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.export.bundle.graph import DEFAULT_PAGE_SIZE
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BuildError
from deepseek_trt.export.writing.working import remove_leftover, working_folder
from deepseek_trt.plugins.aot.records import Binary
from deepseek_trt.plugins.cxx import Compiler, find_compiler
from deepseek_trt.plugins.tensorrt import codegen
from deepseek_trt.plugins.tensorrt.headers import Headers, find_headers
from deepseek_trt.plugins.tensorrt.manifest import (
    LIBRARY,
    MANIFEST,
    SCHEMA,
    Manifest,
    binary_row,
    read_manifest,
    version_of,
)
from deepseek_trt.plugins.tensorrt.op_tables import fixed_sizes
from deepseek_trt.plugins.tensorrt.sources import UNITS, ops_of, source_files

# Host code, run once a launch: small rather than fast. No symbols and no build id: equal inputs give equal bytes.
_FLAGS = ("-Os", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-I.")
_LINK_FLAGS = (
    "-Wl,--version-script=exports.map",
    "-Wl,--build-id=none",
    "-Wl,--no-undefined",
    "-s",
    "-ldl",
    "-pthread",
)


@dataclass(frozen=True)
class PluginLibrary:
    """A library with its manifest beside it, its sha256, and whether this call built it or found it up to date."""

    path: Path
    sha256: str
    built: bool


def build_library(
    binaries: Sequence[Binary],
    config: ModelConfig,
    dtype: str,
    out_dir: Path,
    *,
    page_size: int = DEFAULT_PAGE_SIZE,
    cxx: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PluginLibrary:
    """Compile `binaries` and the plugins that launch them into a library in `out_dir`.

    `page_size` is the one that the binaries were compiled for.
    `cxx` names a compiler to use instead of zig. Where `out_dir` holds a library made of the same inputs, nothing is
    compiled. Raises BuildError where headers or compiler are missing, or fail.
    """
    headers, compiler = find_headers(), find_compiler(cxx)
    tables = codegen.kernel_tables(binaries)
    files = source_files(tables, config, dtype, page_size)
    inputs = _inputs_sha256(files, headers, compiler)

    path = out_dir / LIBRARY
    current = _current_sha256(path, inputs)
    if current is not None:
        remove_leftover(path)
        say(f"{path} is up to date")
        return PluginLibrary(path, current, built=False)

    say(f"compiling {path} with {compiler.identity}{compiler.first_run_note}")
    files["library_id.cpp"] = codegen.library_id_source(inputs[:16]).encode()
    with working_folder(path, wait=True) as folder:
        made = _compile(folder, files, headers, compiler)
        manifest = _manifest(tables, fixed_sizes(config, page_size), dtype, headers, compiler, inputs, made)
        _publish(made, manifest, path)
    return PluginLibrary(path, manifest.sha256, built=True)


def _inputs_sha256(files: Mapping[str, bytes], headers: Headers, compiler: Compiler) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    digest.update("\0".join((headers.sha256, compiler.identity, *_FLAGS, *_LINK_FLAGS)).encode())
    return digest.hexdigest()


def _current_sha256(path: Path, inputs_sha256: str) -> str | None:
    """The sha256 of the library at `path` if it was made of these inputs; what is damaged is made again."""
    try:
        manifest = read_manifest(path)
    except BuildError:
        return None
    return manifest.sha256 if manifest.inputs_sha256 == inputs_sha256 else None


def _compile(folder: Path, files: Mapping[str, bytes], headers: Headers, compiler: Compiler) -> Path:
    """The library, compiled in `folder` from relative names, so that no path gets into it."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    prefix = f"-ffile-prefix-map={folder.resolve()}=."
    include = ("-isystem", str(headers.folder))
    compiler.run([*_FLAGS, prefix, *include, *UNITS, *_LINK_FLAGS, "-o", LIBRARY], folder)
    return folder / LIBRARY


def _manifest(
    tables: Sequence[codegen.KernelTable],
    sizes: Mapping[str, int],
    dtype: str,
    headers: Headers,
    compiler: Compiler,
    inputs_sha256: str,
    library: Path,
) -> Manifest:
    binaries, content = [b for table in tables for b in table.binaries], library.read_bytes()
    return Manifest(
        schema=SCHEMA,
        made_by=f"deepseek-trt plugins {version_of('deepseek-trt')}",
        sha256=hashlib.sha256(content).hexdigest(),
        library_id=inputs_sha256[:16],
        inputs_sha256=inputs_sha256,
        dtype=dtype,
        sizes=sizes,
        ops=ops_of(tables),
        sms=sorted({b.sm for b in binaries if not b.is_ptx}),
        ptx_sms=sorted({b.sm for b in binaries if b.is_ptx}),
        versions={
            "triton": version_of("triton"),
            "ptxas": version_of("nvidia-cuda-nvcc"),
            "compiler": compiler.identity,
            "nvinfer_headers": headers.version,
        },
        binaries=[binary_row(b, content.index(b.image)) for b in binaries],
    )


def _publish(made: Path, manifest: Manifest, path: Path) -> None:
    """Put library and manifest in place; a library beside another one's manifest must never pass for whole."""
    aside = made.with_name(MANIFEST)
    manifest.write(aside)
    path.with_name(MANIFEST).unlink(missing_ok=True)
    os.replace(made, path)
    os.replace(aside, path.with_name(MANIFEST))
