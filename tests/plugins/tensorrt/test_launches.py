"""What the plugins launch, by a driver that records: which binary, grid, block, shared memory, and every argument."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest

from deepseek_trt.export.bundle.graph import MOST_NEW_TOKENS
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.ops.spec import OpSpec
from deepseek_trt.plugins.aot.narrow_use import ALL_WHOLE, NarrowUse
from deepseek_trt.plugins.aot.records import Variant
from deepseek_trt.plugins.aot.variants import SAMPLING, variants_for
from deepseek_trt.plugins.kernels import launches
from deepseek_trt.plugins.kernels.launches import cdiv
from deepseek_trt.plugins.narrow_ops import NARROW_PLUGINS, PLUGIN_OPS
from deepseek_trt.plugins.tensorrt.library import PluginLibrary
from deepseek_trt.plugins.tensorrt.op_tables import OpTable, fixed_sizes

DTYPE = "bfloat16"
ELEMENT = 2
WORKSPACE = 0x900000000  # drive.cpp's
STREAM = 0x57
SCALE = 0.125
RESIDENT = 264  # recording_driver.cpp: 132 multiprocessors, two blocks each
FIELDS = {
    "MlaPrefill": ["scale:f:1:0.125"],
    "MlaDecode": ["scale:f:1:0.125", "kv_lora_rank:i:1:32"],
    "MoeRouter": [
        "top_k:i:1:3",
        "n_group:i:1:4",
        "topk_group:i:1:2",
        "norm_topk_prob:i:1:0",
        "routed_scaling_factor:f:1:16.0",
    ],
    "MoeBiasedRouter": [
        "top_k:i:1:3",
        "n_group:i:1:4",
        "topk_group:i:1:2",
        "norm_topk_prob:i:1:1",
        "routed_scaling_factor:f:1:2.5",
    ],
    "MoeExperts": ["activation:s:4:silu"],
}
FIELDS["MlaQuery"] = ["eps:f:1:0.125"]
FIELDS["MlaValue"] = []
FIELDS["MoeLayer"] = [*FIELDS["MoeRouter"], "biased:i:1:0"]
V3_FIELDS = {**FIELDS, "MoeLayer": [*FIELDS["MoeBiasedRouter"], "biased:i:1:1"]}
SPECS = {op.name: op for op in PLUGIN_OPS if op.name in FIELDS}
OF_V2 = [name for name in SPECS if name != "MoeBiasedRouter"]  # those in plugin_library
TYPES = {"float32": "f32", "bfloat16": "bf16", "int32": "i32", "int8": "i8", "float16": "f16"}

Drive = Callable[..., list[str]]
Sizes = Mapping[str, int]


def address_of(op: OpSpec, name: str) -> int:
    """A made-up address for each tensor; a pool that is given lies where the one that is taken does."""
    names = [t.name for t in op.inputs + op.outputs]
    return 0x1000000 * (1 + names.index(name.replace("present_", "past_")))


def tensors(op: OpSpec, config: ModelConfig, sizes: Sizes) -> list[str]:
    """The commands that describe the op's tensors to drive.cpp."""
    table = OpTable(op, DTYPE, {**fixed_sizes(config), **sizes})
    lines = []
    for tensor in table.tensors:
        side = "in" if tensor in op.inputs else "out"
        dims = [str(table.size_of(d)) for d in tensor.dims]
        lines.append(f"tensor {side} {TYPES[table.dtype_of(tensor)]} {address_of(op, tensor.name):x} {' '.join(dims)}")
    return lines


@dataclass(frozen=True)
class Chip:
    """Which SM plays, and which binaries it must run."""

    sm: int
    tiles: int
    label: str


CHIPS = [
    Chip(86, 86, "sm86"),
    Chip(89, 86, "sm86"),  # compiled code for 8.6 runs on later 8.x
    Chip(90, 90, "sm90"),
    Chip(100, 86, "ptx80"),  # from 9.0 on, compiled code runs on its own chip only
]


