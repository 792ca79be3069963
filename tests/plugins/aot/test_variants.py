"""The table of variants: complete, unambiguous, and in step with the kernels' modules."""

import ast
import dataclasses
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

from deepseek_trt.export.bundle.narrow_cache import CACHE_DTYPES, NarrowCache
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BuildError
from deepseek_trt.plugins.aot import variants
from deepseek_trt.plugins.aot.narrow_use import ALL_WHOLE, NarrowUse
from deepseek_trt.plugins.aot.variants import KERNELS, OVERLAPPING, SAMPLING, variants_for
from deepseek_trt.plugins.fused import FUSED_OPS
from deepseek_trt.plugins.kernels import KERNEL_OPS
from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS
from deepseek_trt.plugins.narrow_names import plugin_name
from deepseek_trt.plugins.narrow_ops import NARROW_PLUGINS

SMALL = ModelConfig(
    hidden_size=128,
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
)
V2_LITE = ModelConfig(
    hidden_size=2048, num_attention_heads=16, n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408
)
V2 = ModelConfig(
    hidden_size=5120,
    num_attention_heads=128,
    n_routed_experts=160,
    num_experts_per_tok=6,
    moe_intermediate_size=1536,
    topk_method="group_limited_greedy",
    n_group=8,
    topk_group=3,
)
V3 = ModelConfig(
    hidden_size=7168,
    num_attention_heads=128,
    n_routed_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    topk_method="noaux_tc",
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
)
KIMI_K2 = dataclasses.replace(V3, num_attention_heads=64, n_routed_experts=384, n_group=1, topk_group=1)
MODELS = pytest.mark.parametrize(
    "config", [SMALL, V2_LITE, V2, V3, KIMI_K2], ids=["small", "V2-Lite", "V2", "V3", "Kimi-K2"]
)
ROUTING = ("moe_logits", "moe_choose")
ROUTERS = {"MoeRouter": "moe_router", "MoeBiasedRouter": "moe_biased_router"}
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
CHIPS = pytest.mark.parametrize("sm", SHARED_LIMITS)

SOURCES = Path(variants.__file__).parents[1] / "kernels"
ALL_FORMATS = NarrowUse((("int8", 32), ("int4", 32), ("fp8", 128)), ("int8", "int4", "fp8"), whole_experts=True)
OF_NARROW = {"moe_gate_up_narrow", "moe_down_narrow", "linear_narrow", "linear_narrow_sum"}
OF_CACHE = {"latent_narrow", "mla_decode_split_narrow", "mla_prefill_expand_narrow"}
OF_WHOLE_CACHE = {"latent_write", "mla_decode_split", "mla_prefill_expand"}
WEIGHT_PLUGINS = {op.name for op in NARROW_PLUGINS if not op.name.startswith("Mla")}
WHOLE_OPS = {name for name in KERNEL_OPS if "Narrow" not in name}


@MODELS
@DTYPES
@CHIPS
def test_every_kernel_has_one_row_a_bucket(config, dtype, sm):
    rows = variants_for(config, dtype, sm)
    other = "MoeRouter" if config.biased_routing else "MoeBiasedRouter"
    assert {row.op for row in rows} == {*WHOLE_OPS, *(op.name for op in FUSED_OPS), SAMPLING} - {other}
    assert {row.kernel for row in rows} == set(KERNELS) - {ROUTERS[other]} - OF_NARROW - OF_CACHE
    check_buckets(rows)


@MODELS
@DTYPES
@CHIPS
def test_narrow_weights_have_the_rows_of_each_format(config, dtype, sm):
    rows, whole = variants_for(config, dtype, sm, narrow=ALL_FORMATS), variants_for(config, dtype, sm)
    assert rows[: len(whole)] == whole
    assert {row.op for row in rows[len(whole) :]} == WEIGHT_PLUGINS
    assert {row.kernel for row in rows} - {row.kernel for row in whole} == OF_NARROW
    check_buckets(rows)
    without = variants_for(config, dtype, sm, narrow=NarrowUse((("fp8", 64),), ("int4",), whole_experts=False))
    assert {row.op for row in without} >= {"LinearNarrowFp8", "MoeExpertsNarrowInt4"}
    assert not {"MoeExperts", "MoeLayer"} & {row.op for row in without}
    assert {dict(row.constexprs)["UNIT"] for row in without if row.kernel == "linear_narrow"} == {64}


