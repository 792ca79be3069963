"""Plans: real TensorRT-RTX builds with no GPU, every custom op a plugin, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from deepseek_trt.engines.plans import request
from deepseek_trt.engines.plans.build import build_with_library
from deepseek_trt.engines.plans.check import read_plans
from deepseek_trt.engines.plans.flavour import Flavour, open_flavour
from deepseek_trt.engines.plans.plan import BuildSpec, PlanRecord, plan_path
from deepseek_trt.engines.plans.profiles import profile_of
from deepseek_trt.engines.plans.request import BuildRequest, build_plans
from deepseek_trt.export.bundle import recipes
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import graphs_of
from deepseek_trt.export.bundle.manifest import list_added
from deepseek_trt.export.errors import BuildError, BundleError
from deepseek_trt.plugins.aot.compile import compile_all
from deepseek_trt.plugins.tensorrt.library import PluginLibrary, build_library

ROOT = Path(__file__).parents[3]
ATTENTION = ("MlaQuery", "MlaDecode", "MlaValue")  # of a decode graph
SPEC = BuildSpec(sms=(86, 89, 120), max_batch_size=4, max_input_len=128, max_seq_len=512)


@pytest.fixture(scope="module")
def bundle(demo_checkpoint, bundle_of, tmp_path_factory) -> Bundle:
    """A copy that plans may be written into."""
    exported = bundle_of(demo_checkpoint)
    return Bundle.open(Path(shutil.copytree(exported.path, tmp_path_factory.mktemp("plans") / "bundle")))


@pytest.fixture(scope="module")
def library(bundle) -> PluginLibrary:
    binaries = compile_all(bundle.manifest.model, bundle.manifest.dtype, [86, 89, 120], jobs=2, fallback=False)
    return build_library(binaries, bundle.manifest.model, bundle.manifest.dtype, bundle.path / "plugins")


@pytest.mark.tensorrt
@pytest.mark.parametrize("weights", ["shared", "embedded"])
def test_plans_build_and_a_rerun_does_nothing(bundle, library, weights):
    spec = dataclasses.replace(SPEC, weights=weights)
    phases: set[str] = set()
    plans = build_with_library(bundle, spec, library.path, lambda phase, done, steps: phases.add(phase))
    assert [p.fresh for p in plans] == [True, True]
    assert phases
    layers = bundle.manifest.model.num_hidden_layers
    moe = {"MoeRouter": layers - 1, "MoeExperts": layers - 1}
    wanted = ({"MlaPrefill": layers, **moe}, {**dict.fromkeys(ATTENTION, layers), "MoeLayer": layers - 1})
    for plan, plugins in zip(plans, wanted, strict=True):
        assert plan.record.plugins == plugins
        assert plan.record.layers["PLUGIN_V3"] == sum(plugins.values())
        assert plan.path.stat().st_size == plan.record.plan_bytes
        assert PlanRecord.of(bundle.listed_anew(), plan.record.graph) == plan.record
        names = [t.name for t in plan.record.inputs]
        assert set(plan.record.weights) <= set(names)
        assert [n for n in names if n not in plan.record.weights] == [
            t.name for t in bundle.graph(plan.record.graph).inputs
        ]
        assert ("model.embed_tokens.weight" in plan.record.weights) == (weights == "shared")
    stamps = [plan_path(bundle, g).stat().st_mtime_ns for g in ("prefill", "decode")]
    assert [p.fresh for p in build_with_library(bundle, spec, library.path)] == [False, False]
    assert [plan_path(bundle, g).stat().st_mtime_ns for g in ("prefill", "decode")] == stamps


@pytest.mark.tensorrt
def test_shared_plans_are_smaller_by_the_weights(bundle, library):
    shared = build_with_library(bundle, dataclasses.replace(SPEC, sms=(86,)), library.path)
    embedded = build_with_library(bundle, dataclasses.replace(SPEC, sms=(86,), weights="embedded"), library.path)
    for small, large in zip(shared, embedded, strict=True):
        moved = sum(w.recipe.size * 2 for w in bundle.manifest.weights if w.recipe.name in small.record.weights)
        assert large.record.plan_bytes - small.record.plan_bytes > 0.8 * moved


@pytest.mark.tensorrt
def test_without_plugins_it_is_an_error(bundle, library, monkeypatch):
    """What a build would do whose plugins were not taken: run the function bodies, quietly. Ours refuses."""
    monkeypatch.setattr("deepseek_trt.engines.plans.parse._plugins", lambda network: {})
    with pytest.raises(BuildError, match="plugins took over"):
        build_with_library(bundle, dataclasses.replace(SPEC, max_batch_size=3), library.path)


@pytest.mark.tensorrt
def test_library_without_the_chip_is_refused(bundle, library):
    with pytest.raises(BuildError, match="no kernels for SM 121"):
        build_with_library(bundle, dataclasses.replace(SPEC, sms=(121,)), library.path)


@pytest.mark.tensorrt
def test_library_of_another_dtype_is_refused(bundle, library, demo_checkpoint, bundle_of):
    other = bundle_of(demo_checkpoint, dtype="float32")
    with pytest.raises(BuildError, match="is for bfloat16, the bundle is float32"):
        build_with_library(other, SPEC, library.path)


@pytest.mark.tensorrt
def test_a_tensor_of_2_to_the_31_numbers_never_reaches_tensorrt(bundle, library):
    """V3's stacked experts: 256 x 2048 x 7168."""
    record = bundle.manifest.weights[0]
    large = dataclasses.replace(record, recipe=dataclasses.replace(record.recipe, shape=(256, 2048, 7168)))
    manifest = dataclasses.replace(bundle.manifest, weights=(large, *bundle.manifest.weights[1:]))
    with pytest.raises(BuildError, match=r"\[256, 2048, 7168\] holds 2\^31 numbers or more"):
        build_with_library(dataclasses.replace(bundle, manifest=manifest), SPEC, library.path)