class Expected:
    """The launches of one op on one chip, written down in order."""

    def __init__(self, op: OpSpec, config: ModelConfig, chip: Chip, narrow: NarrowUse = ALL_WHOLE) -> None:
        self.op = op
        self.chip = chip
        self.variants = [v for v in variants_for(config, DTYPE, chip.tiles, narrow=narrow) if v.op == op.name]
        self.lines: list[str] = []
        self._next = WORKSPACE

    def variant(self, kernel: str, tokens: int = 1) -> Variant:
        fits = [v for v in self.variants if v.kernel == kernel and (not v.max_tokens or tokens <= v.max_tokens)]
        return min(fits, key=lambda v: v.max_tokens or math.inf)

    def tile(self, kernel: str, name: str, tokens: int = 1) -> int:
        return dict(self.variant(kernel, tokens).constexprs)[name]

    def take(self, size: int) -> int:
        """The address of the next `size` bytes of the workspace."""
        taken, self._next = self._next, self._next + cdiv(size, 256) * 256
        return taken

    @property
    def workspace(self) -> int:
        return self._next - WORKSPACE

    def launch(self, kernel: str, grid: Sequence[int], args: Sequence[int | float | str], tokens: int = 1) -> None:
        """Strings among args name the op's tensors."""
        v = self.variant(kernel, tokens)
        shared = 60000 if kernel == "mla_decode_split" else 1000 + v.max_tokens
        params = [self._param(a, arg.type) for a, arg in zip(args, v.args, strict=True)] + ["8:0", "8:0"]
        image = f"{self.op.name}/{kernel}/{self.chip.label}/{v.max_tokens}"
        blocks = " ".join(map(str, [*grid, 1, 1][:3]))
        how = f"{blocks} | {32 * v.num_warps} 1 1 | {shared} | {STREAM:#x}"
        early = " | attribute 6 = 1" if v.overlaps else ""  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self.lines.append(f"launch {kernel} | {image} | {how} | {' '.join(params)}{early}")

    def _param(self, value: int | float | str, kind: str) -> str:
        if isinstance(value, str):
            value = address_of(self.op, value)
        if kind.startswith("*"):
            return f"8:{value:x}"
        (bits,) = struct.unpack("I", struct.pack("f" if kind == "fp32" else "i", value))
        return f"4:{bits:x}"


def narrow_write(e: Expected, n: Sizes) -> None:
    grid = [cdiv(n["S"], e.tile("latent_narrow", "BLOCK_S")), n["B"]]
    tokens = ["present_latent", "present_rope", "latent", "page_table", "past_lengths", "sequence_lengths"]
    e.launch("latent_narrow", grid, [*tokens, n["S"], n["M"], n["P"]])


def decode(e: Expected, n: Sizes) -> None:
    heads, rank, capacity = n["H"], n["L"], n["M"] * n["page"]
    queries, kernel, cached = n["S"] * heads, "mla_decode_split", ["latent", "present_latent"]
    if "present_rope" in [t.name for t in e.op.outputs]:
        kernel, cached = "mla_decode_split_narrow", ["present_latent", "present_rope"]
        narrow_write(e, n)
    tiles = cdiv(queries, e.tile(kernel, "BLOCK_H"))
    parts = launches.decode_parts(launches.decode_programs(RESIDENT, tiles), n["B"])
    partial = e.take((parts + n["B"]) * queries * rank * 4)
    lse = e.take((parts + n["B"]) * queries * 4)
    lengths = ["past_lengths", "sequence_lengths"]
    tokens = ["query", *cached, "page_table", *lengths]
    counts = [n["B"], n["S"], parts]
    split = [*tokens, partial, lse, "attended", SCALE * math.log2(math.e), *counts, n["M"], n["P"]]
    e.launch(kernel, [tiles, parts + n["B"]], split)
    columns = cdiv(rank, e.tile("mla_decode_combine", "BLOCK_D"))
    args = [partial, lse, *lengths, "attended", *counts, capacity]
    e.launch("mla_decode_combine", [n["B"] * queries, columns], args)


def prefill(e: Expected, n: Sizes) -> None:
    capacity, paging = n["M"] * n["page"], [n["M"], n["P"]]
    chunk = launches.prefill_chunk_heads(n["B"], capacity, n["H"], (n["N"] + n["V"]) * ELEMENT)
    k_nope = e.take(n["B"] * chunk * capacity * n["N"] * ELEMENT)
    value = e.take(n["B"] * chunk * capacity * n["V"] * ELEMENT)
    k_rope = e.take(n["B"] * capacity * n["R"] * ELEMENT)
    lengths = ["page_table", "past_lengths", "sequence_lengths"]
    kernel, pools = "mla_prefill_expand", ["present_latent"]
    if "present_rope" in [t.name for t in e.op.outputs]:
        kernel, pools = "mla_prefill_expand_narrow", ["present_latent", "present_rope"]
        narrow_write(e, n)
    else:
        rows = cdiv(n["S"], e.tile("latent_write", "BLOCK_S"))
        e.launch("latent_write", [rows, n["B"]], ["present_latent", "latent", *lengths, n["S"], *paging])
    for part in launches.head_chunks(n["H"], chunk):
        expanded = [k_nope, value, k_rope]
        expand = [*pools, *lengths, "w_uk", "w_uv", *expanded, part.first, capacity, *paging, n["S"]]
        tokens = cdiv(capacity, e.tile(kernel, "BLOCK_T"))
        e.launch(kernel, [tokens, part.count, n["B"]], expand)
        attend = ["query", *lengths[1:], *expanded, "attended", SCALE * math.log2(math.e)]
        steps = cdiv(n["S"], e.tile("mla_prefill_attend", "BLOCK_M"))
        e.launch("mla_prefill_attend", [steps, part.count, n["B"]], [*attend, part.first, n["S"], capacity])


def query(e: Expected, n: Sizes) -> None:
    grid = [n["H"] * cdiv(n["L"], e.tile("mla_query", "BLOCK_L", n["T"])) + 1]
    grid.append(cdiv(n["T"], e.tile("mla_query", "BLOCK_T", n["T"])))
    args = ["q", "kv", "cos", "sin", "latent_norm", "w_uk", "query", "latent", n["T"], SCALE]
    e.launch("mla_query", grid, args, n["T"])


