"""The float32 reference beside an implementation of others, on a few short cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from polygraphy.comparator import IterationResult

from deepseek_trt.engines.sessions.graphs import TorchGraphs
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Array, Floats
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BackendError
from deepseek_trt.validate.backends.graphs import GraphStepper
from deepseek_trt.validate.backends.probes import GAP, Probes
from deepseek_trt.validate.backends.runner import Stepper
from deepseek_trt.validate.backends.sessions import SessionStepper
from deepseek_trt.validate.backends.torch_watch import TorchWatcher
from deepseek_trt.validate.cases.cases import build_case, case_plan
from deepseek_trt.validate.cases.inputs import Inputs
from deepseek_trt.validate.findings.undecided import set_aside
from deepseek_trt.validate.independent.finding import Independent, Status, absent
from deepseek_trt.validate.independent.oracle import OUTPUTS, Oracle, why_not
from deepseek_trt.validate.numbers.tolerance import Policy
from deepseek_trt.validate.pair import Pair
from deepseek_trt.validate.request import Progress, ValidateRequest
from deepseek_trt.validate.steps import Owners, Script

DECODE_STEPS = 2
Row = tuple[str, int]  # a case and a row of it: one sequence


@dataclass(frozen=True)
class Check:
    """What was asked for, and why there is nothing to run, where that is known before any work."""

    bundle: Bundle
    checkpoint: Path | None
    wanted: bool | None
    why_not: str

    @classmethod
    def of(cls, bundle: Bundle, request: ValidateRequest) -> Check:
        """Raises BackendError where the comparison is asked for and cannot be made."""
        reason = "--no-independent" if request.independent is False else ""
        if not reason and request.layers is not None:
            reason = "--layers compares parts of the model, transformers computes the whole"
        reason = reason or why_not(bundle, request.checkpoint, bool(request.independent))
        if reason and request.independent:
            raise BackendError(f"--independent: {reason}")
        return cls(bundle, request.checkpoint, request.independent, reason)

    def without(self, reason: str) -> Check:
        """No check, for this reason; BackendError where it is asked for."""
        if self.wanted:
            raise BackendError(f"--independent: {reason}")
        return dataclasses.replace(self, why_not=self.why_not or reason)

    def of_generation(self, reference: Session, inputs: Inputs, progress: Progress) -> Independent:
        """Compare logits: a ragged prefill, a second chunk and two decode steps, of drawn tokens and of text."""
        plan, cache = case_plan(inputs.bundle.manifest.cache.page_size, DECODE_STEPS), inputs.bundle.manifest.cache
        rows = inputs.rows(plan.tokens).items()
        steps = [step for case, tokens in rows for step in build_case(case, tokens, plan, cache, inputs.seed)]
        watcher = TorchWatcher(Probes((GAP,)), Probes())
        stepper = SessionStepper(reference, watcher)
        return self._run(lambda: stepper, Script(tuple(steps), plan.pages(cache)), watcher.probes, progress)

    def of_heads(self, script: Script, progress: Progress) -> Independent:
        """Compare what the bundle is for: logits, hidden states or scores, on all steps of the script."""

        def open_reference() -> Stepper:
            return GraphStepper(TorchGraphs(self.bundle, "float32"), self.bundle, script.pages)

        return self._run(open_reference, script, Probes(()), progress)

    def _run(self, reference: Callable[[], Stepper], script: Script, probes: Probes, progress: Progress) -> Independent:
        if self.why_not:
            return absent(self.why_not)
        progress("comparing the reference with transformers")
        try:
            oracle = Oracle(self.bundle, self.checkpoint)
            theirs = {row: oracle.rows(tokens) for row, tokens in sequences(script).items()}
        except BackendError as error:
            if self.wanted:
                raise
            return absent(str(error))
        return _judge(oracle.name, _pair(self.bundle, reference(), script, theirs, probes))


def sequences(script: Script) -> dict[Row, list[int]]:
    """The tokens of each row of each case, all steps together."""
    found: dict[Row, list[int]] = {}
    for step in script.steps:
        for row, (ids, live) in enumerate(zip(step.input_ids, step.live, strict=True)):
            found.setdefault((step.case, row), []).extend(ids[live].tolist())
    return found


def _pair(bundle: Bundle, reference: Stepper, script: Script, theirs: dict[Row, Floats], probes: Probes) -> Pair:
    """Their rows as the candidate; `probes` fill while the reference runs."""
    manifest = bundle.manifest
    model, output = manifest.model, OUTPUTS[manifest.task]
    found = list(_steps(reference, script, output))
    results = [
        _result("transformers", output, np.stack([theirs[step.case, row][at] for row, at in owners]))
        for step, (_, owners) in zip(script.steps, found, strict=True)
    ]
    return Pair(
        backend="transformers",
        note="",
        poisoned=True,
        script=script,
        policy=Policy(model.hidden_size, model.num_hidden_layers, "float32"),
        results=results,
        reference=[_result("torch", output, value) for value, _ in found],
        lines=[{output: owners} for _, owners in found],
        probes=Probes(),
        reference_probes=probes,
        flips=(),
        config=model,
        judged=results,
    )


def _steps(reference: Stepper, script: Script, output: str) -> Iterator[tuple[Array, Owners]]:
    """What the reference gives, a line a token, and whose each line is."""
    for index, step in enumerate(script.steps):
        if step.starts_case:
            reference.start(step)
        with reference.watch(index, step):
            outputs = reference.run(index, step)
        yield step.lines(output, outputs[output])


def _result(name: str, output: str, value: Array) -> IterationResult:
    return IterationResult(outputs={output: value.astype(np.float32, copy=False)}, runtime=0.0, runner_name=name)


def _judge(by: str, pair: Pair) -> Independent:
    output = pair.differences[0].output
    if pair.reference_probes.steps:
        pair = set_aside(pair)
    worst = max(pair.differences, key=lambda d: d.closeness.max_relative)
    tokens, aside = sum(len(lines[output]) for lines in pair.lines), sum(pair.set_aside.values())
    error, limit = worst.closeness.max_relative, worst.tolerance.relative
    verb = "agree with" if pair.passed else "DIFFER from"
    where = "" if pair.passed else f" ({worst.label}, row {worst.row} at {worst.position})"
    undecided = f", {aside} set aside for near ties of a router" if aside else ""
    summary = (
        f"{by}, from the checkpoint's own files: {output} of {tokens} tokens {verb} the reference, "
        f"largest error {error:.2e}{where}, tolerance {limit:.2e}{undecided}"
    )
    if not pair.passed:
        summary += "; config.json or the weights are read otherwise, or the model computes something else"
    status: Status = "agrees" if pair.passed else "differs"
    return Independent(status, summary, by, output, tokens, aside, error, limit)