SMALL_V3 = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}


V3_PLUGINS = {  # of prefill and decode, by what becomes of the checkpoint's fp8
    "none": (
        {"MlaPrefill": 2, "MoeBiasedRouter": 1, "MoeExperts": 1},
        {**dict.fromkeys(ATTENTION, 2), "MoeLayer": 1},
    ),
    "keep": tuple(
        {**dict.fromkeys(attention, 2), "MoeBiasedRouter": 1, "MoeExpertsNarrowFp8": 1, "LinearNarrowFp8": 14}
        for attention in (("MlaPrefill",), ATTENTION)
    ),
}


@pytest.mark.tensorrt
@pytest.mark.parametrize("quantize", V3_PLUGINS)
def test_a_model_of_v3s_kind_builds_with_its_experts_in_parts(tmp_path, bundle_of, monkeypatch, quantize):
    """Its router is a plugin, and each stack of experts two inputs, as if TensorRT took 300,000 numbers a tensor."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", ROOT / "benchmarks" / "make_checkpoint.py")
    make_checkpoint = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_checkpoint", make_checkpoint)
    spec.loader.exec_module(make_checkpoint)
    published = make_checkpoint.Published({**make_checkpoint.V3, **SMALL_V3}, 1)
    make_checkpoint.write_sparse(published, tmp_path / "checkpoint")
    made = bundle_of(tmp_path / "checkpoint", allow_zeros=True, quantize=quantize)
    exported = Bundle.open(Path(shutil.copytree(made.path, tmp_path / "bundle")))
    monkeypatch.setattr(recipes, "TENSORRT_MOST_NUMBERS", 300_000)
    spec = dataclasses.replace(SPEC, sms=(86,))
    prefill, decode = build_plans(BuildRequest(exported.path, spec))
    assert (prefill.record.plugins, decode.record.plugins) == V3_PLUGINS[quantize]
    for plan in (prefill, decode):
        parts = {t.name.split("experts.")[1]: t.dims for t in plan.record.inputs if ".part" in t.name}
        assert parts == {f"{name}_proj.part{i}": dims for name, dims in EXPECTED_PARTS.items() for i in (0, 1)}
    assert read_plans(Bundle.open(exported.path))["decode"].record == decode.record
    embedded = build_plans(BuildRequest(exported.path, dataclasses.replace(spec, weights="embedded")))[1].record
    assert [name.split("experts.")[1] for name in embedded.weights] == list(parts), "they are never embedded"


EXPECTED_PARTS = {"gate": (8, 128, 256), "up": (8, 128, 256), "down": (8, 256, 128)}


def test_damaged_library_is_refused(bundle, library, tmp_path):
    copy = Path(shutil.copytree(library.path.parent, tmp_path / "plugins")) / library.path.name
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    with pytest.raises(BuildError, match="is not the file that"):
        build_with_library(bundle, SPEC, copy)


@pytest.mark.tensorrt
def test_chips_must_be_named_and_known():
    import tensorrt_rtx as trt

    flavour = open_flavour("rtx")
    config = trt.Builder(flavour.logger).create_builder_config()
    with pytest.raises(BuildError, match="say which chips"):
        flavour.set_chips(config, ())
    with pytest.raises(BuildError, match="does not build for SM 90; it builds for"):
        flavour.set_chips(config, (90,))


@pytest.mark.tensorrt
def test_plans_can_be_captured():
    """TensorRT-RTX's notes ask for this flag where runs are captured into CUDA graphs; TensorRT has no such flag."""
    import tensorrt_rtx as trt

    flavour = open_flavour("rtx")
    config = trt.Builder(flavour.logger).create_builder_config()
    assert not config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    flavour.keep_capturable(config)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_a_flavour_without_chips_takes_the_gpu_of_the_machine():
    class Trt:
        __version__ = "10.15"

    flavour = Flavour("tensorrt", Trt, None)  # type: ignore[arg-type]
    flavour.set_chips(None, ())
    with pytest.raises(BuildError, match="leave out --sm 90"):
        flavour.set_chips(None, (90,))