def value(e: Expected, n: Sizes) -> None:
    tokens = n["B"] * n["S"]
    grid = [n["H"] * cdiv(n["V"], e.tile("mla_value", "BLOCK_V", tokens))]
    grid.append(cdiv(tokens, e.tile("mla_value", "BLOCK_T", tokens)))
    e.launch("mla_value", grid, ["attended", "w_uv", "values", tokens], tokens)


def router(e: Expected, n: Sizes) -> None:
    grid = [cdiv(n["T"], e.tile("moe_router", "BLOCK_T"))]
    e.launch("moe_router", grid, ["logits", "weights", "ids", n["T"], 16.0])


def biased_router(e: Expected, n: Sizes) -> None:
    grid = [cdiv(n["T"], e.tile("moe_biased_router", "BLOCK_T"))]
    e.launch("moe_biased_router", grid, ["logits", "correction_bias", "weights", "ids", n["T"], 2.5])


def experts(e: Expected, n: Sizes, gate_up: str = "moe_gate_up", down: str = "moe_down") -> None:
    def stack(name: str) -> list[str]:
        return [name, f"{name}_scale"] if down != "moe_down" else [name]

    T, slots = n["T"], n["T"] * n["K"]
    block = e.tile(gate_up, "BLOCK_M", T)
    chunks, blocks = cdiv(slots, launches.DISPATCH_CHUNK), launches.dispatch_blocks(slots, n["E"], block)
    counts, offsets = e.take(chunks * n["E"] * 4), e.take(chunks * n["E"] * 4)
    block_expert, sorted_slots = e.take(blocks * 4), e.take(blocks * block * 4)
    inner, outer = e.take(slots * n["I"] * ELEMENT), e.take(slots * n["hidden"] * ELEMENT)
    count_grid = [cdiv(blocks * block, launches.DISPATCH_CHUNK)]
    e.launch("moe_dispatch_count", count_grid, ["ids", counts, sorted_slots, slots, blocks * block])
    e.launch("moe_dispatch_offsets", [1], [counts, offsets, block_expert, chunks, blocks, block])
    e.launch("moe_dispatch_scatter", [chunks], ["ids", offsets, sorted_slots, slots])
    columns = cdiv(n["I"], e.tile(gate_up, "BLOCK_N", T))
    order = [sorted_slots, block_expert, slots]
    e.launch(gate_up, [blocks * columns], ["hidden", *stack("gate_proj"), *stack("up_proj"), inner, *order], T)
    columns = cdiv(n["hidden"], e.tile(down, "BLOCK_N", T))
    e.launch(down, [blocks * columns], [inner, *stack("down_proj"), outer, *order], T)
    grid = [cdiv(T, e.tile("moe_combine", "BLOCK_T")), cdiv(n["hidden"], e.tile("moe_combine", "BLOCK_D"))]
    e.launch("moe_combine", grid, [outer, "weights", "output", T])


def layer(e: Expected, n: Sizes) -> None:
    """Five launches, and three more where one program cannot sort all tokens."""
    T, shared = n["T"], n["SI"] // n["I"]
    slots, experts_ = T * (n["K"] + shared), n["E"] + shared
    block = e.tile("moe_layer_gate_up", "BLOCK_M", T)
    splits, sorts = e.tile("moe_choose", "SPLITS", T), e.tile("moe_choose", "SORT", T)
    chunks, blocks = cdiv(slots, launches.DISPATCH_CHUNK), launches.dispatch_blocks(slots, experts_, block)
    partial, weights, ids = e.take(splits * T * n["E"] * 4), e.take(slots * 4), e.take(slots * 4)
    counts, offsets = e.take(chunks * experts_ * 4), e.take(chunks * experts_ * 4)
    block_expert, sorted_slots = e.take(blocks * 4), e.take(blocks * block * 4)
    inner, outer = e.take(slots * n["I"] * ELEMENT), e.take(slots * n["hidden"] * ELEMENT)
    grid = [cdiv(n["E"], e.tile("moe_logits", "BLOCK_X", T)), splits, cdiv(T, e.tile("moe_logits", "BLOCK_T", T))]
    e.launch("moe_logits", grid, ["hidden", "router_weight", partial, T], T)
    scale = 2.5 if e.tile("moe_choose", "BIASED") else 16.0
    order = [sorted_slots, block_expert]
    args = [partial, "correction_bias", weights, ids, *order, T, blocks, block, scale]
    e.launch("moe_choose", [cdiv(T, e.tile("moe_choose", "BLOCK_T", T))], args, T)
    if not sorts:
        count_grid = [cdiv(blocks * block, launches.DISPATCH_CHUNK)]
        e.launch("moe_dispatch_count", count_grid, [ids, counts, sorted_slots, slots, blocks * block])
        e.launch("moe_dispatch_offsets", [1], [counts, offsets, block_expert, chunks, blocks, block])
        e.launch("moe_dispatch_scatter", [chunks], [ids, offsets, sorted_slots, slots])
    columns = cdiv(n["I"], e.tile("moe_layer_gate_up", "BLOCK_N", T))
    stacks = ["gate_proj", "up_proj", "shared_gate", "shared_up"]
    e.launch("moe_layer_gate_up", [blocks * columns], ["hidden", *stacks, inner, *order, slots], T)
    columns = cdiv(n["hidden"], e.tile("moe_layer_down", "BLOCK_N", T))
    e.launch("moe_layer_down", [blocks * columns], [inner, "down_proj", "shared_down", outer, *order, slots], T)
    grid = [cdiv(T, e.tile("moe_combine", "BLOCK_T")), cdiv(n["hidden"], e.tile("moe_combine", "BLOCK_D"))]
    e.launch("moe_combine", grid, [outer, weights, "output", T])


