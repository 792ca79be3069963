"""bench: bytes against sums by hand, times from the scheduler's own steps, bandwidth of memory that is counted."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.bench.bandwidth import copy_bandwidth, read_bandwidth
from deepseek_trt.engines.bench.bench import BenchRequest, _bandwidth, bench
from deepseek_trt.engines.bench.roofline import decode_traffic, distinct_experts
from deepseek_trt.engines.sessions.opening import Choice, SessionRequest
from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.plugins.cpu.library import ExpertsHit, cpu_library
from deepseek_trt.validate.backends.exported import ExportedSession

_SPEC = importlib.util.spec_from_file_location("fake_gpu", Path(__file__).parents[1] / "fake_gpu.py")
fake_gpu = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake_gpu)


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of):
    return bundle_of(demo_checkpoint)


def test_bytes_of_the_demo_model_by_hand(demo):
    """5 layers of width 128, the first dense; 16 experts of 64, 4 a token, 2 shared; latents of 64 + 16."""
    attention = 96 * 128 + 96 + 4 * 48 * 96 + 80 * 128 + 64 + 4 * 32 * 64 * 2 + 128 * 128  # q_a .. o_proj
    dense = 3 * 384 * 128
    shared_and_gate = 3 * 2 * 64 * 128 + 16 * 128
    always = 5 * (attention + 2 * 128) + dense + 4 * shared_and_gate + 128 + 4096 * 128  # and the output matrix
    expert = 3 * 64 * 128
    hit = 6.25  # a layer, the mean
    traffic = decode_traffic(demo.manifest, demo.manifest.cache, [100, 30], "bfloat16", hit)
    assert traffic["weights"] == 2 * (always + 2 * 128)  # and two rows of the embedding
    assert traffic["experts"] == 2 * 4 * hit * expert
    assert traffic["cache"] == 5 * 80 * 2 * (130 + 2)
    wide = decode_traffic(demo.manifest, demo.manifest.cache, [100, 30], "float32", hit)
    assert wide == {**{name: 2 * traffic[name] for name in ("weights", "experts")}, "cache": traffic["cache"]}


def test_narrow_weights_are_counted_as_they_are_read(demo, demo_checkpoint, tmp_path):
    """8.5 bits of each number in int8, its share of a scale with them; torch holds all of them as float32."""
    narrow = export_bundle(ExportRequest(demo_checkpoint, tmp_path / "int8", quantize="int8")).bundle
    cache = demo.manifest.cache
    stored, whole = (decode_traffic(b.manifest, cache, [9], "float32", 4) for b in (narrow, demo))
    assert stored["experts"] == whole["experts"] * 8.5 / 32
    assert stored["weights"] < whole["weights"]
    assert decode_traffic(narrow.manifest, cache, [9], "float32", 4, widens=True) == whole
    asked = {"context": 4, "new_tokens": 3, "threads": 1}
    found = [bench(BenchRequest(narrow.path, backend, **asked)) for backend in ("ort", "torch")]
    assert [report.narrow_formats for report in found] == [("int8",), ()]


def test_expected_experts_are_those_of_draws(demo):
    model, rng = demo.manifest.model, np.random.default_rng(0)
    assert distinct_experts(model, 1) == pytest.approx(4)
    draws = [len({e for _ in range(3) for e in rng.permutation(16)[:4]}) for _ in range(4000)]
    spread = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - distinct_experts(model, 3)) < 5 * spread


def routed(logits, config):
    """The experts of each token in numpy: the best of the softmax within the groups that hold the best ones."""
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    grouped = scores.reshape(len(scores), config["n_group"], -1)
    worst = np.argsort(-grouped.max(-1), axis=-1)[:, config["topk_group"] :]
    np.put_along_axis(grouped, worst[..., None], 0.0, axis=1)
    return np.argsort(-grouped.reshape(scores.shape), axis=-1)[:, : config["num_experts_per_tok"]]


def test_experts_counted_are_those_that_numpy_routes_as_the_exported_graphs_see_them(small, bundle_of, monkeypatch):
    if not cpu_library().path:
        pytest.skip(cpu_library().reason)
    calls = []

    class Recorded(OrtSession):
        def prefill(self, *feeds):
            calls.append(("prefill", feeds))
            return super().prefill(*feeds)

        def decode(self, *feeds):
            calls.append(("decode", feeds))
            return super().decode(*feeds)

    monkeypatch.setattr("deepseek_trt.engines.sessions.ort.OrtSession", Recorded)
    bundle = bundle_of(small.checkpoint)
    (point,) = bench(BenchRequest(bundle.path, "ort", (3,), context=9, new_tokens=6, threads=2)).points

    exported, counts = ExportedSession(SessionRequest(bundle, pages=64, threads=1)), []
    exported.show(("router_logits",))
    for graph, feeds in calls:
        getattr(exported, graph)(*feeds)
        if graph == "decode":
            counts.append([len(np.unique(routed(logits, small.raw))) for logits in exported.seen.values()])
    measured = counts[-5:]  # after those of the run that warms up
    assert np.shape(measured) == (5, 2)
    assert (point.experts, point.experts_hit) == ("measured", np.mean(measured))
    assert len(np.unique(counts)) > 1


def test_report(demo):
    lines = []
    report = bench(BenchRequest(demo.path, "ort", (1, 3), context=20, new_tokens=5, threads=1), lines.append)
    assert lines[0].startswith("backend: ort")
    assert (report.backend, report.dtype) == ("ort", "bfloat16")
    assert report.weights_dtype == ("bfloat16" if cpu_library().path else "float32")
    assert [p.batch_size for p in report.points] == [1, 3]
    for point in report.points:
        times = point.time_per_token
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
        assert min(point.tokens_per_second, point.prefill_tokens_per_second, point.time_to_first_token) > 0
        assert point.experts == ("measured" if cpu_library().path else "expected")
        assert 4 <= point.experts_hit <= min(4 * point.batch_size, 16)
        moved = sum(point.bytes_a_step.values())
        assert point.bandwidth_fraction == pytest.approx(moved / times["p50"] / report.bandwidth)


def test_a_bundle_without_a_tokenizer(small_v2, bundle_of):
    bundle = bundle_of(small_v2.checkpoint)
    assert bundle.tokenizer_path is None
    assert bench(BenchRequest(bundle.path, "torch", context=4, new_tokens=3)).points[0].bytes_a_step["experts"] > 0


def test_experts_that_are_not_counted_are_expected(demo, monkeypatch):
    request = BenchRequest(demo.path, "torch", (2,), context=4, new_tokens=3)
    (point,) = bench(request).points
    assert (point.experts, point.experts_hit) == ("expected", distinct_experts(demo.manifest.model, 2))
    every = itertools.count()
    monkeypatch.setattr(TorchSession, "experts_hit", lambda self: ExpertsHit(next(every), 40))
    (partly,) = bench(request).points  # one layer of many
    assert (partly.experts, partly.experts_hit) == ("expected", point.experts_hit)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 0}, "context 0"),
        ({"new_tokens": 2}, "new_tokens 2: must be at least 3"),
        ({"batch_sizes": (1, 0)}, "at least 1"),
        ({"context": 2040, "new_tokens": 9}, "2040 and 9 new tokens: the model takes 2048"),
    ],
)
def test_what_cannot_be_measured_is_refused(demo, options, words):
    with pytest.raises(RequestError, match=words):
        bench(BenchRequest(demo.path, **options))


def ticking(seconds):
    ticks = itertools.count(step=seconds)
    return lambda: next(ticks)


def test_bandwidth_is_bytes_over_the_best_time():
    assert read_bandwidth(2, 2**20, ticking(0.5)) == 2**20 / 0.5
    device = fake_gpu.FakeDevice()
    device.activate()
    assert copy_bandwidth(device, 2**20, ticking(0.25)) == 2 * 2**20 / 0.25
    assert set(device.calls) == {"copy"}


def test_a_gpus_bandwidth_is_its_own_and_its_memory_is_given_back(monkeypatch):
    monkeypatch.setattr("deepseek_trt.engines.bench.bandwidth.GPU_BYTES", 2**16)
    device = fake_gpu.FakeDevice(room=2**32)
    assert _bandwidth(Choice("tensorrt", ""), 1, lambda: device) > 0
    assert device.closed
