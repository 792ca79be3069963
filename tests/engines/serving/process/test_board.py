"""Metrics as a registry keeps them and Prometheus reads them."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("msgspec", reason="the extra `serve` is not installed")

from deepseek_trt.engines.serving import metrics as m
from deepseek_trt.engines.serving.process.board import Registry, prometheus_text

LINE = re.compile(r'[a-z_]+\{model_name="(\\.|[^"\\\n])*"(,[a-z]+="[^"]*")?\} (\d|\.|e|\+|-)+')


def test_what_is_shown_is_what_prometheus_reads():
    registry = Registry()
    registry.show(m.REQUESTS, 2, "ok")
    registry.show(m.REQUESTS, 1, "ok")
    registry.show(m.BATCH_SIZE, 5)
    registry.show(m.BATCH_SIZE, 4)
    for seconds in (0.001, 0.005, 0.3, 99):
        registry.show(m.FIRST_TOKEN, seconds)
    lines = prometheus_text(registry.shown(0), 'a "quoted\\ name\n').splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert all(line.startswith("#") or LINE.fullmatch(line) for line in lines)
    mark = 'model_name="a \\"quoted\\\\ name\\n"'
    assert values[f'deepseek_trt_requests_total{{{mark},result="ok"}}'] == "3"
    assert values[f"deepseek_trt_batch_size{{{mark}}}"] == "4"
    first = "deepseek_trt_time_to_first_token_seconds"
    buckets = [values[f'{first}_bucket{{{mark},le="{edge}"}}'] for edge in (0.005, 0.25, 0.5, 60.0, "+Inf")]
    assert buckets == ["2", "2", "3", "3", "4"]
    assert float(values[f"{first}_sum{{{mark}}}"]) == pytest.approx(99.306)
    assert values[f"{first}_count{{{mark}}}"] == "4"
    described = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert sorted(described) == sorted(metric.name for metric in m.METRICS)
