"""The kernels over narrow weights and caches compile for every chip: nothing spills, all fits its shared memory."""

import dataclasses

import pytest

from deepseek_trt.export.bundle.narrow import FORMATS, Narrow
from deepseek_trt.export.bundle.narrow_cache import CACHE_DTYPES, NarrowCache
from deepseek_trt.export.bundle.recipes import Recipe, narrow_pair
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.plugins.aot import compile as aot
from deepseek_trt.plugins.aot.narrow_use import ALL_WHOLE, NarrowUse, narrow_use
from deepseek_trt.plugins.aot.variants import variants_for
from deepseek_trt.plugins.aot.worker import Request
from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS
from deepseek_trt.plugins.narrow_ops import NARROW_PLUGINS

V2_LITE = ModelConfig(
    hidden_size=2048, num_attention_heads=16, n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408
)
ALL_FORMATS = NarrowUse((("int8", 32), ("int4", 32), ("fp8", 128)), ("int8", "int4", "fp8"), whole_experts=False)
OPS = {op.name for op in NARROW_PLUGINS}


CACHES = [NarrowUse(cache=NarrowCache.of(V2_LITE, format)) for format in CACHE_DTYPES]
V2 = dataclasses.replace(V2_LITE, num_attention_heads=128)


def cache_requests(config, dtype, sm):
    """Those that a whole cache does not have."""
    rows = (row for use in CACHES for row in variants_for(config, dtype, sm, narrow=use))
    return [Request(row, sm) for row in rows if row.op in OPS and row.kernel.endswith("narrow")]


def requests(dtype, sm, use=ALL_FORMATS):
    return [
        Request(v, sm) for v in variants_for(V2_LITE, dtype, sm, narrow=use) if v.op in OPS and "narrow" in v.kernel
    ]


def test_products_of_each_format_compile():
    """As shipped for one token: the first bucket."""
    wanted = [r for r in requests("bfloat16", 86) if r.variant.max_tokens and "linear" in r.variant.kernel][::2]
    for compiled in aot.compile_requests(wanted, jobs=1):
        assert aot.checked(compiled).variant.op.startswith("LinearNarrow")


@pytest.mark.slow
@pytest.mark.parametrize("sm", SHARED_LIMITS)
def test_all_chips(sm):
    """What spilled would be compiled once more, with twice its warps: none needs that."""
    for compiled in aot.compile_requests(requests("bfloat16", sm), jobs=2):
        aot.checked(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sm", [86, 90])
def test_other_dtypes(dtype, sm):
    for compiled in aot.compile_requests(requests(dtype, sm), jobs=2):
        aot.checked(compiled)


def test_those_over_a_narrow_cache_compile():
    for compiled in aot.compile_requests(cache_requests(V2_LITE, "bfloat16", 86)[:3], jobs=1):
        assert aot.checked(compiled).variant.op.endswith("NarrowInt8")


@pytest.mark.slow
@pytest.mark.parametrize("config", [V2_LITE, V2], ids=["V2-Lite", "V2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sm", SHARED_LIMITS)
def test_a_narrow_cache_on_all_chips(config, dtype, sm):
    for compiled in aot.compile_requests(cache_requests(config, dtype, sm), jobs=2):
        aot.checked(compiled)


@pytest.mark.slow
def test_columns_of_any_number_compile():
    """A byte at a time: what spills then has twice the warps."""
    odd = NarrowUse((("fp8", 1),), (), whole_experts=False)
    for compiled in aot._compile_without_spills(requests("bfloat16", 86, odd), jobs=2):
        aot.checked(compiled)


def test_what_a_bundle_needs_follows_from_its_tensors():
    def pair(name, shape, format):
        return narrow_pair(Recipe(name, shape, ()), format, FORMATS[format].group, FORMATS[format].methods[0])

    experts = "model.layers.{}.mlp.experts.gate_proj"
    mixed = [
        *pair("lm_head.weight", (100, 64), "int8"),
        *pair("a.weight", (100, 192), "fp8"),
        *pair("b.weight", (100, 80), "fp8"),
        *pair(experts.format(1), (4, 32, 64), "int4"),
        Recipe("model.norm.weight", (64,), ()),
    ]
    assert isinstance(mixed[0].narrow, Narrow)
    assert narrow_use(mixed) == NarrowUse((("fp8", 16), ("int8", 32)), ("int4",), whole_experts=False)
    assert narrow_use([*mixed, Recipe(experts.format(2), (4, 32, 64), ())]).whole_experts
    assert narrow_use([Recipe(experts.format(1), (4, 32, 64), ())]) == ALL_WHOLE
