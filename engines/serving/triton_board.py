"""MetricBoard: metrics shown by tritonserver, whose Python backend gives triton_python_backend_utils."""

from __future__ import annotations

import ctypes
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from deepseek_trt.engines.serving.metrics import METRICS, MetricSpec

_SHOWS = {"counter": "increment", "gauge": "set", "histogram": "observe"}


class MetricBoard:
    """A Board over the server's /metrics.

    Its metrics are never deleted: a model that is loaded again finds them and counts on. An unloading model and its
    successor share a counter in the server, which deletes it with the first of them and then writes into freed memory
    (triton-inference-server/server issue 8663). Nor may they be deleted at the process's end: it crashes (issue 8662).
    """

    def __init__(self, labels: dict[str, str], specs: tuple[MetricSpec, ...] = METRICS) -> None:
        kinds = pb_utils.MetricFamily
        self._families = {
            spec: kinds(name=spec.name, description=spec.description, kind=getattr(kinds, spec.kind.upper()))
            for spec in specs
        }
        for family in self._families.values():  # it owns its metrics; one reference more, and it is never deleted
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(family))
        self._metrics = {
            (spec, value): _metric(family, spec, labels, value)
            for spec, family in self._families.items()
            for value in spec.values
        }

    def show(self, metric: MetricSpec, value: float, label: str = "") -> None:
        getattr(self._metrics[metric, label], _SHOWS[metric.kind])(value)


def _metric(family: Any, spec: MetricSpec, labels: dict[str, str], value: str) -> Any:
    own = {**labels, spec.label: value} if spec.label else labels
    return family.Metric(labels=own, buckets=list(spec.buckets)) if spec.buckets else family.Metric(labels=own)
