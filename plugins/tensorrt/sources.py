"""All files that a plugin library is compiled from: those in csrc, and the generated ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.plugins.cxx import written_sources
from deepseek_trt.plugins.narrow_ops import PLUGIN_OPS
from deepseek_trt.plugins.tensorrt import codegen
from deepseek_trt.plugins.tensorrt.op_tables import OpTable, fixed_sizes, in_parts, ops_header

UNITS = ("all.cpp", "images.S")  # what the compiler is given; all.cpp takes in every other .cpp


def ops_of(tables: Sequence[codegen.KernelTable]) -> tuple[str, ...]:
    """The ops that kernels were compiled for, in the order of PLUGIN_OPS."""
    compiled = {table.op for table in tables}
    return tuple(op.name for op in PLUGIN_OPS if op.name in compiled)


def source_files(
    tables: Sequence[codegen.KernelTable], config: ModelConfig, dtype: str, page_size: int
) -> dict[str, bytes]:
    """Contents by file name. `library_id.cpp` is left out: the id follows from the others."""
    ops = ops_of(tables)
    launched = [table for table in tables if table.op in ops]  # by plugins; a session launches the others itself
    absent = {f"{codegen.snake_case(op.name)}.cpp" for op in PLUGIN_OPS if op.name not in ops}
    written = written_sources(Path(__file__).parent / "csrc")
    files = {name: content for name, content in written.items() if name not in absent}
    sizes = fixed_sizes(config, page_size)
    texts = {
        "op_tables.h": ops_header([OpTable(in_parts(op, sizes), dtype, sizes) for op in PLUGIN_OPS if op.name in ops]),
        "kernel_tables.h": codegen.kernels_header(launched, dtype),
        "tables.cpp": codegen.tables_source(launched, ops),
        "images.S": codegen.images_assembly(tables),
        "exports.map": codegen.EXPORTS_MAP,
        "all.cpp": codegen.unity_source([*(n for n in files if n.endswith(".cpp")), "tables.cpp", "library_id.cpp"]),
    }
    images = {codegen.image_file(b): b.image for table in tables for b in table.binaries}
    return files | {name: text.encode() for name, text in texts.items()} | images
