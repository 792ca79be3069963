"""C++ tables of the kernels, generated from what ahead-of-time compilation gave: images, rows, typed launches.

Each op has a namespace with one struct a kernel: `Constants` are the kernel's compile-time constants (model sizes and
tiles), `rows()` its binaries, and `launch` takes its arguments in Python order with their exact types. A kernel always
ends in two hidden 64-bit pointers (Triton's global and profile scratch), unused here and passed as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_trt.plugins.aot.records import POINTER_ALIGNMENT, Binary, KernelArg, Variant
from deepseek_trt.plugins.kernels import launches
from deepseek_trt.plugins.tensorrt.op_tables import ELEMENTS, GENERATED

# The linker's version script: the two entry points that TensorRT looks for, and nothing else.
EXPORTS_MAP = "{ global: setLoggerFinder; getCreators; local: *; };\n"
_CPP_TYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "float", "i32": "int32_t", "i8": "int8_t"}
_LAUNCH_CONSTANTS = {
    "kDecodeMaxPrograms": launches.DECODE_MAX_PROGRAMS,
    "kPrefillWorkspace": launches.PREFILL_WORKSPACE,
    "kDispatchChunk": launches.DISPATCH_CHUNK,
    "kLinearPrograms": launches.LINEAR_PROGRAMS,
    "kLinearMaxSplits": launches.LINEAR_MAX_SPLITS,
    "kLinearMinSteps": launches.LINEAR_MIN_STEPS,
    "kPointerAlignment": POINTER_ALIGNMENT,
}


@dataclass(frozen=True)
class KernelTable:
    """All binaries of one kernel of one op."""

    op: str
    kernel: str
    binaries: tuple[Binary, ...]

    @property
    def namespace(self) -> str:
        """The op's C++ namespace, e.g. mla_decode."""
        return snake_case(self.op)

    @property
    def struct(self) -> str:
        """The kernel's C++ name, e.g. MlaDecodeSplit."""
        return "".join(part.capitalize() for part in self.kernel.split("_"))

    @property
    def variant(self) -> Variant:
        """Any variant: all have the same arguments and names of constants."""
        return self.binaries[0].variant


def kernel_tables(binaries: Sequence[Binary]) -> tuple[KernelTable, ...]:
    """Binaries grouped by op and kernel, in a fixed order."""
    groups: dict[tuple[str, str], list[Binary]] = {}
    for binary in sorted(binaries, key=_order):
        groups.setdefault((binary.variant.op, binary.variant.kernel), []).append(binary)
    tables = tuple(KernelTable(op, kernel, tuple(rows)) for (op, kernel), rows in groups.items())
    for table in tables:
        _check_alike(table)
    return tables


def _order(binary: Binary) -> tuple[str, str, int, bool, int]:
    v = binary.variant
    return v.op, v.kernel, binary.sm, binary.is_ptx, v.max_tokens


def _check_alike(table: KernelTable) -> None:
    """One struct serves all variants of a kernel, so their arguments and names of constants must be the same."""
    interfaces = {(b.variant.args, tuple(name for name, _ in b.variant.constexprs)) for b in table.binaries}
    if len(interfaces) > 1:
        raise ValueError(
            f"the variants of {table.kernel} for {table.op} differ in arguments or constants: {interfaces}"
        )
    if len({_order(b) for b in table.binaries}) < len(table.binaries):
        raise ValueError(f"{table.kernel} for {table.op}: two binaries are for the same chip and tokens")


def kernels_header(tables: Sequence[KernelTable], dtype: str) -> str:
    """The header kernel_tables.h. `T` is the model's element type."""
    structs = "\n".join(_struct(table) for table in tables)
    constants = "\n".join(f"constexpr int64_t {name} = {value};" for name, value in _LAUNCH_CONSTANTS.items())
    return f"""{GENERATED}
#pragma once

#include "kernels.h"

namespace deepseek_trt {{

{constants}

using T = {ELEMENTS[dtype]};
constexpr int64_t kElementBytes = {4 if dtype == "float32" else 2};

{structs}
}}  // namespace deepseek_trt
"""