WRITERS = {
    "MlaDecode": decode,
    "MlaPrefill": prefill,
    "MlaQuery": query,
    "MlaValue": value,
    "MoeRouter": router,
    "MoeBiasedRouter": biased_router,
    "MoeExperts": experts,
    "MoeLayer": layer,
}
CASES: list[tuple[str, Sizes]] = [
    ("MlaDecode", {"B": 1, "S": 1, "P": 40, "page": 64, "M": 4}),
    ("MlaDecode", {"B": 1, "S": 1, "P": 5000, "page": 64, "M": 2000}),
    ("MlaDecode", {"B": 8, "S": 1, "P": 300, "page": 64, "M": 32}),
    ("MlaDecode", {"B": 512, "S": 1, "P": 2000, "page": 64, "M": 3}),
    ("MlaDecode", {"B": 1, "S": 8, "P": 5000, "page": 64, "M": 2000}),
    ("MlaDecode", {"B": 3, "S": 5, "P": 300, "page": 64, "M": 32}),
    ("MlaPrefill", {"B": 1, "S": 1, "P": 9, "page": 64, "M": 1}),
    ("MlaPrefill", {"B": 8, "S": 300, "P": 300, "page": 64, "M": 32}),
    ("MlaPrefill", {"B": 8, "S": 77, "P": 300, "page": 64, "M": 10000}),  # heads in chunks
    ("MlaQuery", {"B": 1, "S": 1, "T": 1}),
    ("MlaQuery", {"B": 2, "S": 8, "T": 16}),
    ("MlaQuery", {"B": 17, "S": 1, "T": 17}),
    ("MlaQuery", {"B": 300, "S": 8, "T": 2400}),
    ("MlaValue", {"B": 1, "S": 1}),
    ("MlaValue", {"B": 2, "S": 8}),
    ("MlaValue", {"B": 300, "S": 8}),
    ("MoeRouter", {"T": 1}),
    ("MoeRouter", {"T": 257}),
    ("MoeExperts", {"T": 1}),
    ("MoeExperts", {"T": 8}),
    ("MoeExperts", {"T": 85}),
    ("MoeExperts", {"T": 86}),  # 16 rows an expert, and the next bucket
    ("MoeExperts", {"T": 5000}),
    ("MoeLayer", {"T": 1}),
    ("MoeLayer", {"T": 16}),
    ("MoeLayer", {"T": 64}),
    ("MoeLayer", {"T": 65}),  # more than one program sorts
    ("MoeLayer", {"T": 86}),
    ("MoeLayer", {"T": 5000}),
]


def expected(op: OpSpec, config: ModelConfig, chip: Chip, sizes: Sizes) -> Expected:
    written = Expected(op, config, chip)
    WRITERS[op.name](written, {**fixed_sizes(config), **sizes})
    return written


def create(op: str, fields: Mapping[str, list[str]] = FIELDS) -> str:
    """As an engine's plugin: one of the builder's launches nothing."""
    return " ".join(["create", op, "engine", *fields[op]])


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm{chip.sm}")
def test_launches(drive: Drive, plugin_config: ModelConfig, chip: Chip) -> None:
    """All cases in one process: each plugin is attached anew, but the kernels of an op are loaded once."""
    commands: list[str] = []
    for name, sizes in CASES:
        shapes = tensors(SPECS[name], plugin_config, sizes)
        commands += ["clear", create(name), *shapes, "workspace", "attach", "reshape", "enqueue"]
    output = drive(commands, sm=chip.sm)

    cases = [expected(SPECS[name], plugin_config, chip, sizes) for name, sizes in CASES]
    assert [line for line in output if line.startswith("launch ")] == [line for case in cases for line in case.lines]
    workspaces = [int(line.split()[1]) for line in output if line.startswith("workspace ")]
    for (name, sizes), case, size in zip(CASES, cases, workspaces, strict=True):
        assert case.workspace <= size, (name, sizes)
    assert not [line for line in output if line.startswith("log ")]
    loads = [line for line in output if line.startswith("load ")]
    assert (
        len(loads)
        == len(set(loads))
        == len([v for v in variants_for(plugin_config, DTYPE, chip.tiles) if v.op != SAMPLING])
    )


