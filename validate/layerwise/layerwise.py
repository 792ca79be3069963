"""Layer by layer: a bundle larger than memory beside its checkpoint, one part in memory at a time.

Cases, steps and reports are those of the whole model. Each part is fed what enters it in the reference, so that an
error is seen where it is made, and its tolerance counts the roundings of that part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.files import file_sha256
from deepseek_trt.plugins.cpu.library import cpu_library
from deepseek_trt.validate.backends.narrow_weights import reference_weights, with_strays
from deepseek_trt.validate.backends.published_weights import PublishedWeights, published_weights
from deepseek_trt.validate.cases.inputs import read_inputs
from deepseek_trt.validate.findings.undecided import set_aside
from deepseek_trt.validate.independent.check import Check
from deepseek_trt.validate.independent.finding import absent
from deepseek_trt.validate.layerwise.compare import Setting, compare_part
from deepseek_trt.validate.layerwise.inputs import Stream
from deepseek_trt.validate.layerwise.report import merge, merge_accuracy
from deepseek_trt.validate.layerwise.weights import BundleWeights
from deepseek_trt.validate.pair import rounding_floors
from deepseek_trt.validate.report.integrity import Integrity, listed_files, odd_weights
from deepseek_trt.validate.report.report import BackendReport, Compared, Comparison, PartReport, backend_report
from deepseek_trt.validate.request import Progress, ValidateRequest, layers_of
from deepseek_trt.validate.steps import Part, Script

BACKENDS = ("exported", "ort", "torch")


def compare_layers(bundle: Bundle, request: ValidateRequest, layers: str, progress: Progress) -> Compared:
    """Compare the embedding, the layers that `layers` names, and the head.

    Raises RequestError for layers that are not there, other backends than BACKENDS, and where no checkpoint is at hand.
    """
    if bundle.manifest.cache.narrow is not None:
        raise RequestError("--layers compares layers over a whole cache, and the bundle's is narrow: leave it out")
    parts = parts_of(layers, bundle.manifest.model.num_hidden_layers)
    refusal = f"--layers compares {', '.join(BACKENDS)}: leave out --backend {{name}}"
    library = cpu_library(bundle)
    usual = BACKENDS if library.path else tuple(name for name in BACKENDS if name != "ort")
    names = request.chosen(BACKENDS, usual, refusal)
    check = Check.of(bundle, request)
    weights = _weights(bundle, request)
    if request.threads:
        torch.set_num_threads(request.threads)
    inputs = read_inputs(bundle, request.text, request.seed)
    script = by_graph(inputs.script())
    reference = reference_weights(bundle, weights) or weights
    run = _Run(Setting(bundle, reference, script, request.threads, library), names, Stream(script, request.seed))
    for part in parts:
        progress(f"comparing {part.name}")
        run.compare(part)
    progress("hashing what was compared")
    narrow = ", narrow ones as the bundle holds them, read anew" if bundle.manifest.is_narrow else ""
    return Compared(
        integrity=_integrity(bundle, parts, weights),
        independent=absent(check.why_not),
        cases={step.case: inputs.sources[step.case] for step in script.steps},
        reference=f"{weights.note}{narrow}, computed in float32 one part at a time",
        weights=weights,
        backends=tuple(merge(run.reports[name]) for name in names),
        comparisons=tuple(merge_accuracy(run.comparisons[name]) for name in names),
        parts=tuple(run.verdicts),
        no_ort=library.reason,
    )


def parts_of(layers: str, count: int) -> tuple[Part, ...]:
    """The embedding, the layers that `layers` names, and the head, of a model with `count` layers."""
    return tuple(Part(index, count) for index in (-1, *layers_of(layers, count), count))


def by_graph(script: Script) -> Script:
    """The same steps, all prefills before all decodes: only one graph need be loaded. Cases keep their own order."""
    return Script(tuple(sorted(script.steps, key=lambda step: step.graph != "prefill")), script.pages)


@dataclass
class _Run:
    """The comparisons so far, without their arrays: by backend, a report and Polygraphy's verdicts a part."""

    setting: Setting
    backends: tuple[str, ...]
    stream: Stream
    reports: dict[str, list[BackendReport]] = field(default_factory=dict)
    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)
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
            pair = set_aside(pair)
            self.reports.setdefault(name, []).append(backend_report(pair))
            self.comparisons.setdefault(name, []).append(Comparison(name, pair.accuracy))
        passed = {name: self.reports[name][-1].passed for name in self.backends}
        self.verdicts.append(PartReport(part.name, inputs, passed))
        self.stream.advance(part, left)


def _weights(bundle: Bundle, request: ValidateRequest) -> PublishedWeights:
    weights = published_weights(bundle, request.checkpoint)
    if weights is None:
        raise RequestError(
            f"--layers compares with the checkpoint, and {bundle.manifest.checkpoint} is gone or has changed: "
            "give it with --checkpoint"
        )
    return weights


def _integrity(bundle: Bundle, parts: Sequence[Part], weights: PublishedWeights) -> Integrity:
    """Hash the files but for the weights, and of these the tensors that were compared; their numbers are looked at."""
    found = [BundleWeights(bundle).changed(part) for part in parts]
    files = {n: file_sha256(p) for n, p in sorted(listed_files(bundle).items()) if n != WEIGHTS_FILE}
    changed = tuple(name for name, digest in bundle.manifest.files.items() if files.get(name) != digest)
    names = tuple(dict.fromkeys(name for names, _ in found for name in names))

    def wanted(name: str) -> bool:
        return any(part.owns(name) for part in parts)

    odd = odd_weights(bundle, wanted)
    integrity = Integrity(sum(count for _, count in found), names, changed, files, odd_weights=odd)
    return with_strays(integrity, bundle, weights, wanted)