@MODELS
@DTYPES
@CHIPS
@pytest.mark.parametrize("format", CACHE_DTYPES)
def test_a_narrow_cache_has_rows_in_place_of_the_whole_ones(config, dtype, sm, format):
    use, whole = of_cache(config, format), variants_for(config, dtype, sm)
    rows = variants_for(config, dtype, sm, narrow=use)
    names = {row.op for row in rows} - {row.op for row in whole}
    assert names == {plugin_name("MlaDecodeNarrow", format), plugin_name("MlaPrefillNarrow", format)}
    assert {row.op for row in whole} - {row.op for row in rows} == {"MlaDecode", "MlaPrefill"}
    assert {row.kernel for row in rows} == {row.kernel for row in whole} - OF_WHOLE_CACHE | OF_CACHE
    check_buckets(rows)
    of = {row.kernel: dict(row.constexprs) for row in rows}
    split, combine = of["mla_decode_split_narrow"], of["mla_decode_combine"]
    assert all(split[name] == combine[name] for name in ("BLOCK_B", "BLOCK_N", "MIN_TILES", "H", "LAT"))
    expand = of["mla_prefill_expand_narrow"]
    assert use.cache.groups == 1 or expand["GROUP"] % expand["BLOCK_K"] == 0, "a step's columns share a scale"


def of_cache(config, format="int8"):
    return NarrowUse(cache=NarrowCache.of(config, format))


def check_buckets(rows):
    assert set(Counter((row.op, row.kernel, row.max_tokens) for row in rows).values()) == {1}
    for op, kernel in {(row.op, row.kernel) for row in rows}:
        buckets = [row.max_tokens for row in rows if (row.op, row.kernel) == (op, kernel)]
        assert buckets[-1] == 0, "the last bucket must take any count"
        assert buckets[:-1] == sorted(buckets[:-1])


@MODELS
@DTYPES
@CHIPS
def test_both_grouped_gemms_of_a_bucket_share_the_block(config, dtype, sm):
    blocks = {}
    for row in variants_for(config, dtype, sm, narrow=ALL_FORMATS):
        if row.kernel.removesuffix("_narrow").endswith(("_gate_up", "_down")):
            blocks.setdefault((row.op, row.max_tokens), []).append(dict(row.constexprs)["BLOCK_M"])
    assert {"MoeExperts", "MoeLayer"} < {op for op, _ in blocks}
    assert all(len(pair) == 2 and len(set(pair)) == 1 for pair in blocks.values())


@MODELS
@CHIPS
def test_a_step_of_decode_is_routed_in_two_launches(config, sm):
    """One program sorts as many tokens as it holds in registers; logits are split alike in both kernels."""
    rows = [row for row in variants_for(config, "bfloat16", sm) if row.op == "MoeLayer"]
    logits, choose = ({r.max_tokens: dict(r.constexprs) for r in rows if r.kernel == k} for k in ROUTING)
    assert logits.keys() == choose.keys()
    most = max(choose)
    assert most == {SMALL: 64, V2_LITE: 64, V2: 32, V3: 32, KIMI_K2: 16}[config]
    for tokens, sizes in choose.items():
        assert sizes["SPLITS"] == logits[tokens]["SPLITS"]
        assert sizes["SORT"] == int(tokens > 0)
        assert not sizes["SORT"] or sizes["BLOCK_T"] >= tokens


