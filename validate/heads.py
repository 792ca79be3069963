"""Bundles that do not generate: every output of every graph against torch in float32."""

from __future__ import annotations

from deepseek_trt.engines.sessions.graphs import GRAPH_BACKENDS, GraphSession, TorchGraphs
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.validate.backends.graphs import GraphStepper
from deepseek_trt.validate.cases.heads import head_script
from deepseek_trt.validate.cases.inputs import read_inputs
from deepseek_trt.validate.independent.check import Check
from deepseek_trt.validate.pair import Pair, Side, compare
from deepseek_trt.validate.report.integrity import check_integrity
from deepseek_trt.validate.report.report import Compared, Comparison, backend_report
from deepseek_trt.validate.request import Progress, ValidateRequest
from deepseek_trt.validate.steps import Script


def compare_heads(bundle: Bundle, request: ValidateRequest, progress: Progress) -> Compared:
    """Compare on drawn tokens and, with a tokenizer, on text; RequestError for what such bundles do not take."""
    request.check_whole()
    refusal = f"backend {{name!r}} does not run a bundle for {bundle.manifest.task}; use: {', '.join(GRAPH_BACKENDS)}"
    names = request.chosen(GRAPH_BACKENDS, ("ort",), refusal)
    check = Check.of(bundle, request)
    if bundle.manifest.is_narrow:
        check = check.without("the bundle's weights are narrow, and transformers takes the whole ones")
    progress("hashing the bundle and its checkpoint")
    integrity = check_integrity(bundle)
    inputs = read_inputs(bundle, request.text, request.seed)
    script, pairs = head_script(inputs), []
    for name in names:
        progress(f"comparing {name} with torch in float32")
        pairs.append(_pair(bundle, name, script))
    return Compared(
        integrity=integrity,
        independent=check.of_heads(script, progress),
        cases={case: inputs.sources[case] for case in ("seeded", "text") if case in inputs.sources},
        reference="the bundle's own weights, computed in float32",
        weights=None,
        backends=tuple(backend_report(pair, None) for pair in pairs),
        comparisons=tuple(Comparison(pair.backend, pair.accuracy) for pair in pairs),
    )


def _pair(bundle: Bundle, backend: str, script: Script) -> Pair:
    def step(session: GraphSession) -> GraphStepper:
        return GraphStepper(session, bundle, script.pages)

    candidate, reference = GRAPH_BACKENDS[backend], TorchGraphs
    side = Side(backend, lambda _: step(candidate(bundle)), lambda _: step(reference(bundle, "float32")))
    (pair,) = compare([side], script, bundle.manifest.model)
    return pair
