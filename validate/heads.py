"""Accuracy of bundles that do not generate: every output of every graph against torch in float32."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import AccuracyResults, Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from deepseek_trt.engines.sessions.graphs import GRAPH_BACKENDS, GraphSession, TorchGraphs
from deepseek_trt.export.arrays import Arrays, numpy_dtype
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate.accuracy import Progress, ValidateRequest
from deepseek_trt.validate.cases.cases import seeded_tokens, text_tokens
from deepseek_trt.validate.cases.heads import HeadStep, plan_of, steps_of
from deepseek_trt.validate.cases.inputs import read_inputs
from deepseek_trt.validate.numbers.compare import OutputDifference, ToleranceCompare
from deepseek_trt.validate.numbers.metrics import closeness
from deepseek_trt.validate.numbers.tolerance import Tolerance, derive_tolerance, roundings_of
from deepseek_trt.validate.pair import REFERENCE
from deepseek_trt.validate.report.heads import HeadsBackend, HeadsReport
from deepseek_trt.validate.report.integrity import check_integrity
from deepseek_trt.validate.report.provenance import collect_provenance
from deepseek_trt.validate.report.report import output_reports

Owners = dict[str, list[tuple[int, int]]]  # of each output's lines: row and position


@dataclass(frozen=True)
class HeadsPair:
    """A backend's results beside the reference's, a dict of outputs a step."""

    backend: str
    dtype: str
    note: str
    bundle: Bundle
    steps: tuple[HeadStep, ...]
    results: list[IterationResult]
    reference: list[IterationResult]
    owners: list[Owners]

    def tolerance(self, output: str) -> Tolerance:
        """Derived from the roundings on the way to the output."""
        model = self.bundle.manifest.model
        place = rounded_like(output, model.num_hidden_layers)
        return derive_tolerance(model.hidden_size, self.dtype, roundings_of(place, model.num_hidden_layers))

    @cached_property
    def accuracy(self) -> AccuracyResults:
        """Polygraphy's verdicts, of each output of each step."""
        run = RunResults([(self.backend, self.results), (REFERENCE, self.reference)])
        return Comparator.compare_accuracy(run, compare_func=[ToleranceCompare(self.tolerance, self.dtype)])

    @property
    def differences(self) -> list[OutputDifference]:
        found = []
        for index, (step, ours, theirs) in enumerate(zip(self.steps, self.results, self.reference, strict=True)):
            for name, expected in theirs.items():
                c = closeness(ours[name], expected, self.dtype)
                row, position = self.owners[index][name][c.worst[0]]
                found.append(OutputDifference(index, step.label, name, c, self.tolerance(name), row, position))
        return found


def rounded_like(output: str, layers: int) -> str:
    """The output or probe of tolerance.py that has taken as many roundings."""
    place, _, rest = output.partition(".")
    if place == "present":
        return f"latents.{rest.partition('.')[0]}"
    if place == "hidden_states" and int(rest) < layers:
        return f"hidden.{rest}"
    return "logits"


class GraphRunner(BaseRunner):  # type: ignore[misc]  # polygraphy is untyped
    """A GraphSession as a Polygraphy runner; the cache carries over from step to step, and starts as NaN."""

    def __init__(
        self, name: str, make: Callable[[], GraphSession], bundle: Bundle, steps: tuple[HeadStep, ...]
    ) -> None:
        super().__init__(name=name)
        self._make, self._bundle, self._steps = make, bundle, steps
        self.note, self.dtype = "", ""  # known once active
        self.owners: list[Owners] = []

    def activate_impl(self) -> None:
        self.session = self._make()
        self.note, self.dtype = self.session.note, self.session.dtype

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("step", np.int64, (1,))

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, Any]:
        step = self._steps[int(feed_dict["step"][0])]
        if step.starts_case:
            self._cache = self._empty(step)
        float_type = numpy_dtype(self.dtype)
        feeds = {n: a.astype(float_type) if a.dtype == np.float32 else a for n, a in step.feeds.items()}
        start = time.perf_counter()
        out = self.session.run(step.graph, {**feeds, **self._cache})
        self.inference_time = time.perf_counter() - start
        self._cache = {name: out[name.replace("past_key_values", "present")] for name in self._cache}
        kept = self._bundle.manifest.interface.logits_to_keep
        lines = {name: step.lines(name, array, kept) for name, array in out.items()}
        self.owners.append({name: owners for name, (_, owners) in lines.items()})
        return OrderedDict((name, values.astype(np.float32)) for name, (values, _) in lines.items())

    def _empty(self, step: HeadStep) -> Arrays:
        """Page pools as large as the case needs; contiguous caches without a slot."""
        past = [t for t in self._bundle.graph(step.graph).inputs if t.name.startswith("past_key_values.")]
        sizes = {"pages": plan_of(self._bundle).pages(self._bundle.manifest.cache), "past_sequence_length": 0}
        sizes["batch_size"] = len(step.live)
        shapes = {t.name: [sizes[d] if isinstance(d, str) else d for d in t.dims] for t in past}
        return {name: np.full(shape, np.nan, numpy_dtype(self.dtype)) for name, shape in shapes.items()}

    def deactivate_impl(self) -> None:
        del self.session