@pytest.mark.parametrize("config", [V2_LITE, V2, V3, KIMI_K2], ids=["V2-Lite", "V2", "V3", "Kimi-K2"])
@pytest.mark.parametrize("sm", [80, 90, 100, 103])
def test_one_token_fills_a_large_chip(config, sm):
    """An H100 has 132 SMs: gate_up's blocks for one token are as many."""
    for kernel in ("moe_gate_up", "moe_layer_gate_up"):
        row = next(row for row in variants_for(config, "bfloat16", sm) if row.kernel == kernel)
        columns = -(-config.moe_intermediate_size // dict(row.constexprs)["BLOCK_N"])
        assert (row.num_stages == 5) == (row.max_tokens == 16)
        assert config.num_experts_per_tok * columns >= 132


@DTYPES
def test_without_shared_experts_there_is_no_layer_as_one_op(dtype):
    rows = variants_for(dataclasses.replace(SMALL, n_shared_experts=0), dtype, 90)
    assert "MoeLayer" not in {row.op for row in rows}


@MODELS
@CHIPS
def test_both_decode_kernels_split_alike(config, sm):
    rows = {row.kernel: dict(row.constexprs) for row in variants_for(config, "bfloat16", sm)}
    shared = ("BLOCK_B", "BLOCK_N", "MIN_TILES", "H", "LAT")
    split, combine = rows["mla_decode_split"], rows["mla_decode_combine"]
    assert [split[name] for name in shared] == [combine[name] for name in shared]


def source_of(kernel):
    """The file that the kernel is written in."""
    return SOURCES.joinpath(*KERNELS[kernel].module.split(".")).with_suffix(".py")


@functools.cache
def function_of(kernel):
    """The kernel's source, read without importing Triton."""
    tree = ast.parse(source_of(kernel).read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == kernel)


@MODELS
@CHIPS
def test_kernels_that_wait_by_themselves_start_early_where_the_chip_can(config, sm):
    for row in (*variants_for(config, "bfloat16", sm), *variants_for(config, "bfloat16", sm, narrow=of_cache(config))):
        waits = "after_previous_kernel(PDL)" in ast.unparse(function_of(row.kernel).body[1])
        assert waits == (row.kernel in OVERLAPPING) == ("PDL" in dict(row.constexprs)), "the first statement"
        assert row.overlaps == (waits and sm >= 90)


def parameters(kernel):
    """(arguments, constants) in the order of the kernel's source."""
    args = function_of(kernel).args.args
    return [a.arg for a in args if a.annotation is None], [a.arg for a in args if a.annotation is not None]


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_give_what_the_kernel_takes(kernel):
    arguments, constants = parameters(kernel)
    uses = (V2, ALL_FORMATS), (V3, ALL_WHOLE), (V2, of_cache(V2))
    for row in (row for config, use in uses for row in variants_for(config, "bfloat16", 90, narrow=use)):
        if row.kernel == kernel:
            assert [arg.name for arg in row.args] == arguments
            assert sorted(name for name, _ in row.constexprs) == sorted(constants)


@pytest.mark.parametrize("kernel", KERNELS)
def test_docstrings_tell_each_launch(kernel):
    """The C++ launcher is written from the docstring: arguments and types must be those of the table."""
    text = ast.get_docstring(ast.parse(source_of(kernel).read_text(encoding="utf-8")))
    launch = re.search(rf"^ +{kernel} +grid.*?\n((?: {{8}}.*\n?)+)", text, re.MULTILINE)
    assert launch, f"{kernel}'s launch is not described"
    told = re.findall(r"\b(\w+) (\*?(?:T|S|fp32|fp64|i32|i64|i8))\b", launch.group(1))
    full = re.findall(r"\b(\w+) \*(?:T|S|fp32|fp64|i32|i64|i8)\b|\b(\w+) (?:i32|fp32)\b", launch.group(1))
    assert [first or second for first, second in full] == [name for name, _ in told]
    assert told == [tuple(part.split()) for part in KERNELS[kernel].args.split(", ")]


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "*fp32"), ("float16", "*fp16"), ("bfloat16", "*bf16")])
def test_types_follow_the_dtype(dtype, kind):
    for row in variants_for(SMALL, dtype, 86):
        types = {arg.name: arg.type for arg in row.args}
        assert types.get("pool", kind) == kind
        assert types.get("weights", "*fp32") == "*fp32"
        assert "T" not in "".join(types.values())
        assert row.dtype == ("float32" if row.op in (*ROUTERS, SAMPLING) else dtype)


def test_a_dense_model_has_no_expert_kernels():
    rows = variants_for(ModelConfig(n_routed_experts=0), "bfloat16", 86)
    assert {row.op for row in rows} == {"MlaPrefill", "MlaDecode", "MlaQuery", "MlaValue", SAMPLING}


@pytest.mark.parametrize(
    ("config", "dtype", "sm", "words"),
    [
        (SMALL, "float64", 86, "float64"),
        (SMALL, "float32", 75, "SM 75 .*80"),
        (ModelConfig(num_experts_per_tok=2, hidden_act="gelu"), "float32", 86, "gelu.*silu"),
    ],
)
def test_refuses_by_name(config, dtype, sm, words):
    with pytest.raises(BuildError, match=words):
        variants_for(config, dtype, sm)
