"""TrtSession above the driver: what it checks, binds, stages and captures, over a GPU and a TensorRT that stand in."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.pages import answer_lengths, page_table, pages_needed
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.plans.check import given_dtype
from deepseek_trt.engines.plans.flavour import ErrorLog, Flavour
from deepseek_trt.engines.plans.plan import BuildSpec, PlanRecord
from deepseek_trt.engines.plans.profiles import profile_of
from deepseek_trt.engines.sessions.session import row_latents
from deepseek_trt.engines.sessions.tensorrt import engine as engine_module
from deepseek_trt.engines.sessions.tensorrt import session as trt_module
from deepseek_trt.engines.sessions.tensorrt import weight_upload
from deepseek_trt.engines.sessions.tensorrt.session import TrtSession, bucket
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.bundle import recipes
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import TensorSpec
from deepseek_trt.export.bundle.manifest import list_added
from deepseek_trt.export.bundle.recipes import tensorrt_parts
from deepseek_trt.export.bundle.weights import WeightReader
from deepseek_trt.export.errors import BackendError, BundleError, RequestError
from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, MANIFEST, SCHEMA, Manifest

_SPEC = importlib.util.spec_from_file_location("fake_gpu", Path(__file__).parents[1] / "fake_gpu.py")
fake_gpu = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake_gpu)

PAGE = 8
SPEC = BuildSpec(flavour="rtx", sms=(86, 120), max_batch_size=4, max_input_len=16, max_seq_len=64)
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]
NEW = 12


class World:
    """A bundle with plans and a library that nobody built, and a TensorRT and a GPU to run them."""

    def __init__(self, folder: Path, bundle: Bundle, monkeypatch, spec: BuildSpec = SPEC):
        self.bundle = Bundle.open(Path(shutil.copytree(bundle.path, folder / "bundle")))
        self.monkeypatch, self.spec = monkeypatch, spec
        self.device = fake_gpu.FakeDevice()
        self.library = self.bundle.path / "plugins" / LIBRARY
        self.library.parent.mkdir()
        self.write_library()
        self.records = {g.name: self.record(g) for g in self.bundle.manifest.graphs}
        for name, record in self.records.items():
            self.plan(name).write_bytes(name.encode())
            self.write(record)
        self.list_all()
        weights = {name: torch.from_numpy(array.copy()) for name, array in WeightReader(self.bundle).views().items()}
        name = {"rtx": "fake_rtx", "tensorrt": "fake"}[spec.flavour]
        self.trt = fake_gpu.fake_trt(name, self.bundle, self.records, self.device, weights)
        self.trt.__version__ = "1.0"
        self.loaded = []
        log = ErrorLog()
        monkeypatch.setattr(trt_module, "open_flavour", lambda flavour: Flavour(flavour, self.trt, log, log))
        monkeypatch.setattr(trt_module, "load_library", lambda path, trt, sha256: self.loaded.append(path))
        self.kept = {}
        monkeypatch.setattr(engine_module, "kept_bytes", lambda part, name: self.kept.get(name))
        monkeypatch.setattr(engine_module, "keep_bytes", lambda part, name, data: self.kept.update({name: data}))

    def list_all(self):
        """List what lies in the bundle now."""
        found = [f"{g.name}{end}" for g in self.bundle.manifest.graphs for end in (".plan", ".plan.json")]
        found += [f"plugins/{name}" for name in (LIBRARY, MANIFEST)]
        list_added(self.bundle.path, [name for name in found if (self.bundle.path / name).is_file()])
        self.bundle = self.bundle.listed_anew()

    def plan(self, graph):
        return self.bundle.path / f"{graph}.plan"

    def write(self, record):
        record.write(self.plan(record.graph).with_suffix(".plan.json"))

    def change(self, graph="prefill", **changes):
        self.write(dataclasses.replace(self.records[graph], **changes))
        self.list_all()

    def record(self, graph):
        given = [
            TensorSpec(t.name, t.dtype, tuple(-1 if isinstance(d, str) else d for d in t.dims)) for t in graph.inputs
        ]
        large = [w for w in self.bundle.manifest.weights if self.spec.weights == "shared" and len(w.recipe.shape) > 1]
        shared = [TensorSpec(p.name, given_dtype(w), p.shape) for w in large for p in tensorrt_parts(w.recipe)]
        return PlanRecord(
            graph=graph.name,
            spec=self.spec,
            flavour_version="1.0",
            inputs=(*given, *shared),
            weights=tuple(t.name for t in shared),
            outputs=graph.outputs,
            profile=profile_of(graph, self.bundle.manifest.cache, self.spec),
            layers={},
            plugins={},
            plugin_library=f"plugins/{LIBRARY}",
            plugin_library_sha256=self.library_sha256,
            source_sha256="",
            plan_sha256=hashlib.sha256(graph.name.encode()).hexdigest(),
            plan_bytes=len(graph.name),
        )

    def write_library(self, data=b"library", sms=(86, 120), ptx_sms=(), sampling=True):
        """`data`, and behind it the kernels that the session launches itself; the manifest names those of the chips."""
        rows = []
        listed = [*((False, sm) for sm in sms), *((True, sm) for sm in ptx_sms)] if sampling else []
        for kernel in ("sample_adjust", "sample_pick"):
            image = fake_gpu.sampling_image(kernel, self.bundle.manifest.model.vocab_size)
            for target in ((False, 80), (False, 86), (False, 89), (False, 90), (False, 120), (True, 80)):
                is_ptx, sm = target
                written = json.dumps({**image, "target": f"{'ptx' if is_ptx else 'sm'}{sm}"}).encode()
                if target in listed:
                    rows.append(fake_gpu.manifest_row(kernel, is_ptx, sm, len(data), written))
                data += written
        self.library.write_bytes(data)
        self.library_sha256 = hashlib.sha256(data).hexdigest()
        Manifest(SCHEMA, "a test", self.library_sha256, "", "", "float32", {}, [], sms, ptx_sms, {}, rows).write(
            self.library.with_name(MANIFEST)
        )

    def session(self, pages=24, **options):
        return TrtSession(self.bundle, pages, make_device=lambda: self.device, **options)


@pytest.fixture(scope="module")
def bundle(small_v2, bundle_of):
    return bundle_of(small_v2.checkpoint, dtype="float32", page_size=PAGE)


@pytest.fixture
def make_world(tmp_path, monkeypatch):
    return lambda bundle, **changes: World(tmp_path, bundle, monkeypatch, dataclasses.replace(SPEC, **changes))


@pytest.fixture
def world(make_world, bundle):
    return make_world(bundle)


def tokens_of(session, config, prompts=PROMPTS, new=NEW):
    llm = LLM(session, dataclasses.replace(config, eos_token_ids=()), limits=SchedulerLimits.for_batch(len(prompts)))
    return [result.token_ids for result in llm.generate(prompts, SamplingParams(new))]


@pytest.fixture(scope="module")
def expected(bundle):
    config = bundle.manifest.model
    pages = pages_needed(bundle.manifest.cache, answer_lengths(config, PROMPTS, NEW))
    return tokens_of(TorchSession(bundle, pages), config)


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("flavour", ["rtx", "tensorrt"])
@pytest.mark.parametrize("weights", ["shared", "embedded"])
def test_gives_the_tokens_of_torch(make_world, bundle, expected, flavour, weights, cuda_graphs):
    sms = SPEC.sms if flavour == "rtx" else ()
    world = make_world(bundle, flavour=flavour, weights=weights, sms=sms)
    session = world.session(cuda_graphs=cuda_graphs)
    assert tokens_of(session, bundle.manifest.model) == expected
    assert world.loaded == [world.library]
    off = "" if cuda_graphs else "; CUDA graphs are off: every step costs its launches"
    assert session.note == f"{flavour} 1.0 on a stand-in{off}"
    assert ("launch" in world.device.calls) == cuda_graphs
    assert not world.device.queue, "a step must be over when its logits are given"


@pytest.mark.parametrize("weights", ["shared", "embedded"])
@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_narrow_weights_give_the_tokens_of_torch(make_world, small_v2, bundle_of, quantize, weights):
    """Codes and scales go up as they lie in the file, each once; torch has them widened."""
    narrow = bundle_of(small_v2.checkpoint, dtype="float32", page_size=PAGE, quantize=quantize)
    pages = pages_needed(narrow.manifest.cache, answer_lengths(narrow.manifest.model, PROMPTS, NEW))
    world = make_world(narrow, weights=weights)
    session = world.session()
    assert tokens_of(session, narrow.manifest.model) == tokens_of(TorchSession(narrow, pages), narrow.manifest.model)
    codes = {w.recipe.name: w for w in narrow.manifest.weights if w.recipe.narrow and not w.recipe.is_scales}
    assert any(".mlp.experts." in name for name in codes)
    context, reader = world.trt.contexts["decode"], WeightReader(world.bundle)
    for name in codes if weights == "shared" else ():
        stored = reader.view(name).reshape(-1).view(np.uint8)
        assert bytes(world.device.bytes_at(context.addresses[name], stored.size)) == stored.tobytes()


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_a_narrow_cache_gives_the_tokens_of_torch(make_world, small_v2, bundle_of, cache_dtype, cuda_graphs):
    """Two pools a layer, each bound as past and present at once."""
    narrow = bundle_of(small_v2.checkpoint, dtype="float32", page_size=PAGE, cache_dtype=cache_dtype)
    pages = pages_needed(narrow.manifest.cache, answer_lengths(narrow.manifest.model, PROMPTS, NEW))
    session, in_torch = make_world(narrow).session(cuda_graphs=cuda_graphs), TorchSession(narrow, pages)
    assert len(set(session.pool_addresses)) == 2 * session.cache.layers
    assert tokens_of(session, narrow.manifest.model) == tokens_of(in_torch, narrow.manifest.model)
    session.fill(np.nan)
    assert np.isnan(session.pool(0)).all()


def test_experts_in_parts_give_the_same_tokens(make_world, bundle, expected, monkeypatch):
    """As if TensorRT took fewer numbers a tensor than a stack of experts holds: the parts are places in one copy."""
    stacks = [w.recipe for w in bundle.manifest.weights if ".mlp.experts." in w.recipe.name]
    monkeypatch.setattr(recipes, "TENSORRT_MOST_NUMBERS", max(stack.size for stack in stacks) // 2)
    assert all(len(tensorrt_parts(stack)) > 1 for stack in stacks)
    monkeypatch.setattr(recipes, "EXPERTS", "")  # other weights are as large in a model this small
    world = make_world(bundle)
    assert any(name.endswith(".part1") for name in world.records["decode"].weights)
    assert tokens_of(world.session(), bundle.manifest.model) == expected


def test_by_reference_gives_the_same_tokens(make_world, small_v2, bundle_of, expected, tmp_path):
    checkpoint = Path(shutil.copytree(small_v2.checkpoint, tmp_path / "checkpoint"))
    for shard in checkpoint.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(shard).items()}, shard)
    reference = bundle_of(checkpoint, page_size=PAGE, by_reference=True)
    assert tokens_of(make_world(reference).session(), reference.manifest.model) == expected


def test_one_copy_of_everything(world):
    session = world.session()
    prefill, decode = (world.trt.contexts[name] for name in ("prefill", "decode"))
    names = world.records["prefill"].weights
    assert names
    assert [prefill.addresses[n] for n in names] == [decode.addresses[n] for n in names]
    assert prefill.memory == decode.memory
    assert prefill.config.strategy is fake_gpu.Strategy.USER_MANAGED
    assert [prefill.addresses[name] for name in session.cache.pool_names] == list(session.pool_addresses)
    assert all((session.pool(layer) == 0).all() for layer in range(session.cache.layers))
    before = set(world.device.memory)
    tokens_of(session, world.bundle.manifest.model)
    assert set(world.device.memory) == before, "memory was allocated while tokens were made"


def test_weights_go_up_in_the_order_of_the_file(world, monkeypatch):
    monkeypatch.setattr(weight_upload, "STAGING_BYTES", 4096)  # so that tensors take several pieces, in two buffers
    seen = []
    session = world.session(progress=lambda done, total: seen.append((done, total)))
    stored = {w.recipe.name: w.recipe.size * 4 for w in world.bundle.manifest.weights}
    total = sum(stored[name] for name in world.records["prefill"].weights)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    context = world.trt.contexts["decode"]
    addresses = [context.addresses[n] for n in stored if n in world.records["prefill"].weights]
    assert addresses == sorted(addresses)
    arrays = WeightReader(world.bundle).views()
    for name in world.records["prefill"].weights:
        raw = world.device.bytes_at(context.addresses[name], arrays[name].nbytes)
        np.testing.assert_array_equal(raw.view(np.float32).reshape(arrays[name].shape), arrays[name])
    assert len(world.device.pinned) == 4, "the buffers of the weights were kept: others hold inputs, logits, samples"
    del session


def decode_once(session, rows, pages_a_row=1):
    owned = [list(range(1 + r * pages_a_row, 1 + (r + 1) * pages_a_row)) for r in range(rows)]
    ids = np.full((rows, 1), 7, dtype=np.int64)
    ones, none = np.ones(rows, dtype=np.int32), np.zeros(rows, dtype=np.int32)
    return session.decode(ids, ones, none, page_table(owned))[:, 0]


def test_a_bucket_is_captured_once_and_used_again(world):
    session = world.session()

    def calls(rows, pages_a_row=1):
        world.device.calls.clear()
        logits = decode_once(session, rows, pages_a_row)
        assert logits.shape == (rows, session.vocab_size)
        return world.device.calls

    run = ["upload", "run", "download"]
    assert calls(3) == run, "the first time a shape runs it may compile: not captured"
    again = [*run[:-1], "capture", *run]
    assert calls(4) == again, "3 and 4 rows share a bucket; a capture follows a run, and runs nothing"
    assert calls(3) == ["launch", "download"]
    assert calls(4) == ["launch", "download"]
    assert calls(2) == run
    assert calls(4, pages_a_row=3) == run, "another table width"
    assert calls(4, pages_a_row=4) == again
    assert calls(3) == ["launch", "download"], "graphs of other buckets stay"


def test_graphs_give_the_same_bits(world, make_world):
    graphs, plain = world.session(), world.session(cuda_graphs=False)
    for rows in (1, 3, 3, 3, 2, 3, 1, 1):
        np.testing.assert_array_equal(decode_once(graphs, rows), decode_once(plain, rows))


def test_several_tokens_give_what_they_give_one_by_one(world):
    """Three tokens are padded to four, three rows to four: padding is written to the scratch page, and cut off."""
    several, single = world.session(), world.session()
    ids, new = np.arange(9, dtype=np.int64).reshape(3, 3) + 5, np.array([3, 1, 2], dtype=np.int32)
    table, ones = page_table([[1], [2], [3]]), np.ones(3, dtype=np.int32)
    logits = several.decode(ids, new, np.zeros(3, dtype=np.int32), table)
    assert logits.shape == (3, 3, several.vocab_size)
    for at in range(3):
        alone = single.decode(ids[:, at : at + 1], ones, np.full(3, at, dtype=np.int32), table)
        rows = np.flatnonzero(new > at)
        np.testing.assert_allclose(logits[rows, at], alone[rows, 0], rtol=0, atol=1e-4)
    with pytest.raises(RequestError, match=r"\[1, 9\]: decode takes at most 8 tokens a row"):
        several.decode(np.zeros((1, 9), dtype=np.int64), ones[:1], ones[:1], table[:1])


@pytest.mark.parametrize("flavour", ["rtx", "tensorrt"])
def test_shapes_that_take_turns(make_world, bundle, flavour):
    """A, B, A, B, A: each is captured after a run of its own shapes, on a context that the other does not touch."""
    world = make_world(bundle, flavour=flavour, sms=SPEC.sms if flavour == "rtx" else ())
    graphs, plain = world.session(), world.session(cuda_graphs=False)
    for rows in (1, 2, 1, 2, 1, 2, 4, 1, 4, 2, 4):
        np.testing.assert_array_equal(decode_once(graphs, rows), decode_once(plain, rows))
    assert world.device.calls.count("capture") == 3
    assert graphs.note == f"{flavour} 1.0 on a stand-in"


UNCAPTURED = {  # what goes wrong with a capture, and what is said of it
    "TensorRT says that it cannot": (lambda w: setattr(w.trt, "capturable", False), "cannot be captured; build the"),
    "TensorRT refuses the run": (lambda w: setattr(w.trt, "refuse_captured_runs", True), "the first cause"),
    "there is no other context": (lambda w: setattr(w.trt, "refuse_more_contexts", True), "refuses an execution cont"),
    "the driver refuses": (lambda w: setattr(w.device, "refuse_capture", "out of memory"), "out of memory"),
}


@pytest.mark.parametrize(("break_it", "words"), UNCAPTURED.values(), ids=UNCAPTURED.keys())
def test_what_cannot_be_captured_runs_plain_and_says_so_once(world, caplog, break_it, words):
    session, plain = world.session(), world.session(cuda_graphs=False)
    break_it(world)
    for rows in (2, 2, 2, 2, 1, 1, 1):
        world.device.calls.clear()
        expected = decode_once(plain, rows)
        np.testing.assert_array_equal(decode_once(session, rows), expected)
        assert "launch" not in world.device.calls
    assert session.note.count("decode runs without a CUDA graph, and so slower: ") == 1
    assert words in session.note
    assert [record.message for record in caplog.records] == [session.note.partition("; ")[2]]


def test_a_bucket_whose_capture_failed_leaves_the_others_theirs(world, caplog):
    session = world.session()
    world.device.refuse_capture = "once"
    decode_once(session, 2), decode_once(session, 2)
    world.device.refuse_capture = ""
    world.device.calls.clear()
    for rows in (1, 1, 2, 1, 2):
        decode_once(session, rows)
    assert world.device.calls.count("capture") == 1
    assert world.device.calls.count("launch") == 1


@pytest.mark.parametrize(
    ("size", "most", "padded"), [(1, 8, 1), (2, 8, 2), (3, 8, 4), (5, 6, 6), (6, 6, 6), (64, 64, 64)]
)
def test_buckets(size, most, padded):
    assert bucket(size, most) == padded


def test_padding_rows_touch_the_scratch_page_only(world):
    session = world.session()
    session.fill(np.nan)
    assert np.isfinite(decode_once(session, 3)).all()
    for layer in range(session.cache.layers):
        pool = session.pool(layer)
        assert np.isnan(pool[4:]).all()
        assert [int(np.isfinite(page).all(-1).sum()) for page in pool[1:4]] == [1, 1, 1]


@pytest.mark.parametrize("all_logits", [False, True])
def test_long_and_ragged_prompts_go_in_pieces(make_world, small_v2, bundle_of, all_logits):
    """Up to 45 tokens through an engine for 16: as if in one piece."""
    options = {"all_logits": True} if all_logits else {}
    bundle = bundle_of(small_v2.checkpoint, dtype="float32", page_size=PAGE, **options)
    lengths = np.array([45, 0, 16, 17], dtype=np.int32)
    ids = np.arange(4 * 45).reshape(4, 45) % 250
    owned = [list(range(1 + 6 * row, 7 + 6 * row)) for row in range(4)]
    given = (ids, lengths, np.zeros(4, dtype=np.int32), page_table(owned))
    session, torch_session = make_world(bundle).session(pages=25), TorchSession(bundle, 25)
    actual, wanted = session.prefill(*given), torch_session.prefill(*given)
    assert actual.shape == wanted.shape
    real = np.arange(45) < lengths[:, None] if all_logits else lengths > 0
    np.testing.assert_allclose(actual[real], wanted[real], atol=2e-4)  # float32 sums in another order
    for layer in range(session.cache.layers):
        for row, length in enumerate(lengths):
            latents = [row_latents(s, layer, np.array(owned[row]), length) for s in (session, torch_session)]
            np.testing.assert_allclose(*latents, atol=2e-4)


def test_more_rows_than_the_engines_take(world):
    with pytest.raises(RequestError, match=r"5 prompts at once; the engines were built for 4: .*--max-batch-size 5"):
        tokens_of(world.session(), world.bundle.manifest.model, [[1]] * 5, new=2)


def test_longer_than_the_engines_take(world):
    with pytest.raises(RequestError, match=r"up to 72 tokens; the engines were built for 64: .*--max-seq-len 72"):
        tokens_of(world.session(), world.bundle.manifest.model, [[1] * 60], new=12)


def test_more_pages_than_the_engines_take(world):
    with pytest.raises(BackendError, match=r"34 cache pages are needed, the engines take at most 33: .*--max-seq-len"):
        world.session(pages=34)


def test_more_pages_than_any_engine_takes(world):
    with pytest.raises(
        BackendError, match=r"needed, 2\^31 numbers a layer or more; TensorRT takes \d+, \d+ tokens of all"
    ):
        world.session(pages=2**31 - 1)


def remove(path):
    return lambda world: (world.bundle.path / path).unlink()


REFUSED = {
    "no record": (remove("decode.plan.json"), BundleError, "deepseek-trt build"),
    "no plan": (remove("decode.plan"), BundleError, r"decode\.plan is missing: .*deepseek-trt build"),
    "other bytes": (lambda w: w.plan("prefill").write_bytes(b"PREFILL"), BundleError, "sha256 differs.*build again"),
    "another plan": (
        lambda w: w.change(plan_sha256="0" * 64),
        BundleError,
        "prefill.plan is not the plan that its record describes",
    ),
    "a library elsewhere": (
        lambda w: w.change(plugin_library=f"../plugins/{LIBRARY}"),
        BundleError,
        "plugin_library .* leads out of the folder",
    ),
    "other options": (
        lambda w: w.change(spec=dataclasses.replace(SPEC, max_batch_size=3)),
        BackendError,
        "built with different options: run deepseek-trt build again",
    ),
    "another version": (
        lambda w: setattr(w.trt, "__version__", "2.0"),
        BackendError,
        "built by tensorrt_rtx 1.0, this is 2.0: .* or install 1.0",
    ),
    "no library": (remove(f"plugins/{LIBRARY}"), BundleError, "is missing: run deepseek-trt plugins"),
    "no manifest": (remove(f"plugins/{MANIFEST}"), BundleError, "is missing: run deepseek-trt plugins"),
    "another library": (
        lambda w: (w.write_library(b"another"), w.list_all()),
        BackendError,
        "not the library that prefill.plan was",
    ),
    "a planted library": (lambda w: w.write_library(b"another"), BundleError, "is not the file that manifest.json"),
    "damaged library": (lambda w: w.library.write_bytes(b"x"), BundleError, "is not the file that"),
    "no kernels": (
        lambda w: (w.write_library(sms=(90,)), w.list_all()),
        BackendError,
        "no kernels for SM 86; it has SM 90: run deepseek-trt plugins --sm 86",
    ),
    "another bundle": (
        lambda w: w.change(inputs=w.records["prefill"].inputs[1:]),
        BackendError,
        "does not take the inputs of prefill.onnx",
    ),
    "other weights": (
        lambda w: w.change(
            inputs=tuple(
                dataclasses.replace(t, dims=(3, 3)) if t.name == "lm_head.weight" else t
                for t in w.records["prefill"].inputs
            )
        ),
        BackendError,
        r"wants lm_head.weight as float32 \[3, 3\]",
    ),
}


@pytest.mark.parametrize(("damage", "error", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_belong_together_is_refused_before_tensorrt_reads_it(world, damage, error, words):
    damage(world)
    with pytest.raises(error, match=words):
        world.session()
    assert world.trt.deserialised == []
    assert world.loaded == []


@pytest.mark.parametrize(
    ("sm", "sms", "ptx", "runs"),
    [
        (86, (86,), (), True),
        (89, (86,), (), True),
        (86, (89,), (), False),
        (121, (120,), (), False),
        (121, (), (80,), True),
    ],
)
def test_which_kernels_run_on_which_chip(world, sm, sms, ptx, runs):
    world.device.sm = sm
    world.change("prefill", spec=dataclasses.replace(SPEC, sms=(sm,)))
    world.change("decode", spec=dataclasses.replace(SPEC, sms=(sm,)))
    world.write_library(sms=sms, ptx_sms=ptx)
    world.list_all()
    if runs:
        compiled = any(own // 10 == sm // 10 for own in sms)
        stands_in = f"no kernels compiled for SM {sm}: PTX made for SM 80 stands in"
        assert (stands_in in world.session().note) != compiled
    else:
        with pytest.raises(BackendError, match=f"no kernels for SM {sm}"):
            world.session()


VALIDITY = fake_gpu.EngineValidity


def test_a_chip_that_was_not_named(make_world, bundle):
    """TensorRT-RTX says itself whether a plan runs; the full TensorRT does not, so the record decides."""
    world = make_world(bundle)
    world.write_library(ptx_sms=(80,))
    world.list_all()
    world.device.sm = 90
    assert "built for SM 86, 120, runs on SM 90, maybe slower" in world.session().note
    world.trt.validity = (VALIDITY.INVALID, 2)
    with pytest.raises(BackendError, match=r"was built for SM 86, 120; a stand-in is SM 90: .*build with --sm 90"):
        world.session()


def test_what_tensorrt_says_of_a_plan(world):
    world.trt.validity = (VALIDITY.SUBOPTIMAL, 2)
    assert "maybe slower (UNSUPPORTED_CC)" in world.session().note
    world.trt.validity = (VALIDITY.INVALID, 4)
    with pytest.raises(BackendError, match=r"does not take .*prefill.plan on a stand-in \(OLD_CUDA_DRIVER\)"):
        world.session()


def test_an_embedded_librarys_ptx_is_said_where_it_lies_beside(make_world, bundle):
    world = make_world(bundle, embed_plugins=True)
    world.write_library(sms=(120,), ptx_sms=(80,))
    world.list_all()
    first = world.session()
    assert "PTX made for SM 80 stands in" in first.note
    world.library.unlink()
    second = world.session()
    assert "PTX" not in second.note


def test_what_the_plugin_library_says_while_it_loads_is_in_the_note(world):
    """Its binaries may not load where its manifest cannot tell: on an older driver."""
    world.trt.on_context = lambda: [
        world.trt.say("WARNING", "deepseek-trt: MlaDecode runs PTX for SM 80"),
        world.trt.say("WARNING", "deepseek-trt: MlaDecode runs PTX for SM 80"),
        world.trt.say("WARNING", "something of TensorRT's own"),
    ]
    assert world.session().note == "rtx 1.0 on a stand-in; MlaDecode runs PTX for SM 80"


def test_the_full_tensorrt_needs_the_named_chip(make_world, bundle):
    world = make_world(bundle, flavour="tensorrt", sms=(86,))
    world.write_library(ptx_sms=(80,))
    world.list_all()
    world.device.sm = 90
    with pytest.raises(BackendError, match="build with --sm 90"):
        world.session()


def test_a_plan_that_tensorrt_does_not_take_is_reported_in_its_words(world):
    world.plan("prefill").write_bytes(b"garbage")
    world.change(plan_sha256=hashlib.sha256(b"garbage").hexdigest())
    with pytest.raises(
        BackendError, match=r"does not take .*prefill.plan \(magicTag differs\): run deepseek-trt build"
    ):
        world.session()
    assert world.device.closed


def test_a_run_that_fails_is_reported_in_its_words(world):
    session = world.session()
    world.trt.refuse_runs = True
    with pytest.raises(BackendError, match=r"refuses the run with decode.plan: the first cause"):
        decode_once(session, 1)


def test_a_gpu_that_is_too_small_is_given_back(world):
    world.device.room = 4096
    with pytest.raises(BackendError, match="no room for the latent cache of 24 pages"):
        world.session()
    assert world.device.closed


def test_compiled_kernels_are_kept_in_the_cache(world):
    world.session().close()
    assert world.kept.keys() == {f"{r.plan_sha256[:32]}.runtime-cache" for r in world.records.values()}
    assert [*world.kept.values()] == [b"compiled"] * 2
    world.device.closed = False
    world.session().close()
    assert [*world.kept.values()] == [b"compiled+"] * 2, "the second session started from it"


def test_only_what_is_captured_is_compiled_before_it_runs(world):
    world.session()
    kinds = {n: c.config.dynamic_shapes_kernel_specialization_strategy for n, c in world.trt.contexts.items()}
    assert kinds == {"prefill": fake_gpu.Specialisation.LAZY, "decode": fake_gpu.Specialisation.EAGER}


def test_a_session_that_goes_gives_the_gpu_back(world):
    """And the contexts of its graphs first."""
    stock, held, left = world.device.close, [], []
    world.monkeypatch.setattr(world.device, "close", lambda: (left.extend(c() for c in held), stock()))
    session = world.session()
    for _ in range(3):
        decode_once(session, 2)
    contexts = world.trt.contexts["decode"].engine.contexts
    held += [weakref.ref(context) for context in contexts[1:]]
    contexts.clear()
    del session
    gc.collect()
    assert world.device.closed
    assert left == [None]


def test_imports_no_torch():
    module = "deepseek_trt.engines.sessions.tensorrt.session"
    code = f"import sys, {module}; print([m for m in ('torch', 'onnx', 'triton') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.tensorrt
def test_the_real_tensorrt_refuses_what_is_not_a_plan(world, monkeypatch):
    from deepseek_trt.engines.plans.flavour import open_flavour

    monkeypatch.setattr(trt_module, "open_flavour", open_flavour)
    version = open_flavour("rtx").version
    for graph in ("prefill", "decode"):
        world.change(graph, flavour_version=version)
    with pytest.raises(BackendError, match=r"rtx does not take .*prefill.plan on a stand-in \(MALFORMED_ENGINE\)"):
        world.session()