def validate_heads(request: ValidateRequest, progress: Progress) -> tuple[HeadsReport, tuple[HeadsPair, ...]]:
    """Compare every backend asked for with torch in float32, on drawn tokens and, with a tokenizer, on text.

    Raises RequestError for a backend that does not run such bundles.
    """
    started, bundle = time.time(), Bundle.open(request.bundle)
    names = request.backends or ("ort",)
    unknown = [name for name in names if name not in GRAPH_BACKENDS]
    if unknown:
        raise RequestError(
            f"backend {unknown[0]!r} does not run a bundle for {bundle.manifest.task}; use: {', '.join(GRAPH_BACKENDS)}"
        )
    progress("hashing the bundle and its checkpoint")
    integrity = check_integrity(bundle)
    sources, steps = _cases(request, bundle)
    pairs = tuple(_run(bundle, name, steps, progress) for name in names)
    backends = tuple(_backend(pair) for pair in pairs)
    report = HeadsReport(
        passed=integrity.passed and all(backend.passed for backend in backends),
        interface=bundle.manifest.interface,
        model=bundle.manifest.model,
        dtype=bundle.manifest.dtype,
        changed_weights=integrity.changed_weights,
        changed_files=integrity.changed_files,
        cases=sources,
        backends=backends,
        provenance=collect_provenance(bundle, integrity, request.seed, "bundle", request.command, started),
    )
    return report, pairs


def _cases(request: ValidateRequest, bundle: Bundle) -> tuple[dict[str, str], tuple[HeadStep, ...]]:
    inputs, lengths = read_inputs(bundle, request.text, request.seed), plan_of(bundle).tokens
    rows = {"seeded": seeded_tokens(bundle.manifest.model.vocab_size, lengths, request.seed)}
    if inputs.text:
        rows["text"] = text_tokens(inputs.text, lengths)
    steps = [step for case, tokens in rows.items() for step in steps_of(bundle, case, tokens, request.seed)]
    return {case: inputs.sources[case] for case in rows}, tuple(steps)


def _run(bundle: Bundle, backend: str, steps: tuple[HeadStep, ...], progress: Progress) -> HeadsPair:
    progress(f"comparing {backend} with torch in float32")
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # it logs failed comparisons, to stdout; the report says them better
    candidate = GraphRunner(backend, lambda: GRAPH_BACKENDS[backend](bundle), bundle, steps)
    reference = GraphRunner(REFERENCE, lambda: TorchGraphs(bundle, "float32"), bundle, steps)
    feeds = [{"step": np.array([index])} for index in range(len(steps))]
    run = Comparator.run([candidate, reference], data_loader=feeds)
    return HeadsPair(backend, candidate.dtype, candidate.note, bundle, steps, run[0][1], run[1][1], candidate.owners)


def _backend(pair: HeadsPair) -> HeadsBackend:
    return HeadsBackend(
        backend=pair.backend,
        computed_in=pair.dtype,
        note=pair.note,
        passed=bool(pair.accuracy),
        outputs=output_reports(pair.differences),
    )
