"""Scripts for bundles that do not generate: the inputs of their graphs, by pages or by attention masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_trt.export.arrays import Array, Arrays, Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import NATIVE
from deepseek_trt.validate.cases.cases import Plan, build_case, case_plan, used_slots
from deepseek_trt.validate.cases.inputs import Inputs
from deepseek_trt.validate.steps import Script, Slots, Step

DECODE_STEPS = 4


def head_script(inputs: Inputs) -> Script:
    """The cases of drawn tokens and of text; all outputs of every step are compared."""
    bundle, make = inputs.bundle, _native if inputs.bundle.manifest.interface.io == NATIVE else _masked
    plan = case_plan(bundle.manifest.cache.page_size, DECODE_STEPS)
    cases = inputs.rows(plan.tokens).items()
    steps = [step for case, tokens in cases for step in make(bundle, case, tokens, plan, inputs.seed)]
    return Script(tuple(steps), plan.pages(bundle.manifest.cache))


def _native(bundle: Bundle, case: str, tokens: Sequence[Int64s], plan: Plan, seed: int) -> Iterator[Step]:
    """Prefill, a second chunk and decode steps; where there is no cache, the first alone."""
    manifest = bundle.manifest
    steps = build_case(case, tokens, plan, manifest.cache, seed)
    for step in steps if manifest.interface.cache else steps[:1]:
        graph = step.graph if manifest.interface.cache else "model"
        yield dataclasses.replace(
            step,
            graph=graph,
            feeds=_taken(bundle, graph, {**step.feeds, **_tokens(bundle, step.input_ids, seed)}),
            slots=used_slots(step.page_table, step.past_lengths + step.sequence_lengths, manifest.cache),
            targets=None,
            kept=manifest.interface.logits_to_keep,
        )


def _masked(bundle: Bundle, case: str, tokens: Sequence[Int64s], plan: Plan, seed: int) -> Iterator[Step]:
    """A prompt padded on either side, then single tokens where there is a cache."""
    for side in ("left", "right"):
        yield from _padded(bundle, f"{case} {side}", tokens, plan, side, seed)


def _padded(bundle: Bundle, case: str, tokens: Sequence[Int64s], plan: Plan, side: str, seed: int) -> Iterator[Step]:
    lengths = np.array(plan.prefills[0])
    real = np.arange(lengths.max()) < lengths[:, None]
    mask = real if side == "right" else real[:, ::-1]
    ids = np.zeros(mask.shape, dtype=np.int64)
    for row, length in enumerate(lengths):
        ids[row, mask[row]] = tokens[row][:length]
    past = np.zeros(len(lengths), dtype=np.int64)
    yield _masked_step(bundle, case, f"prompt padded on the {side}", ids, mask, past, seed)
    for index in range(plan.decode_steps if bundle.manifest.interface.cache else 0):
        past = mask.sum(1)
        ids = np.array([[tokens[row][length + index]] for row, length in enumerate(lengths)])
        mask = np.concatenate([mask, np.ones_like(ids, dtype=bool)], axis=1)
        yield _masked_step(bundle, case, f"decode {index}", ids, mask, past, seed)


def _masked_step(bundle: Bundle, case: str, name: str, ids: Int64s, mask: Array, past: Int64s, seed: int) -> Step:
    rows, columns = mask.nonzero()
    at = mask.cumsum(1) - 1  # each token's position
    owners = list(zip(rows.tolist(), at[rows, columns].tolist(), strict=True))
    given = {"attention_mask": mask.astype(np.int64), "position_ids": np.maximum(at, 0)[:, -ids.shape[1] :]}
    return Step(
        case=case,
        name=name,
        graph="model",
        feeds=_taken(bundle, "model", {**given, **_tokens(bundle, ids, seed)}),
        live=mask[:, -ids.shape[1] :],
        past_lengths=past,
        starts_case=ids.shape[1] == mask.shape[1],
        slots=Slots((rows, np.zeros_like(rows), columns), owners),
        kept=bundle.manifest.interface.logits_to_keep,
    )


def _taken(bundle: Bundle, graph: str, given: Arrays) -> Arrays:
    """Those that the graph takes, in its order."""
    return {t.name: given[t.name] for t in bundle.graph(graph).inputs if t.name in given}


def _tokens(bundle: Bundle, ids: Int64s, seed: int) -> Arrays:
    """input_ids, or for graphs without embeddings one drawn vector a token of the vocabulary."""
    if not bundle.manifest.interface.inputs_embeds:
        return {"input_ids": ids}
    model = bundle.manifest.model
    table = np.random.default_rng(seed).standard_normal((model.vocab_size, model.hidden_size), dtype=np.float32)
    return {"inputs_embeds": table[ids]}
