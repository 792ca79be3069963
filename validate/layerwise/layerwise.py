"""Layer by layer: a bundle larger than memory beside its checkpoint, one part in memory at a time.

Cases, steps and reports are those of the whole model. Each part is fed what enters it in the reference, so that an
error is seen where it is made, and its tolerance counts the roundings of that part alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.files import file_sha256
from deepseek_trt.validate.accuracy import ValidateRequest, Validation
from deepseek_trt.validate.backends.published_weights import PublishedWeights, published_weights
from deepseek_trt.validate.cases.inputs import read_inputs
from deepseek_trt.validate.layerwise.compare import Setting, compare_part
from deepseek_trt.validate.layerwise.inputs import Stream
from deepseek_trt.validate.layerwise.parts import Part, PartReport, parts_of
from deepseek_trt.validate.layerwise.report import Finding, finding, merge, merge_accuracy
from deepseek_trt.validate.layerwise.runner import by_graph
from deepseek_trt.validate.layerwise.weights import BundleWeights
from deepseek_trt.validate.pair import rounding_floors
from deepseek_trt.validate.report.integrity import Integrity
from deepseek_trt.validate.report.provenance import collect_provenance
from deepseek_trt.validate.report.report import AccuracyReport

BACKENDS = ("ort", "torch")
Progress = Callable[[str], None]


def validate_layers(request: ValidateRequest, layers: str, progress: Progress) -> Validation:
    """Compare the parts that `layers` names, the embedding and the head.

    Raises RequestError for layers that are not there, other backends than BACKENDS, and where no checkpoint is at hand.
    """
    started, run = time.time(), _prepare(request, layers)
    for part in run.parts:
        progress(f"comparing {part.name}")
        run.compare(part)
    progress("hashing what was compared")
    report = _report(run, request, started)
    return Validation(report, tuple(merge_accuracy(name, run.findings[name]) for name in run.backends))


@dataclass
class _Run:
    """The comparisons so far, without their arrays. `reference` and `sources` are what a report says of the inputs."""

    setting: Setting
    backends: tuple[str, ...]
    parts: tuple[Part, ...]
    stream: Stream
    reference: str
    sources: dict[str, str]
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    verdicts: list[PartReport] = field(default_factory=list)

    def compare(self, part: Part) -> None:
        states, inputs = self.stream.entering(part)
        narrow = any(self.setting.computed_in(name) != "float32" for name in self.backends if name != "torch")
        names = list(dict.fromkeys([*self.backends, *(["torch"] if narrow else [])]))
        pairs, left = compare_part(self.setting, part, names, states)
        for name in self.backends:
            pair = pairs[name]
            if narrow and name != "torch":
                pair = pair.judged_by(rounding_floors(pairs["torch"], len(pair.script.steps)))
            self.findings.setdefault(name, []).append(finding(pair, part.is_head))
        passed = {name: self.findings[name][-1].passed for name in self.backends}
        self.verdicts.append(PartReport(part.name, inputs, passed))
        self.stream.advance(part, left)


def _prepare(request: ValidateRequest, layers: str) -> _Run:
    bundle = Bundle.open(request.bundle)
    if bundle.manifest.interface.why_no_generation:
        raise RequestError(f"{bundle.path} cannot be validated: {bundle.manifest.interface.why_no_generation}")
    parts = parts_of(layers, bundle.manifest.model.num_hidden_layers)
    backends, weights = _backends(request.backends), _weights(bundle, request)
    if request.threads:
        torch.set_num_threads(request.threads)
    inputs = read_inputs(bundle, request.text, request.seed)
    script = by_graph(inputs.script())
    sources = {step.case: inputs.sources[step.case] for step in script.steps}
    setting = Setting(bundle, weights, script, request.threads)
    reference = f"{weights.note}, computed in float32 one part at a time"
    return _Run(setting, backends, parts, Stream(script, request.seed), reference, sources)


def _report(run: _Run, request: ValidateRequest, started: float) -> AccuracyReport:
    bundle, integrity = run.setting.bundle, _integrity(run.setting.bundle, run.parts)
    reports = tuple(merge(run.findings[name], run.setting.script) for name in run.backends)
    return AccuracyReport(
        passed=integrity.passed and all(r.passed for r in reports),
        model=bundle.manifest.model,
        dtype=bundle.manifest.dtype,
        changed_weights=integrity.changed_weights,
        changed_files=integrity.changed_files,
        cases=run.sources,
        reference=run.reference,
        backends=reports,
        provenance=collect_provenance(bundle, integrity, request.seed, "checkpoint", request.command, started),
        parts=tuple(run.verdicts),
    )


def _backends(names: Sequence[str]) -> tuple[str, ...]:
    names = names or BACKENDS
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise RequestError(f"--layers compares {' and '.join(BACKENDS)}: leave out --backend {unknown[0]}")
    return tuple(dict.fromkeys(names or BACKENDS[:1]))


def _weights(bundle: Bundle, request: ValidateRequest) -> PublishedWeights:
    weights = published_weights(bundle, request.checkpoint)
    if weights is None:
        raise RequestError(
            f"--layers compares with the checkpoint, and {bundle.manifest.checkpoint} is gone or has changed: "
            "give it with --checkpoint"
        )
    return weights


def _integrity(bundle: Bundle, parts: Sequence[Part]) -> Integrity:
    """Hash the files but for the weights, and of these the tensors that were compared."""
    found = [BundleWeights(bundle).changed(part) for part in parts]
    files = {p.name: file_sha256(p) for p in sorted(bundle.path.iterdir()) if p.is_file() and p.name != WEIGHTS_FILE}
    changed = tuple(name for name, digest in bundle.manifest.files.items() if files.get(name) != digest)
    names = tuple(dict.fromkeys(name for names, _ in found for name in names))
    return Integrity(sum(count for _, count in found), names, changed, files)
