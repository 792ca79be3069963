"""Registry: a Board that keeps what it is shown, for whoever asks."""

from __future__ import annotations

from bisect import bisect_left

from deepseek_trt.engines.serving.metrics import METRICS, MetricSpec
from deepseek_trt.engines.serving.process.messages import Shown

_BY_NAME = {metric.name: metric for metric in METRICS}


class Registry:
    """Counters and gauges by name and label; histograms as counts in each bucket, the last beyond all, and a sum."""

    def __init__(self) -> None:
        plain = (metric for metric in METRICS if metric.kind != "histogram")
        self._values = {(metric.name, label): 0.0 for metric in plain for label in metric.values}
        binned = (metric for metric in METRICS if metric.kind == "histogram")
        self._bins = {metric.name: [0] * (len(metric.buckets) + 1) for metric in binned}
        self._sums = dict.fromkeys(self._bins, 0.0)

    def show(self, metric: MetricSpec, value: float, label: str = "") -> None:
        if metric.kind == "gauge":
            self._values[metric.name, label] = value
        elif metric.kind == "counter":
            self._values[metric.name, label] += value
        else:
            self._bins[metric.name][bisect_left(metric.buckets, value)] += 1
            self._sums[metric.name] += value

    def shown(self, id: int) -> Shown:
        """All of it, as the answer to request `id`; any thread may ask."""
        values = [(*key, value) for key, value in self._values.items()]
        return Shown(id, values, [(name, list(bins), self._sums[name]) for name, bins in self._bins.items()])


def value_of(shown: Shown, metric: MetricSpec) -> float:
    """Of a counter or gauge without labels."""
    return next(value for name, _, value in shown.values if name == metric.name)


def prometheus_text(shown: Shown, model: str) -> str:
    """What Prometheus scrapes (text format 0.0.4), each line with the model's name."""
    mark = f'model_name="{_escaped(model)}"'
    lines: list[str] = []
    named: set[str] = set()
    for name, label, value in shown.values:
        metric = _BY_NAME[name]
        lines += [] if name in named else _head(metric)
        named.add(name)
        own = f'{mark},{metric.label}="{label}"' if metric.label else mark
        lines.append(f"{name}{{{own}}} {value:.17g}")
    for name, bins, total in shown.histograms:
        lines += [*_head(_BY_NAME[name]), *_bucket_lines(_BY_NAME[name], bins, total, mark)]
    return "\n".join(lines) + "\n"


def _bucket_lines(metric: MetricSpec, bins: list[int], total: float, mark: str) -> list[str]:
    lines, count = [], 0
    for edge, inside in zip((*metric.buckets, "+Inf"), bins, strict=True):
        count += inside
        lines.append(f'{metric.name}_bucket{{{mark},le="{edge}"}} {count}')
    return [*lines, f"{metric.name}_sum{{{mark}}} {total:.17g}", f"{metric.name}_count{{{mark}}} {count}"]


def _head(metric: MetricSpec) -> list[str]:
    return [f"# HELP {metric.name} {metric.description}", f"# TYPE {metric.name} {metric.kind}"]


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