def _struct(table: KernelTable) -> str:
    args = table.variant.args
    parameters = ", ".join(f"Exact<{cpp_type(a)}> {a.name}" for a in args)
    addresses = ", ".join(f"&{a.name}.value" for a in args)
    checks = "".join(
        f'    check_aligned({table.struct}::kName, "{a.name}", {a.name}.value.address, kPointerAlignment);\n'
        for a in args
        if a.type.startswith("*")
    )
    return f"""namespace {table.namespace} {{
struct {table.struct} {{
    static constexpr char const* kName = "{table.kernel}";
    struct Constants {{
        int32_t {", ".join(name for name, _ in table.variant.constexprs)};
    }};
    struct Row {{
        Binary binary;
        Constants constants;
    }};
    static Rows<Row> rows();
}};
inline void launch(Loaded<{table.struct}> const& kernel, Grid grid, cudaStream_t stream, {parameters}) {{
{checks}    uint64_t global_scratch = 0, profile_scratch = 0;
    void* params[] = {{{addresses}, &global_scratch, &profile_scratch}};
    launch_params(kernel.binary(), kernel.kernel, grid, stream, params);
}}
}}  // namespace {table.namespace}
"""


def cpp_type(arg: KernelArg) -> str:
    """The C++ type that a kernel argument is passed as."""
    return f"Ptr<{_CPP_TYPES[arg.type[1:]]}>" if arg.type.startswith("*") else _CPP_TYPES[arg.type]


def tables_source(tables: Sequence[KernelTable], ops: Sequence[str]) -> str:
    """The source tables.cpp: rows of binaries, and the list of creators."""
    namespaces = [snake_case(op) for op in ops]
    creators = ", ".join(f"&{name}::creator()" for name in namespaces)
    declarations = "\n".join(
        f"namespace {name} {{ nvinfer1::IPluginCreatorInterface& creator(); }}" for name in namespaces
    )
    rows = "\n".join(_rows(table) for table in tables)
    images = "\n".join(f"extern unsigned char const {name}[];" for name in _images(tables))
    return f"""{GENERATED}
#include "kernel_tables.h"

#include <NvInferRuntime.h>

extern "C" {{
{images}
}}

namespace deepseek_trt {{

{declarations}

Rows<nvinfer1::IPluginCreatorInterface* const> creators() {{
    static nvinfer1::IPluginCreatorInterface* const all[] = {{{creators}}};
    return {{all, {len(namespaces)}}};
}}

{rows}
}}  // namespace deepseek_trt
"""


def _rows(table: KernelTable) -> str:
    name = f"{table.namespace}::{table.struct}"
    rows = "\n".join(f"        {_row(binary)}," for binary in table.binaries)
    return f"""Rows<{name}::Row> {name}::rows() {{
    static constexpr Row all[] = {{
{rows}
    }};
    return {{all, {len(table.binaries)}}};
}}
"""


def _row(binary: Binary) -> str:
    v = binary.variant
    is_ptx = "true" if binary.is_ptx else "false"
    overlaps = "true" if v.overlaps else "false"
    fields = f'{binary.sm}, {is_ptx}, {v.max_tokens}, "{binary.entry}", {binary.shared_bytes}, {binary.threads}'
    fields += f", {overlaps}"
    return f"{{{{{fields}, {image_symbol(binary)}}}, {{{', '.join(str(value) for _, value in v.constexprs)}}}}}"


def image_symbol(binary: Binary) -> str:
    """The symbol of the binary's image; equal images share one."""
    return f"deepseek_trt_image_{binary.sha256[:16]}"


def image_file(binary: Binary) -> str:
    """The file name of the binary's image."""
    return f"{image_symbol(binary)}.bin"


def _images(tables: Sequence[KernelTable]) -> dict[str, Binary]:
    return {image_symbol(b): b for table in tables for b in table.binaries}


def images_assembly(tables: Sequence[KernelTable]) -> str:
    """The assembly images.S, which takes in the image files. PTX is text that ends in a zero byte: all get one."""
    images = "".join(_image(symbol, binary) for symbol, binary in _images(tables).items())
    return f'{GENERATED}\n.section .rodata\n{images}.section .note.GNU-stack,"",@progbits\n'


def _image(symbol: str, binary: Binary) -> str:
    return f"""
.balign 64
.globl {symbol}
.hidden {symbol}
{symbol}:
.incbin "{image_file(binary)}"
.byte 0
"""


def library_id_source(library_id: str) -> str:
    """The source library_id.cpp."""
    return f"""{GENERATED}
#include "plugin.h"

namespace deepseek_trt {{
char const* const kLibraryId = "{library_id}";
}}
"""


def unity_source(names: Sequence[str]) -> str:
    """The source all.cpp: compiling TensorRT's headers once takes a third of the time of once a file."""
    return "\n".join([GENERATED, *(f'#include "{name}"' for name in names), ""])


def snake_case(name: str) -> str:
    """MlaDecode -> mla_decode."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
