"""The layer that drafts, where a bundle has it: every backend against torch in float32, on the same states."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.arrays import Arrays
from deepseek_trt.export.bundle.graph import PREVIOUS_HIDDEN
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.validate.backends.backends import BACKENDS
from deepseek_trt.validate.backends.probes import ROUTING, Watcher
from deepseek_trt.validate.backends.sessions import poison, run_step
from deepseek_trt.validate.backends.torch_watch import TorchWatcher
from deepseek_trt.validate.cases.cases import build_case, case_plan
from deepseek_trt.validate.cases.inputs import Inputs
from deepseek_trt.validate.findings.undecided import set_aside
from deepseek_trt.validate.pair import Pair, Side, compare
from deepseek_trt.validate.report.report import BackendReport, backend_report
from deepseek_trt.validate.steps import Script, Step

_DECODE_STEPS = 4
_WRONG_CHOICE = "FAIL: the drafting layer's router chose experts that rounding does not explain"


class DraftStepper:
    """A session's `draft` as a runner steps it: "draft_logits", "draft_hidden_state" and the last pool's latents."""

    def __init__(self, session: TorchSession, watcher: Watcher | None = None) -> None:
        self.note, self.dtype = session.note, session.cache.dtype
        self._session, self._watcher = session, watcher

    def start(self, step: Step) -> bool:
        return poison(self._session)

    def watch(self, index: int, step: Step) -> AbstractContextManager[object]:
        return self._watcher.watch(self._session, index, step) if self._watcher else nullcontext()

    def run(self, index: int, step: Step) -> Arrays:
        f = step.feeds
        logits = self._session.draft(
            f["input_ids"], f[PREVIOUS_HIDDEN], f["sequence_lengths"], f["past_lengths"], f["page_table"]
        )
        return {"draft_logits": logits, "draft_hidden_state": self._session.hidden}

    def cached(self, step: Step) -> Arrays:
        pool = self._session.pool(self._session.cache.layers - 1)
        return {"draft_latents.0": pool} if step.slots is not None else {}


def drafting_script(reference: TorchSession, inputs: Inputs) -> Script:
    """The states that the reference has after ragged prefills and decode steps, with the tokens that follow there."""
    plan, cache = case_plan(inputs.bundle.manifest.cache.page_size, _DECODE_STEPS), inputs.bundle.manifest.cache
    rows = inputs.rows(plan.tokens).items()
    steps = [step for case, ids in rows for step in build_case(case, ids, plan, cache, inputs.seed)]
    return Script(tuple(_with_states(reference, steps)), plan.pages(cache))


def _with_states(reference: TorchSession, steps: list[Step]) -> Iterator[Step]:
    for step in steps:
        run_step(reference, step, step.feeds)
        assert step.targets is not None
        feeds = {**step.feeds, "input_ids": np.maximum(step.targets, 0), PREVIOUS_HIDDEN: reference.hidden}
        yield dataclasses.replace(step, graph="mtp", feeds=feeds, targets=None)


def compare_drafting(backend: str, session: SessionRequest, reference: TorchSession, script: Script) -> Pair:
    """One backend's layer beside the reference's. Near ties of its router are followed, or set aside where unseen."""
    chosen, watched = BACKENDS[backend], backend == "torch"
    side = Side(
        backend,
        lambda seen: DraftStepper(chosen.make(session), TorchWatcher(seen) if watched else None),  # type: ignore[arg-type]
        lambda follower: DraftStepper(reference, follower),
    )
    (pair,) = compare([side], script, _one_layer(session.bundle.manifest.model), ROUTING)
    return set_aside(pair)


def with_drafting(report: BackendReport, pair: Pair) -> BackendReport:
    """The backend's report with the layer's outputs among its own."""
    drafts = backend_report(pair)
    wrong = [] if all(flip.near_tie for flip in pair.flips) else [_WRONG_CHOICE]
    return dataclasses.replace(
        report,
        note="; ".join(filter(None, [report.note, *wrong])),
        passed=report.passed and drafts.passed,
        set_aside={**report.set_aside, **drafts.set_aside},
        outputs=(*report.outputs, *drafts.outputs),
        milliseconds={**report.milliseconds, **drafts.milliseconds},
        reference_milliseconds={**report.reference_milliseconds, **drafts.reference_milliseconds},
    )


def _one_layer(config: ModelConfig) -> ModelConfig:
    """The layer that drafts as a model: by this, roundings are counted."""
    dense = 0 if config.is_moe_layer(config.num_hidden_layers) else 1
    return dataclasses.replace(config, num_hidden_layers=1, first_k_dense_replace=dense, moe_layer_freq=1)