def test_launches_of_a_step(drive: Drive, plugin_config: ModelConfig, launches_a_step: dict[str, int]) -> None:
    """What test_kernel_count.py counts with."""
    sizes = {"B": 1, "S": 1, "P": 40, "page": 64, "M": 4, "T": 1}
    for name, count in launches_a_step.items():
        shapes = tensors(SPECS[name], plugin_config, sizes)
        output = drive([create(name), *shapes, "attach", "reshape", "enqueue"])
        assert sum(line.startswith("launch ") for line in output) == count, name


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm{chip.sm}")
def test_launches_of_v3(drive: Drive, v3_config: ModelConfig, v3_library: PluginLibrary, chip: Chip) -> None:
    """Its router; and its experts in parts, which lie as one stack and are taken for one."""
    cases: list[tuple[str, Sizes]] = [("MoeBiasedRouter", {"T": 1}), ("MoeBiasedRouter", {"T": 257})]
    cases += [(name, {"T": tokens}) for name in ("MoeExperts", "MoeLayer") for tokens in (8, 86)]
    commands: list[str] = []
    for name, sizes in cases:
        commands += ["clear", create(name, V3_FIELDS), *in_three_parts(name, tensors(SPECS[name], v3_config, sizes))]
        commands += ["types", "configure", "attach", "reshape", "enqueue"]
    output = drive(commands, sm=chip.sm, library=v3_library.path)
    lines = [line for name, sizes in cases for line in expected(SPECS[name], v3_config, chip, sizes).lines]
    assert [line for line in output if line.startswith("launch ")] == lines
    assert not [line for line in output if line.startswith("log ")]


@pytest.mark.parametrize(("sm", "blocks"), [(90, "2"), (86, "1")])
def test_decode_fills_the_chip_whatever_the_capacity(
    drive: Drive, plugin_config: ModelConfig, sm: int, blocks: str
) -> None:
    """As many blocks as run at a time; kernels/test_mla_schedule.py says how evenly they share the tokens."""
    grids = []
    for pages in (17, 513):
        shapes = tensors(SPECS["MlaDecode"], plugin_config, {"B": 8, "S": 1, "P": 5000, "page": 64, "M": pages})
        output = drive([create("MlaDecode"), *shapes, "attach", "reshape", "enqueue"], sm=sm, FAKE_BLOCKS=blocks)
        grids += [line.split(" | ")[2] for line in output if line.startswith("launch mla_decode_split ")]
    assert grids == [f"1 {132 * int(blocks)} 1"] * 2


def in_three_parts(name: str, shapes: list[str]) -> list[str]:
    """The three stacks of 16 experts in parts of 6, 6 and 4, one after the other in memory."""
    if name == "MoeBiasedRouter":
        return shapes
    lines = shapes[:3]
    for shape in shapes[3:6]:
        tensor, side, kind, address, _, *rows = shape.split()
        part = 6 * math.prod(map(int, rows)) * ELEMENT
        for i, count in enumerate((6, 6, 4)):
            lines.append(" ".join([tensor, side, kind, f"{int(address, 16) + i * part:x}", str(count), *rows]))
    return lines + shapes[6:]


def test_parts_must_lie_one_after_the_other(drive: Drive, v3_config: ModelConfig, v3_library: PluginLibrary) -> None:
    shapes = in_three_parts("MoeExperts", tensors(SPECS["MoeExperts"], v3_config, {"T": 8}))
    commands = [create("MoeExperts"), *shapes, "attach", "reshape", "enqueue"]
    shapes[5] = shapes[5].replace(shapes[5].split()[3], "abc000")
    moved = [create("MoeExperts"), *shapes, "attach", "reshape", "enqueue"]
    assert drive(commands, library=v3_library.path)[-1] == "enqueue 0"
    output = drive(moved, library=v3_library.path)
    assert "input gate_proj_part2 must lie right after input gate_proj_part1, 30720 bytes on" in output[-2]
    assert output[-1] == "enqueue 1"


def test_whole_stacks_do_not_fit_a_library_for_parts(
    drive: Drive, v3_config: ModelConfig, v3_library: PluginLibrary
) -> None:
    shapes = tensors(SPECS["MoeExperts"], v3_config, {"T": 8})
    output = drive([create("MoeExperts"), *shapes, "types"], library=v3_library.path)
    assert "takes 12 inputs and gives 1 outputs" in output[-2]


def test_large_shared_memory_is_asked_for(drive: Drive, plugin_config: ModelConfig) -> None:
    output = drive([create("MlaDecode"), "attach"])
    assert [line for line in output if line.startswith("attribute ")] == [
        "attribute MlaDecode/mla_decode_split/sm86/0 8 = 60000 on device 0"
    ]


def test_all_loading_is_over_before_enqueue(drive: Drive, plugin_config: ModelConfig) -> None:
    shapes = tensors(SPECS["MoeExperts"], plugin_config, {"T": 8})
    output = drive([create("MoeExperts"), *shapes, "attach", "reshape", "enqueue", "enqueue"])
    loads = [line.split()[1] for line in output if line.startswith("load ")]
    assert [line.split()[1] for line in output if line.startswith("ready ")] == loads
    after = output[output.index("reshape 0") + 1 :]
    runs = [line for line in after if line.startswith("launch ")]
    assert after == [*runs[:6], "enqueue 0", *runs[6:], "enqueue 0"]
    assert runs[:6] == runs[6:]


