"""What /metrics says adds up to what clients saw."""

from __future__ import annotations

import time

import pytest

INPUTS = {"text_input": "The number", "max_tokens": 6, "min_tokens": 6}
ASKED = 5


@pytest.fixture(scope="module")
def values(server):
    """Differences over a few requests of each kind, by name and label."""

    def now():
        return {
            (s.name, s.labels.get("result") or s.labels.get("le") or ""): s.value
            for s in server.metrics()
            if s.name.startswith("deepseek_trt_") and s.labels.get("model") == "deepseek_v2"
        }

    def counted():
        return {k: v for k, v in now().items() if k[0] == "deepseek_trt_requests_total"}

    def settled():  # metrics come a moment after the answers that they count, of other tests' requests, too
        first = counted()
        time.sleep(0.5)
        return server.metric("deepseek_trt_inflight_requests") == 0 and counted() == first

    assert server.wait_for(settled)
    before = now()
    replies = [server.generate(**INPUTS).json for _ in range(ASKED)]
    server.generate(text_input="")
    list(server.stream(text_input="The", max_tokens=2000, min_tokens=2000, timeout_ms=200))

    def ended():
        return sum(v - before.get(k, 0) for k, v in counted().items()) == ASKED + 2

    assert server.wait_for(ended)
    return {"replies": replies, "now": now(), "new": {k: v - before.get(k, 0) for k, v in now().items()}}


def test_requests_by_result(values):
    results = {k[1]: v for k, v in values["new"].items() if k[0] == "deepseek_trt_requests_total"}
    assert results == {"ok": ASKED, "invalid": 1, "timeout": 1, "refused": 0, "cancelled": 0, "failed": 0}


def test_tokens(values):
    """Those of the request that ran out of time count too."""
    counted = sum(reply["num_input_tokens"] for reply in values["replies"])
    assert counted < values["new"]["deepseek_trt_input_tokens_total", ""] <= counted + 8
    assert values["new"]["deepseek_trt_output_tokens_total", ""] > ASKED * INPUTS["max_tokens"]


@pytest.mark.parametrize("name", ["time_to_first_token", "time_per_output_token"])
def test_histograms(values, name):
    new = values["new"]
    count = new[f"deepseek_trt_{name}_seconds_count", ""]
    buckets = [v for k, v in new.items() if k[0] == f"deepseek_trt_{name}_seconds_bucket"]
    assert count == ASKED + 1
    assert buckets == sorted(buckets)
    assert buckets[-1] == count
    assert new[f"deepseek_trt_{name}_seconds_sum", ""] > 0


def test_nothing_is_held_when_nothing_runs(server, values):
    def held():
        return [server.metric(f"deepseek_trt_{n}") for n in ("batch_size", "inflight_requests", "cache_pages_used")]

    assert server.wait_for(lambda: held() == [0, 0, 0])
    assert server.metric("deepseek_trt_cache_pages_free", model="deepseek_v2") > 0
    assert ("deepseek_trt_preemptions_total", "") in values["now"]
    assert ("deepseek_trt_cancellations_total", "") in values["now"]
