"""The table of what gets compiled: for one model, dtype and chip, each kernel with its constants and tiles.

Row dtype is that of the op's T (float32 for routers and sampling, whose logits are float32 in every model). max_tokens
is 0, any count, everywhere but for the products with weights, moe_logits and moe_choose, where it counts T, the tokens
of one call. Narrow weights have the ops and rows of each format that a bundle holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deepseek_trt.export.bundle.graph import DEFAULT_PAGE_SIZE
from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.export.config.limits import without_kernel
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BuildError
from deepseek_trt.plugins.aot.narrow_use import ALL_WHOLE, NarrowUse
from deepseek_trt.plugins.aot.records import KernelArg, Variant
from deepseek_trt.plugins.kernels import constants, tiles
from deepseek_trt.plugins.kernels.absorbed import constants as absorbed
from deepseek_trt.plugins.kernels.cache import constants as cache
from deepseek_trt.plugins.kernels.chips import shared_limit
from deepseek_trt.plugins.kernels.moe import constants as layer
from deepseek_trt.plugins.kernels.narrow import constants as narrow_constants
from deepseek_trt.plugins.kernels.narrow import tiles as narrow_tiles
from deepseek_trt.plugins.kernels.narrow.formats import KERNEL_FORMATS
from deepseek_trt.plugins.narrow_names import plugin_name

TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

# Each kernel's module (in plugins/kernels) and the arguments it takes at launch, in order; T is the op's dtype, S that
# of a narrow format's scales.
_WRITE = (
    "pool *T, latent *T, page_table *i32, past_lengths *i32, sequence_lengths *i32, steps i32, table_width i32, "
    "pages i32"
)
_SPLIT = (
    "query *T, latent *T, pool *T, page_table *i32, past_lengths *i32, sequence_lengths *i32, partial *fp32, "
    "partial_lse *fp32, attended *T, scale_log2 fp32, batch i32, steps i32, parts i32, table_width i32, pages i32"
)
_COMBINE = (
    "partial *fp32, partial_lse *fp32, past_lengths *i32, sequence_lengths *i32, attended *T, batch i32, steps i32, "
    "parts i32, capacity i32"
)
_EXPAND = (
    "pool *T, page_table *i32, past_lengths *i32, sequence_lengths *i32, w_uk *T, w_uv *T, k_nope *T, value *T, "
    "k_rope *T, first_head i32, capacity i32, table_width i32, pages i32, steps i32"
)
_ATTEND = (
    "query *T, past_lengths *i32, sequence_lengths *i32, k_nope *T, value *T, k_rope *T, attended *T, "
    "scale_log2 fp32, first_head i32, steps i32, capacity i32"
)
_NARROW_WRITE = (
    "codes *i8, rope *T, latent *T, page_table *i32, past_lengths *i32, sequence_lengths *i32, steps i32, "
    "table_width i32, pages i32"
)
_NARROW_SPLIT = (
    "query *T, codes *i8, rope *T, page_table *i32, past_lengths *i32, sequence_lengths *i32, partial *fp32, "
    "partial_lse *fp32, attended *T, scale_log2 fp32, batch i32, steps i32, parts i32, table_width i32, pages i32"
)
_NARROW_EXPAND = (
    "codes *i8, rope *T, page_table *i32, past_lengths *i32, sequence_lengths *i32, w_uk *T, w_uv *T, k_nope *T, "
    "value *T, k_rope *T, first_head i32, capacity i32, table_width i32, pages i32, steps i32"
)
_ADJUST = (
    "logits *fp32, adjusted *fp32, places *i32, starts *i32, ids *i32, counts *fp32, drops *fp32, "
    "biases *fp32, repetitions *fp32, presences *fp32"
)
_PICK = (
    "logits *fp32, adjusted *fp32, places *i32, starts *i32, keys *i64, draws *i64, steepness *fp32, top_ps *fp64, "
    "top_ks *i32, leasts *i32, wanted *i32, tokens *i32, used *i64, totals *fp64, bests *fp32, owns *fp32, "
    "top_ids *i32, top_logits *fp32"
)
_CHOOSE = (
    "partial *fp32, correction_bias *fp32, weights *fp32, ids *i32, sorted_slots *i32, block_expert *i32, tokens i32, "
    "max_blocks i32, block i32, scale fp32"
)
_LAYER_GATE_UP = (
    "hidden *T, gate_proj *T, up_proj *T, shared_gate *T, shared_up *T, inner *T, sorted_slots *i32, "
    "block_expert *i32, slots i32"
)
_GATE_UP_NARROW = (
    "hidden *T, gate_proj *i8, gate_proj_scale *S, up_proj *i8, up_proj_scale *S, inner *T, sorted_slots *i32, "
    "block_expert *i32, slots i32"
)
_LINEAR_NARROW = (
    "x *T, weight *i8, weight_scale *S, output *T, partial *fp32, tokens i32, rows i32, units i32, splits i32"
)


@dataclass(frozen=True)
class KernelSource:
    """Where a kernel is written in plugins/kernels, and its launch arguments as "name type, name type"."""

    module: str
    args: str


KERNELS = {
    "latent_write": KernelSource("latent_write", _WRITE),
    "mla_decode_split": KernelSource("mla_decode", _SPLIT),
    "mla_decode_combine": KernelSource("mla_decode", _COMBINE),
    "mla_prefill_expand": KernelSource("mla_prefill", _EXPAND),
    "mla_prefill_attend": KernelSource("mla_prefill", _ATTEND),
    "latent_narrow": KernelSource("cache.write", _NARROW_WRITE),
    "mla_decode_split_narrow": KernelSource("cache.decode", _NARROW_SPLIT),
    "mla_prefill_expand_narrow": KernelSource("cache.prefill", _NARROW_EXPAND),
    "moe_router": KernelSource("moe_router", "logits *fp32, weights *fp32, ids *i32, tokens i32, scale fp32"),
    "moe_biased_router": KernelSource(
        "moe_biased_router",
        "logits *fp32, correction_bias *fp32, weights *fp32, ids *i32, tokens i32, scale fp32",
    ),
    "moe_dispatch_count": KernelSource(
        "moe_dispatch", "ids *i32, counts *i32, sorted_slots *i32, slots i32, sorted_size i32"
    ),
    "moe_dispatch_offsets": KernelSource(
        "moe_dispatch", "counts *i32, offsets *i32, block_expert *i32, chunks i32, max_blocks i32, block i32"
    ),
    "moe_dispatch_scatter": KernelSource("moe_dispatch", "ids *i32, offsets *i32, sorted_slots *i32, slots i32"),
    "moe_gate_up": KernelSource(
        "moe_experts",
        "hidden *T, gate_proj *T, up_proj *T, inner *T, sorted_slots *i32, block_expert *i32, slots i32",
    ),
    "moe_down": KernelSource(
        "moe_experts", "inner *T, down_proj *T, outer *T, sorted_slots *i32, block_expert *i32, slots i32"
    ),
    "moe_combine": KernelSource("moe_experts", "outer *T, weights *fp32, output *T, tokens i32"),
    "sample_adjust": KernelSource("sampling.adjust", _ADJUST),
    "sample_pick": KernelSource("sampling.pick", _PICK),
    "mla_query": KernelSource(
        "absorbed.query",
        "q *T, kv *T, cos *fp32, sin *fp32, latent_norm *T, w_uk *T, query *T, latent *T, tokens i32, eps fp32",
    ),
    "mla_value": KernelSource("absorbed.value", "attended *T, w_uv *T, values *T, tokens i32"),
    "moe_logits": KernelSource("moe.logits", "hidden *T, router_weight *T, partial *fp32, tokens i32"),
    "moe_choose": KernelSource("moe.choose", _CHOOSE),
    "moe_layer_gate_up": KernelSource("moe.experts", _LAYER_GATE_UP),
    "moe_layer_down": KernelSource(
        "moe.experts",
        "inner *T, down_proj *T, shared_down *T, outer *T, sorted_slots *i32, block_expert *i32, slots i32",
    ),
    "moe_gate_up_narrow": KernelSource("narrow.experts", _GATE_UP_NARROW),
    "moe_down_narrow": KernelSource(
        "narrow.experts",
        "inner *T, down_proj *i8, down_proj_scale *S, outer *T, sorted_slots *i32, block_expert *i32, slots i32",
    ),
    "linear_narrow": KernelSource("narrow.linear", _LINEAR_NARROW),
    "linear_narrow_sum": KernelSource("narrow.linear", "partial *fp32, output *T, size i32, splits i32"),
}
SAMPLING = "Sampling"  # no op of a graph: a session launches its kernels itself, after a graph has run

# Kernels that call order.after_previous_kernel, and the first chip on which that does anything.
OVERLAPPING = frozenset(
    k for k in KERNELS if k.startswith(("mla_", "latent_")) or (k.startswith("moe_") and not k.endswith("_narrow"))
)
OVERLAPS_FROM = 90


def variants_for(
    config: ModelConfig,
    dtype: str,
    sm: int,
    page_size: int = DEFAULT_PAGE_SIZE,
    narrow: NarrowUse = ALL_WHOLE,
) -> tuple[Variant, ...]:
    """All variants that `config` needs in `dtype` on the chip `sm`, in a fixed order, for pages of `page_size` tokens;
    `narrow` are its narrow weights and cache.

    Raises BuildError where a dtype, chip or activation has no kernels.
    """
    shared_limit(sm)
    if dtype not in TRITON_TYPES:
        raise BuildError(f"the kernels have no dtype {dtype!r}; export the bundle as one of: {', '.join(TRITON_TYPES)}")
    if narrow.cache:
        rows = _narrow_mla_rows(config, dtype, sm, page_size, narrow.cache)
    else:
        rows = _mla_rows(config, dtype, sm, page_size)
    rows += _absorbed_rows(config, dtype, sm)
    missing = without_kernel(config)
    if missing:
        raise BuildError(f"{missing}: run it with ort")
    if config.n_routed_experts and config.num_experts_per_tok:
        rows += _router_rows(config, sm)
        if narrow.whole_experts:
            rows += _experts_rows(config, dtype, sm)
            rows += _layer_rows(config, dtype, sm) if config.n_shared_experts else ()
    rows += _sampling_rows(config.vocab_size, sm)
    if config.n_routed_experts and config.num_experts_per_tok:
        for format in narrow.experts:
            rows += _narrow_experts_rows(config, dtype, sm, format)
    for format, unit in narrow.linear:
        rows += _linear_rows(dtype, format, unit)
    return tuple(_overlapping(row, sm) for row in rows)


def _overlapping(row: Variant, sm: int) -> Variant:
    """The row with PDL where its kernel has that constant: 1 on chips that start a kernel before the last one ends."""
    if row.kernel not in OVERLAPPING:
        return row
    return replace(row, constexprs=(*row.constexprs, ("PDL", int(sm >= OVERLAPS_FROM))))


def _mla_rows(config: ModelConfig, dtype: str, sm: int, page: int) -> tuple[Variant, ...]:
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    decode = constants.decode_constants(heads, rank, rope, page)
    prefill = constants.prefill_constants(heads, rank, rope, config.qk_nope_head_dim, config.v_head_dim, page)
    split = tiles.decode_tile(dtype, heads, sm, 0, page)
    combine = {**decode.combine, "BLOCK_N": split["BLOCK_N"]}
    write, write_sizes = tiles.write_tile(1, sm), constants.write_constants(config.latent_dim, page)
    return (
        _row("MlaDecode", "mla_decode_split", dtype, decode.split, split),
        _row("MlaDecode", "mla_decode_combine", dtype, combine, tiles.decode_combine_tile(rank, sm)),
        _row("MlaPrefill", "latent_write", dtype, write_sizes, write),
        _row("MlaPrefill", "mla_prefill_expand", dtype, prefill.expand, tiles.prefill_expand_tile(dtype, rank, 0, sm)),
        _row("MlaPrefill", "mla_prefill_attend", dtype, prefill.attend, tiles.prefill_attend_tile(dtype, 0, 0, sm)),
    )


def _narrow_mla_rows(config: ModelConfig, dtype: str, sm: int, page: int, narrow: NarrowCache) -> tuple[Variant, ...]:
    """_mla_rows for a cache of codes and scales."""
    heads, rope = config.num_attention_heads, config.qk_rope_head_dim
    decode = cache.narrow_decode_constants(narrow, heads, rope, page)
    prefill = cache.narrow_prefill_constants(narrow, heads, rope, config.qk_nope_head_dim, config.v_head_dim, page)
    split = cache.narrow_decode_tile(dtype, heads, sm, 0, page)
    combine, summed = {**decode.combine, "BLOCK_N": split["BLOCK_N"]}, tiles.decode_combine_tile(narrow.rank, sm)
    write = cache.narrow_write_constants(narrow, rope, page), cache.narrow_write_tile(1, sm)
    expand, attend = cache.narrow_expand_tile(dtype, narrow, 0, sm), tiles.prefill_attend_tile(dtype, 0, 0, sm)
    of_decode, of_prefill = (plugin_name(op, narrow.format) for op in ("MlaDecodeNarrow", "MlaPrefillNarrow"))
    return (
        _row(of_decode, "latent_narrow", dtype, *write),
        _row(of_decode, "mla_decode_split_narrow", dtype, decode.split, split),
        _row(of_decode, "mla_decode_combine", dtype, combine, summed),
        _row(of_prefill, "latent_narrow", dtype, *write),
        _row(of_prefill, "mla_prefill_expand_narrow", dtype, prefill.expand, expand),
        _row(of_prefill, "mla_prefill_attend", dtype, prefill.attend, attend),
    )


def _absorbed_rows(config: ModelConfig, dtype: str, sm: int) -> tuple[Variant, ...]:
    """MlaQuery and MlaValue, by the tokens of a step."""
    rope, nope, value = config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
    sizes = absorbed.AbsorbedSizes(config.num_attention_heads, config.kv_lora_rank, rope, nope, value)
    of_query, of_value = absorbed.query_constants(sizes), absorbed.value_constants(sizes)
    rows = [_row("MlaQuery", "mla_query", dtype, of_query, t, n) for n, t in absorbed.query_tiles(sizes, sm).items()]
    rows += [_row("MlaValue", "mla_value", dtype, of_value, t, n) for n, t in absorbed.value_tiles(sizes, sm).items()]
    return tuple(rows)


def _router_rows(config: ModelConfig, sm: int) -> tuple[Variant, ...]:
    router = constants.router_constants(
        config.n_routed_experts,
        *config.routing_groups,
        config.num_experts_per_tok,
        int(config.norm_topk_prob),
    )
    op, kernel = ("MoeBiasedRouter", "moe_biased_router") if config.biased_routing else ("MoeRouter", "moe_router")
    return (_row(op, kernel, "float32", router, tiles.router_tile(1, sm)),)


def _layer_rows(config: ModelConfig, dtype: str, sm: int) -> tuple[Variant, ...]:
    """MoeLayer: routing by the tokens that one program sorts, the GEMMs by the buckets of MoeExperts."""
    top_k, routed = config.num_experts_per_tok, config.n_routed_experts
    choice = layer.Choice(top_k, *config.routing_groups, int(config.norm_topk_prob), config.biased_routing)
    inter, shared = config.moe_intermediate_size, config.n_shared_experts
    sizes = layer.LayerSizes(routed, shared, config.hidden_size, inter, choice)
    gemm = layer.layer_constants(sizes)
    rows = []
    for bucket in layer.routing_buckets(sizes, sm):
        rows.append(_row("MoeLayer", "moe_logits", dtype, *bucket.logits, bucket.max_tokens))
        rows.append(_row("MoeLayer", "moe_choose", dtype, *bucket.choose, bucket.max_tokens))
    rows += _dispatch_rows("MoeLayer", routed + shared, dtype, sm)
    for of_gemm in tiles.gemm_buckets(dtype, top_k, routed, sm):
        most = of_gemm.max_tokens
        rows.append(_row("MoeLayer", "moe_layer_gate_up", dtype, gemm.gate_up, of_gemm.tiles.gate_up, most))
        rows.append(_row("MoeLayer", "moe_layer_down", dtype, gemm.down, of_gemm.tiles.down, most))
    rows.append(_row("MoeLayer", "moe_combine", dtype, gemm.combine, tiles.combine_tile(1, config.hidden_size, sm)))
    return tuple(rows)


def _experts_rows(config: ModelConfig, dtype: str, sm: int) -> tuple[Variant, ...]:
    experts, top_k, width = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size
    gemm = constants.experts_constants(width, config.moe_intermediate_size, top_k)
    rows = [*_dispatch_rows("MoeExperts", experts, dtype, sm)]
    for bucket in tiles.gemm_buckets(dtype, top_k, experts, sm):
        most = bucket.max_tokens
        rows.append(_row("MoeExperts", "moe_gate_up", dtype, gemm.gate_up, bucket.tiles.gate_up, most))
        rows.append(_row("MoeExperts", "moe_down", dtype, gemm.down, bucket.tiles.down, most))
    rows.append(_row("MoeExperts", "moe_combine", dtype, gemm.combine, tiles.combine_tile(1, width, sm)))
    return tuple(rows)


def _sampling_rows(vocab: int, sm: int) -> tuple[Variant, ...]:
    sizes = constants.sampling_constants(vocab)
    return (
        _row(SAMPLING, "sample_adjust", "float32", sizes.adjust, tiles.sample_adjust_tile(sm)),
        _row(SAMPLING, "sample_pick", "float32", sizes.pick, tiles.sample_pick_tile(vocab, sm)),
    )


def _dispatch_rows(op: str, experts: int, dtype: str, sm: int) -> tuple[Variant, ...]:
    sort = constants.dispatch_constants(experts)
    return (
        _row(op, "moe_dispatch_count", dtype, sort.count, tiles.tile()),
        _row(op, "moe_dispatch_offsets", dtype, sort.offsets, tiles.dispatch_tile(sm)),
        _row(op, "moe_dispatch_scatter", dtype, sort.scatter, tiles.tile()),
    )


def _narrow_experts_rows(config: ModelConfig, dtype: str, sm: int, format: str) -> tuple[Variant, ...]:
    experts, top_k, width = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size
    kind, op = KERNEL_FORMATS[format], plugin_name("MoeExpertsNarrow", format)
    gemm = narrow_constants.narrow_experts_constants(kind, width, config.moe_intermediate_size, top_k)
    rows = [*_dispatch_rows(op, experts, dtype, sm)]
    for bucket in narrow_tiles.experts_buckets(kind, dtype, top_k, experts):
        most, both = bucket.max_tokens, bucket.tiles
        rows.append(_row(op, "moe_gate_up_narrow", dtype, gemm.gate_up, both.gate_up, most, kind.scale))
        rows.append(_row(op, "moe_down_narrow", dtype, gemm.down, both.down, most, kind.scale))
    rows.append(_row(op, "moe_combine", dtype, gemm.combine, tiles.combine_tile(1, width, sm)))
    return tuple(rows)


def _linear_rows(dtype: str, format: str, unit: int) -> tuple[Variant, ...]:
    kind, op = KERNEL_FORMATS[format], plugin_name("LinearNarrow", format)
    dims = narrow_constants.linear_constants(kind, unit)
    products = (
        _row(op, "linear_narrow", dtype, dims, bucket.tile, bucket.max_tokens, kind.scale)
        for bucket in narrow_tiles.linear_buckets(kind, dtype)
    )
    return (*products, _row(op, "linear_narrow_sum", dtype, {}, narrow_tiles.SUM))


def _row(
    op: str,
    kernel: str,
    dtype: str,
    dims: constants.Constants,
    size: tiles.Tile,
    max_tokens: int = 0,
    scale: str = "",
) -> Variant:
    return Variant(
        kernel=kernel,
        op=op,
        dtype=dtype,
        max_tokens=max_tokens,
        constexprs=(*dims.items(), *size.sizes),
        args=_args(KERNELS[kernel].args, TRITON_TYPES[dtype], scale),
        num_warps=size.num_warps,
        num_stages=size.num_stages,
    )


def _args(text: str, dtype: str, scale: str) -> tuple[KernelArg, ...]:
    """From "pool *T, steps i32" to arguments, T and S replaced."""
    pairs = (part.split() for part in text.split(", "))
    return tuple(KernelArg(name, kind.replace("T", dtype).replace("S", scale)) for name, kind in pairs)