@pytest.mark.parametrize("name", OF_V2)
def test_workspace_covers_all_smaller_sizes(drive: Drive, plugin_config: ModelConfig, name: str) -> None:
    """The plan's workspace is sized once, for the largest shapes; no smaller shape may need more."""
    steps = MOST_NEW_TOKENS if name == "MlaDecode" else 70
    op, largest = SPECS[name], {"B": 9, "S": steps, "P": 99, "page": 64, "M": 7000, "T": 700}
    smaller = [{k: max(1, v * part // 100) for k, v in largest.items()} for part in (1, 2, 5, 11, 12, 13, 34, 67, 100)]
    smaller += [{**largest, "B": 1}, {**largest, "M": 1}, {**largest, "B": 2, "M": 6000}]
    output = drive([create(name), *tensors(op, plugin_config, largest), "workspace"])
    size = int(output[-1].split()[1])
    needs = [expected(op, plugin_config, chip, s).workspace for s in smaller for chip in CHIPS]
    assert max(needs) <= size
    assert size <= 1.3 * max(needs) + 1024


def test_kernels_are_loaded_once_a_device(drive: Drive) -> None:
    router, second = create("MoeRouter"), ["set FAKE_DEVICE 1", "set FAKE_SM 90"]
    output = drive([router, "attach", "attach", *second, "attach", router, "attach", "set FAKE_DEVICE 0", "attach"])
    assert [line for line in output if not line.startswith("ready ")] == [
        "create ok",
        "load MoeRouter/moe_router/sm86/0",
        *["attach 0"] * 2,
        "load MoeRouter/moe_router/sm90/0",
        "attach 0",
        "create ok",
        *["attach 0"] * 2,
    ]


def test_missing_driver_is_said(drive: Drive, plugin_config: ModelConfig) -> None:
    shapes = tensors(SPECS["MoeRouter"], plugin_config, {"T": 8})
    output = drive([create("MoeRouter"), *shapes, "attach", "reshape", "enqueue"], driver=False)
    assert output[1] == "attach 0"  # TensorRT attaches while it builds without a GPU
    assert output[2].startswith("log 1 MoeRouter: there is no NVIDIA driver (libcuda.so.1: cannot open")
    assert output[3] == "reshape 1"


@pytest.mark.parametrize(
    ("fakes", "sm", "message"),
    [
        (
            {},
            75,
            "has no moe_router for this GPU (sm_75, 232448 bytes of shared memory a block); run `deepseek-trt plugins",
        ),
        ({"FAKE_SHARED": "900"}, 86, "has no moe_router for this GPU (sm_86, 900 bytes"),
        (
            {"FAKE_BAD_IMAGE": "moe_router", "FAKE_CUDA": "12040"},
            86,
            "CUDA driver: cuLibraryLoadData failed: as the test asked (209); no code for moe_router loads on this GPU "
            "(sm_86): the driver knows CUDA 12.4, the binaries need driver 580 (CUDA 13) or newer",
        ),
        ({"FAKE_NO_CONTEXT": "1"}, 86, "CUDA driver: cuCtxGetDevice failed: as the test asked (201)"),
    ],
)
def test_unusable_chips_are_said(
    drive: Drive, plugin_config: ModelConfig, fakes: dict[str, str], sm: int, message: str
) -> None:
    shapes = tensors(SPECS["MoeRouter"], plugin_config, {"T": 8})
    output = drive([create("MoeRouter"), *shapes, "attach", "reshape"], sm=sm, **fakes)
    assert output[-1] == "reshape 1"
    assert message in output[-2]


def test_ptx_steps_in_where_compiled_code_needs_too_much_shared_memory(
    drive: Drive, plugin_config: ModelConfig
) -> None:
    output = drive([create("MoeExperts"), "attach"], sm=90, FAKE_SHARED="1085")
    loads = {line.split("/")[2] for line in output if line.startswith("load ")}
    assert loads == {"ptx80"}


def test_ptx_steps_in_where_binaries_do_not_load(drive: Drive, plugin_config: ModelConfig) -> None:
    """An older driver refuses binaries of a newer CUDA, but compiles the PTX; it is said once an op."""
    shapes = tensors(SPECS["MoeExperts"], plugin_config, {"T": 8})
    commands = [create("MoeExperts"), *shapes, "attach", "reshape", "enqueue", "attach", "reshape", "enqueue"]
    output = drive(commands, sm=86, FAKE_BAD_IMAGE="sm86", FAKE_CUDA="12040")
    launched = {line.split(" | ")[1].split("/")[2] for line in output if line.startswith("launch ")}
    assert launched == {"ptx80"}
    (said,) = [line for line in output if line.startswith("log ")]
    assert said == (
        "log 2 deepseek-trt: MoeExperts runs PTX for SM 80 on this GPU (sm_86), slower than it could: the better code "
        "does not load (CUDA driver: cuLibraryLoadData failed: as the test asked (209)); the driver knows CUDA 12.4, "
        "the binaries need driver 580 (CUDA 13) or newer"
    )


def test_tokens_of_two_inputs_must_agree(drive: Drive, plugin_config: ModelConfig) -> None:
    shapes = tensors(SPECS["MlaQuery"], plugin_config, {"B": 2, "S": 3, "T": 7})
    output = drive([create("MlaQuery"), *shapes, "attach", "reshape", "enqueue"])
    assert output[-2:] == ["log 1 MlaQuery: input q has 7 tokens, but input cos has 2 times 3", "enqueue 1"]


@pytest.mark.parametrize("name", OF_V2)
def test_builders_plugins_launch_nothing(drive: Drive, plugin_config: ModelConfig, name: str) -> None:
    """A builder times plugins on made-up inputs, which would index memory."""
    sizes = {"B": 2, "S": 3, "P": 9, "page": 64, "M": 2, "T": 6}
    built = create(name).replace(" engine", " build")
    output = drive([built, *tensors(SPECS[name], plugin_config, sizes), "attach", "reshape", "enqueue"])
    assert output == ["create ok", "attach 0", "reshape 0", "enqueue 0"]


@pytest.mark.parametrize("name", OF_V2)
def test_misaligned_tensors_are_said(drive: Drive, plugin_config: ModelConfig, name: str) -> None:
    """Kernels load 16 bytes at a time; memory that is not aligned so would be a fault far from its cause."""
    op, sizes = SPECS[name], {"B": 2, "S": 3, "P": 9, "page": 64, "M": 2, "T": 6}
    shapes = tensors(op, plugin_config, sizes)
    for tensor in op.inputs + op.outputs:
        address = address_of(op, tensor.name)
        moved = [line.replace(f" {address:x} ", f" {address + 2:x} ") for line in shapes]
        output = drive([create(name), *moved, "attach", "reshape", "enqueue"])
        assert output[-1] == "enqueue 1", tensor.name
        assert f"{tensor.name.replace('past_latent', 'pool').replace('present_latent', 'pool')} lies at" in output[-2]
        assert f"{address + 2:#x}, which is no multiple of 16 bytes" in output[-2]


def test_failed_load_leaves_nothing_behind(drive: Drive) -> None:
    output = drive([create("MlaDecode"), "attach"], FAKE_BAD_IMAGE="mla_decode_combine")
    loaded = {line.split()[1] for line in output if line.startswith("ready ")}
    assert loaded
    assert loaded == {line.split()[1] for line in output if line.startswith("unload ")}


def test_failed_launch_is_said(drive: Drive, plugin_config: ModelConfig) -> None:
    shapes = tensors(SPECS["MoeRouter"], plugin_config, {"T": 8})
    output = drive([create("MoeRouter"), *shapes, "attach", "reshape", "enqueue"], FAKE_LAUNCH_FAILS="1")
    assert output[-2:] == ["log 1 MoeRouter: CUDA driver: moe_router failed: as the test asked (700)", "enqueue 1"]


def test_cache_must_be_updated_in_place(drive: Drive, plugin_config: ModelConfig) -> None:
    shapes = tensors(SPECS["MlaDecode"], plugin_config, {"B": 1, "S": 1, "P": 9, "page": 64, "M": 2})
    shapes[-1] = shapes[-1].replace(f"{address_of(SPECS['MlaDecode'], 'past_latent'):x}", "abc000")
    output = drive([create("MlaDecode"), *shapes, "attach", "reshape", "enqueue"])
    assert "output present_latent must be the memory of input past_latent" in output[-2]
    assert output[-1] == "enqueue 1"


def test_old_loggers_are_understood(drive: Drive, plugin_library: PluginLibrary) -> None:
    output = drive(["finder old", "create MoeRouter build"])
    assert output[0].startswith('log 1 MoeRouter: attribute "top_k" is missing')


def linear(e: Expected, n: Sizes) -> None:
    T, rows, tile = n["T"], n["out"], lambda name: e.tile("linear_narrow", name, n["T"])
    blocks = cdiv(rows, tile("BLOCK_N")) * cdiv(T, tile("BLOCK_M"))
    splits = launches.linear_splits(blocks, n["in"], tile("BLOCK_K"))
    partial = e.take(splits * T * rows * 4 if splits > 1 else 0)
    given = ["x", "weight", "weight_scale", "output", partial, T, rows, n["in"] // tile("UNIT"), splits]
    e.launch("linear_narrow", [blocks, splits], given, T)
    if splits > 1:
        grid = [cdiv(T * rows, e.tile("linear_narrow_sum", "BLOCK"))]
        e.launch("linear_narrow_sum", grid, [partial, "output", T * rows, splits])


def narrow_experts(e: Expected, n: Sizes) -> None:
    experts(e, n, "moe_gate_up_narrow", "moe_down_narrow")


def shares(tokens: int, rows: int, columns: int) -> Sizes:
    """The sizes of a product's tensors, of any format."""
    parts = {f"in_by_{n}": cdiv(columns, n) for n in (2, 32, 128)}
    return {"T": tokens, "out": rows, "in": columns, "out_by_128": cdiv(rows, 128), **parts}


LINEAR_CASES = [shares(1, 192, 64), shares(1, 64, 2048), shares(16, 320, 1536), shares(17, 64, 2048)]
LINEAR_CASES += [shares(65, 64, 8192), shares(300, 640, 64)]
NARROW_CASES = [(op, sizes) for op in NARROW_PLUGINS if op.name.startswith("Linear") for sizes in LINEAR_CASES]
NARROW_CASES += [(op, {"T": t}) for op in NARROW_PLUGINS if op.name.startswith("Moe") for t in (1, 8, 86, 500, 5000)]
NARROW_CASES += [  # narrow_library has a cache of int8
    (op, sizes)
    for op in NARROW_PLUGINS
    for name, sizes in CASES
    if op.name == f"{name}NarrowInt8" and name.startswith("Mla")
]
NARROW_WRITERS = {"Lin": linear, "Moe": narrow_experts, "MlaD": decode, "MlaP": prefill}


def create_narrow(op: OpSpec) -> str:
    whole, _, format = op.name.partition("Narrow")
    fields = [f"format:s:{len(format)}:{format.lower()}", f"group:i:1:{128 if format == 'Fp8' else 32}"]
    return " ".join(["create", op.name, "engine", *FIELDS.get(whole, []), *fields])


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm{chip.sm}")
def test_launches_over_narrow_weights(
    drive: Drive, narrow_config: ModelConfig, narrow_library: PluginLibrary, narrow_use: NarrowUse, chip: Chip
) -> None:
    """And a narrow cache. Codes of every format as bytes; a product with few blocks is split along K, and summed."""
    commands: list[str] = []
    for op, sizes in NARROW_CASES:
        shapes = tensors(op, narrow_config, sizes)
        commands += ["clear", create_narrow(op), *shapes, "types", "configure", "workspace", "attach", "reshape"]
        commands += ["enqueue"]
    output = drive(commands, sm=chip.sm, library=narrow_library.path)

    cases = []
    for op, sizes in NARROW_CASES:
        case = Expected(op, narrow_config, chip, narrow_use)
        write = next(writer for start, writer in NARROW_WRITERS.items() if op.name.startswith(start))
        write(case, {**fixed_sizes(narrow_config), **sizes})
        cases.append(case)
    assert not [line for line in output if line.startswith("log ")]
    assert [line for line in output if line.startswith("launch ")] == [line for case in cases for line in case.lines]
    assert any("linear_narrow_sum" in line for line in output)
    workspaces = [int(line.split()[1]) for line in output if line.startswith("workspace ")]
    for (op, sizes), case, size in zip(NARROW_CASES, cases, workspaces, strict=True):
        assert case.workspace <= size + 255, (op.name, sizes)


@pytest.mark.parametrize("op", NARROW_PLUGINS[:3], ids=lambda op: op.name)
def test_workspace_of_products_covers_all_smaller_sizes(
    drive: Drive, narrow_config: ModelConfig, narrow_library: PluginLibrary, narrow_use: NarrowUse, op: OpSpec
) -> None:
    largest = shares(700, 192, 4096)
    output = drive([create_narrow(op), *tensors(op, narrow_config, largest), "workspace"], library=narrow_library.path)
    size, needs = int(output[-1].split()[1]), []
    for tokens in (1, 15, 16, 17, 63, 64, 65, 128, 129, 256, 300, 640, 700):
        for chip in CHIPS:
            case = Expected(op, narrow_config, chip, narrow_use)
            linear(case, {**largest, "T": tokens})
            needs.append(case.workspace)
    assert max(needs) <= size <= max(needs) + 1024


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("LinearNarrowInt8", {"in_by_32": 3}, "input weight_scale has 3 for 64 numbers, where there should be 2"),
        ("LinearNarrowInt4", {"in_by_2": 64}, "input weight has 64 for 64 numbers, where there should be 32"),
        ("LinearNarrowFp8", {"out_by_128": 1}, "input weight_scale has 1 for 192 numbers, where there should be 2"),
        ("LinearNarrowFp8", {"in": 72}, "72 columns, but this plugin library was made for multiples of 16"),
    ],
)
def test_codes_and_scales_that_do_not_fit_are_said(
    drive: Drive, narrow_config: ModelConfig, narrow_library: PluginLibrary, op: str, change: Sizes, message: str
) -> None:
    spec = next(found for found in NARROW_PLUGINS if found.name == op)
    shapes = tensors(spec, narrow_config, {**shares(1, 192, 64), **change})
    output = drive([create_narrow(spec), *shapes, "attach", "reshape", "enqueue"], library=narrow_library.path)
    assert message in output[-2]
    assert output[-1] == "enqueue 1"


def test_another_format_is_said(drive: Drive, narrow_library: PluginLibrary) -> None:
    wrong = ["format:s:4:int8", "group:i:1:32"]
    output = drive([" ".join(["create LinearNarrowInt4 build", *wrong])], library=narrow_library.path)
    assert 'are "int8" and 32, but this plugin reads "int4" in groups of 32' in output[0]
    assert output[1] == "create null"
