"""Engines of the demo model on this GPU against PyTorch, through both TensorRTs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.bench.bench import BenchRequest, bench
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.pages import page_table
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.plans.build import build_with_library
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.engines.sessions.opening import choose_backend
from deepseek_trt.engines.sessions.ort import OrtCudaSession, OrtSession
from deepseek_trt.engines.sessions.session import row_latents
from deepseek_trt.engines.sessions.tensorrt.engine import KEPT
from deepseek_trt.engines.sessions.tensorrt.session import TrtSession
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BackendError, RequestError
from deepseek_trt.export.trust.cache import kept_bytes
from deepseek_trt.plugins.aot.compile import compile_all
from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS
from deepseek_trt.plugins.tensorrt.library import build_library
from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.request import ValidateRequest

PAGES = 33  # all that the profile allows: four rows of 512 tokens, and the scratch page
# Of a row's logits as a whole, against torch in float32: some 100 roundings lie one after the other in five layers, so
# about ten times the unit roundoff (bfloat16 2^-8, float16 2^-11), doubled, as a near-tie in a router may fall the
# other way. float32 engines multiply in float32 (the builder clears TF32) but sum hundreds of terms in another order.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}


@dataclasses.dataclass
class Engines:
    """A bundle with plans for this GPU."""

    bundle: Bundle
    open: list

    def session(self, **options) -> TrtSession:
        self.open.append(TrtSession(self.bundle, PAGES, **options))
        return self.open[-1]

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.bundle.manifest.dtype]


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def built(request, gpu, flavour, demo_checkpoint, bundle_of, tmp_path_factory) -> Bundle:
    exported = bundle_of(demo_checkpoint, dtype=request.param)
    bundle = Bundle.open(Path(shutil.copytree(exported.path, tmp_path_factory.mktemp("gpu") / "bundle")))
    model, dtype = bundle.manifest.model, bundle.manifest.dtype
    cubins = [gpu] if gpu in SHARED_LIMITS else []
    library = build_library(compile_all(model, dtype, cubins, jobs=4), model, dtype, bundle.path / "plugins")
    sms = (gpu,) if flavour.targets_chips else ()
    build_with_library(
        bundle, BuildSpec(flavour.name, sms, max_batch_size=4, max_input_len=64, max_seq_len=512), library.path
    )
    return bundle


@pytest.fixture
def engines(built):
    made = Engines(built, [])
    yield made
    for session in made.open:
        session.close()


@pytest.fixture(scope="module")
def reference(built):
    return TorchSession(built, PAGES)


class Batch:
    """Rows of random tokens with pages of their own."""

    def __init__(self, lengths, room=32, page=64):
        rng = np.random.default_rng(0)
        self.lengths = np.array(lengths, dtype=np.int32)
        self.ids = rng.integers(2, 4000, (len(lengths), max(lengths)), dtype=np.int64)
        each = -(-(max(lengths) + room) // page)
        pages = rng.permutation(np.arange(1, PAGES))[: len(lengths) * each]
        self.pages = pages.reshape(len(lengths), each).astype(np.int32)
        self.table = page_table(self.pages.tolist())

    def prefill(self, session, start=0, stop=None):
        ids = self.ids[:, start:stop]
        lengths = np.clip(self.lengths - start, 0, ids.shape[1]).astype(np.int32)
        past = np.full(len(ids), start, dtype=np.int32)
        return session.prefill(ids, lengths, past, self.table)


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    errors = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert errors.max() <= tolerance, f"relative errors by row: {errors}"


RAGGED = [(1,), (64,), (17, 1, 64, 33), (300, 5)]  # the last is longer than the engine takes at once


@pytest.mark.parametrize("lengths", RAGGED, ids=str)
def test_prefill(engines, reference, lengths):
    batch, session = Batch(lengths), engines.session()
    session.fill(np.nan)
    assert_close(batch.prefill(session), batch.prefill(reference), engines.tolerance)
    for layer in range(session.cache.layers):
        for row, length in enumerate(lengths):
            latents = [row_latents(s, layer, batch.pages[row], length) for s in (session, reference)]
            assert_close(*(each.reshape(1, -1) for each in latents), engines.tolerance)


def test_chunked_prefill(engines, reference):
    batch, session = Batch([50, 50]), engines.session()
    batch.prefill(session, 0, 23)
    assert_close(batch.prefill(session, 23), batch.prefill(reference), engines.tolerance)


def decode_steps(session, batch, tokens):
    """Logits of each step; every session is given the same tokens."""
    past, logits = batch.lengths.copy(), []
    for ids in tokens:
        logits.append(session.decode(ids, np.ones_like(past), past, batch.table)[:, 0])
        past += 1
    return logits


STEPS = np.random.default_rng(1).integers(2, 4000, (16, 3, 1), dtype=np.int64)


def test_sixteen_decode_steps(engines, reference):
    batch, session = Batch([3, 64, 40]), engines.session()
    for each in (session, reference):
        batch.prefill(each)
    steps = zip(decode_steps(session, batch, STEPS), decode_steps(reference, batch, STEPS), strict=True)
    for actual, expected in steps:
        assert_close(actual, expected, engines.tolerance)


def test_graphs_give_the_same_bits(engines):
    batch, runs = Batch([3, 64, 40]), []
    for cuda_graphs in (True, False):
        session = engines.session(cuda_graphs=cuda_graphs)
        batch.prefill(session)
        runs.append(decode_steps(session, batch, STEPS))
        assert bool(session._graphs) == cuda_graphs, "no step was captured" if cuda_graphs else "a step was captured"
    for with_graphs, without in zip(*runs, strict=True):
        np.testing.assert_array_equal(with_graphs, without)


def test_the_cache_is_written_in_place(engines):
    batch, session = Batch([5, 9]), engines.session()
    before = session.pool_addresses
    session.fill(np.nan)
    batch.prefill(session)
    pools = [session.pool(layer).astype(np.float32) for layer in range(session.cache.layers)]
    decode_steps(session, batch, STEPS[:3, :2])
    assert session.pool_addresses == before
    for layer, old in enumerate(pools):
        new = session.pool(layer).astype(np.float32)
        written = (np.isfinite(new) & ~np.isfinite(old)).all(-1)[1:]  # page 0 is scratch
        assert written.sum() == 2 * 3
        kept = np.isfinite(old[1:])
        np.testing.assert_array_equal(new[1:][kept], old[1:][kept])


def test_generated_tokens_do_not_depend_on_graphs(engines):
    config = dataclasses.replace(engines.bundle.manifest.model, eos_token_ids=())
    prompts, params = [[5, 6, 7], [9] * 70, [11, 12]], SamplingParams(24)
    sessions = (engines.session(cuda_graphs=on) for on in (True, False))
    made = [LLM(session, config).generate(prompts, params) for session in sessions]
    assert made[0] == made[1]


def test_a_second_session_starts_from_compiled_kernels(engines):
    """TensorRT-RTX compiles at run time and keeps what it made; the full TensorRT has nothing to keep."""
    session = engines.session()
    if session._engines["decode"]._cache is None:
        pytest.skip("this TensorRT compiles nothing at run time")
    batch = Batch([4])
    batch.prefill(session)
    first = decode_steps(session, batch, STEPS[:2, :1])
    name = session._engines["decode"].cache_name
    session.close()
    assert kept_bytes(KEPT, name)
    again = engines.session()
    batch.prefill(again)
    for old, new in zip(first, decode_steps(again, batch, STEPS[:2, :1]), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=engines.tolerance * np.abs(old).max())


def test_too_many_rows_are_refused_by_name(engines):
    with pytest.raises(RequestError, match="--max-batch-size 5"):
        Batch([1] * 5).prefill(engines.session())


def test_cuda_provider_gives_the_tokens_of_the_cpu(gpu, demo_checkpoint, bundle_of):
    """In float32 on both: sums in another order leave greedy tokens of a trained model as they are."""
    bundle = bundle_of(demo_checkpoint, dtype="float32")
    try:
        session = OrtCudaSession(bundle, 8)
    except BackendError as error:
        pytest.skip(str(error))
    config = dataclasses.replace(bundle.manifest.model, eos_token_ids=())
    prompts, params = [[5, 6, 7], [9] * 70, [11, 12]], SamplingParams(24)
    made = [LLM(each, config).generate(prompts, params) for each in (session, OrtSession(bundle, 8))]
    assert made[0] == made[1]


def test_auto_takes_the_plans(engines):
    assert choose_backend(engines.bundle).backend == "tensorrt"


def test_bench_measures_this_gpu(engines):
    report = bench(BenchRequest(engines.bundle.path, "tensorrt", (1, 4), context=64, new_tokens=16))
    assert report.backend == "tensorrt"
    assert report.bandwidth > 50e9  # bytes a second that no card with tensor cores is below
    assert all(0 < point.bandwidth_fraction < 1 for point in report.points)


def test_the_accuracy_report_passes(engines):
    """Every case of validate, whose prompts are longer than these engines take at once."""
    report = validate_bundle(ValidateRequest(engines.bundle.path, ("tensorrt",))).report
    assert report.passed, [(o.output, o.max_relative, o.tolerance) for o in report.backends[0].outputs]