def test_absent_tensorrt_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(BuildError, match=r"pip install 'deepseek-trt\[tensorrt\]'"):
        open_flavour("tensorrt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_input_len": 600}, "--max-input-len 600 is above --max-seq-len 512"),
        ({"max_batch_size": 0}, "at least 1"),
        ({"max_batch_size": 4096, "max_seq_len": 163840}, "2\\^31 numbers or more, which TensorRT does not take"),
    ],
)
def test_profiles_that_cannot_be(bundle, changes, words):
    with pytest.raises(BuildError, match=words):
        profile_of(bundle.graph("prefill"), bundle.manifest.cache, dataclasses.replace(SPEC, **changes))


@pytest.mark.parametrize(
    ("rows", "tokens", "fits"),
    [
        (128, 32768, "128 sequences of 29120 tokens or 113 sequences of 32768 tokens"),
        (1, 4_000_000, "1 sequences of 3728192 tokens"),
        (100_000, 128, "29126 sequences of 128 tokens"),
        (100_000, 5_000_000, "1 sequence of 3728192 tokens"),
    ],
)
def test_the_largest_pool_that_fits_is_named_and_fits(bundle, rows, tokens, fits):
    """Of V2's latents, 576 numbers a token."""
    cache = dataclasses.replace(bundle.manifest.cache, latent_dim=576, page_size=64)
    spec = dataclasses.replace(SPEC, max_batch_size=rows, max_seq_len=tokens)
    with pytest.raises(BuildError, match=f"the largest that fit are {fits}: lower"):
        profile_of(bundle.graph("prefill"), cache, spec)
    sequences, of = (int(word) for word in re.findall(r"\d+", fits)[:2])
    largest = dataclasses.replace(SPEC, max_batch_size=sequences, max_seq_len=of)
    pool = profile_of(bundle.graph("prefill"), cache, largest).shapes["past_key_values.0.latent"][2]
    assert math.prod(pool) < 2**31
    with pytest.raises(BuildError, match=r"2\^31"):
        profile_of(bundle.graph("prefill"), cache, dataclasses.replace(largest, max_seq_len=of + cache.page_size * 2))


def test_profiles_come_from_the_three_sizes(bundle):
    cache = bundle.manifest.cache
    prefill, decode = graphs_of(bundle.manifest.model, cache)
    shapes = profile_of(prefill, cache, SPEC).shapes
    assert shapes["input_ids"] == ((1, 1), (1, 128), (4, 128))
    assert shapes["page_table"] == ((1, 1), (1, 8), (4, 8))
    assert shapes["past_key_values.0.latent"][2] == (33, 64, cache.latent_dim)
    assert profile_of(decode, cache, SPEC).shapes["input_ids"] == ((1, 1), (4, 1), (4, 8))


def test_a_missing_or_damaged_record_is_named(bundle_of, demo_checkpoint, tmp_path):
    own = Bundle.open(Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path / "bundle")))
    with pytest.raises(BundleError, match="deepseek-trt build"):
        PlanRecord.of(own, "prefill")
    (own.path / "prefill.plan.json").write_text('{"schema_version": 2}')
    with pytest.raises(BundleError, match="does not list it: make it with deepseek-trt build"):
        PlanRecord.of(own, "prefill")
    list_added(own.path, ["prefill.plan.json"])
    with pytest.raises(BundleError, match=r"prefill.plan.json: \w+ is missing: make it"):
        PlanRecord.of(own.listed_anew(), "prefill")


@pytest.mark.tensorrt
@pytest.mark.parametrize(("sm", "words"), [(90, "does not build for SM 90; it builds for 80, 86"), (75, "SM 75")])
def test_a_chip_is_refused_before_kernels_are_compiled(bundle, monkeypatch, sm, words):
    monkeypatch.setattr(request, "build_in_locked", lambda *_: pytest.fail("kernels were compiled"))
    with pytest.raises(BuildError, match=words):
        build_plans(BuildRequest(bundle.path, BuildSpec(sms=(sm,))))
