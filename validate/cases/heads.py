"""Steps for bundles that do not generate: the inputs of their graphs, and which lines of the outputs mean something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_trt.export.arrays import Arrays, Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import GraphName
from deepseek_trt.export.bundle.interface import NATIVE
from deepseek_trt.validate.cases.cases import Plan, build_case, case_plan
from deepseek_trt.validate.numbers.metrics import Array

DECODE_STEPS = 4


@dataclass(frozen=True)
class HeadStep:
    """One call of a graph; `feeds` hold all its inputs but the cache, which carries over where no case starts.

    live [B, S] says which of the tokens are real, past [B] how many a row had before. cache_index picks the used slots
    out of a cache output; it is empty where the cache is not compared.
    """

    case: str
    name: str
    graph: GraphName
    feeds: Arrays
    live: Array
    past: Array
    cache_index: tuple[Array, ...]
    cache_owners: tuple[tuple[int, int], ...]
    starts_case: bool

    @property
    def label(self) -> str:
        return f"{self.case}: {self.name}"

    def lines(self, name: str, value: Array, kept: int | None) -> tuple[Array, list[tuple[int, int]]]:
        """What means something of an output, a line a token, and whose token each line is: (row, position).

        `kept` is the bundle's logits_to_keep; a row that takes no part gives no line.
        """
        if name.startswith("present."):
            return value[self.cache_index], list(self.cache_owners)
        ends = self.past + self.live.sum(1)
        rows = np.flatnonzero(self.live.any(1))
        if value.ndim == 2:  # one line a row
            return value[rows], [(int(row), int(ends[row]) - 1) for row in rows]
        if kept and self.graph == "prefill":
            at = [(int(row), max(int(ends[row]) - back, 0)) for row in rows for back in range(kept, 0, -1)]
            return value[rows].reshape(-1, value.shape[-1]), at
        live = self.live[:, -value.shape[1] :]
        positions = (self.past[:, None] + self.live.cumsum(1) - 1)[:, -value.shape[1] :]
        return value[live], list(zip(live.nonzero()[0].tolist(), positions[live].tolist(), strict=True))


def plan_of(bundle: Bundle) -> Plan:
    """How long the rows of a case are."""
    return case_plan(bundle.manifest.cache.page_size, DECODE_STEPS)


def steps_of(bundle: Bundle, case: str, tokens: Sequence[Int64s], seed: int) -> tuple[HeadStep, ...]:
    """The case over `tokens`, one array a row, as long as plan_of says."""
    if bundle.manifest.interface.io == NATIVE:
        return _native(bundle, case, tokens, seed)
    return (*_masked(bundle, case, tokens, "left", seed), *_masked(bundle, case, tokens, "right", seed))


def _native(bundle: Bundle, case: str, tokens: Sequence[Int64s], seed: int) -> tuple[HeadStep, ...]:
    """Prefill, a second chunk and decode steps; where there is no cache, the first alone."""
    manifest = bundle.manifest
    made = []
    for step in build_case(case, tokens, plan_of(bundle), manifest.cache, seed):
        graph: GraphName = step.graph if manifest.interface.cache else "model"
        given = {
            "sequence_lengths": step.sequence_lengths,
            "past_lengths": step.past_lengths,
            "page_table": step.page_table,
            **_tokens(bundle, step.input_ids, seed),
        }
        names = [t.name for t in bundle.graph(graph).inputs if t.name in given]
        index, owners = _used_pages(step.cached(), manifest.cache.page_size)
        feeds = {name: given[name] for name in names}
        made.append(
            HeadStep(case, step.name, graph, feeds, step.live, step.past_lengths, index, owners, step.starts_case)
        )
        if not manifest.interface.cache:
            break
    return tuple(made)


def _used_pages(cached: list[tuple[Array, int]], page: int) -> tuple[tuple[Array, ...], tuple[tuple[int, int], ...]]:
    owners = tuple((row, t) for row, (_, total) in enumerate(cached) for t in range(total))
    pages = np.array([cached[row][0][t // page] for row, t in owners])
    return (pages, np.array([t % page for _, t in owners])), owners


def _masked(bundle: Bundle, case: str, tokens: Sequence[Int64s], side: str, seed: int) -> tuple[HeadStep, ...]:
    """A prompt padded on this side, then single tokens where there is a cache."""
    lengths = np.array(plan_of(bundle).prefills[0])
    real = np.arange(lengths.max()) < lengths[:, None]
    mask = real if side == "right" else real[:, ::-1]
    ids = np.zeros(mask.shape, dtype=np.int64)
    for row, length in enumerate(lengths):
        ids[row, mask[row]] = tokens[row][:length]
    made, past = [], np.zeros(len(lengths), dtype=np.int64)
    for index in range(1 + (DECODE_STEPS if bundle.manifest.interface.cache else 0)):
        if index:
            ids = np.array([[tokens[row][length + index - 1]] for row, length in enumerate(lengths)])
            mask = np.concatenate([mask, np.ones_like(ids, dtype=bool)], axis=1)
        name = f"decode {index - 1}" if index else f"prompt padded on the {side}"
        made.append(_masked_step(bundle, f"{case} {side}", name, ids, mask, past, seed))
        past = mask.sum(1)
    return tuple(made)


def _masked_step(bundle: Bundle, case: str, name: str, ids: Int64s, mask: Array, past: Array, seed: int) -> HeadStep:
    live = mask[:, -ids.shape[1] :]
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    given = {"attention_mask": mask.astype(np.int64), "position_ids": positions, **_tokens(bundle, ids, seed)}
    names = [t.name for t in bundle.graph("model").inputs if t.name in given]
    rows, slots = mask.nonzero()
    at = (mask.cumsum(1) - 1)[rows, slots]
    owners = tuple(zip(rows.tolist(), at.tolist(), strict=True))
    feeds = {key: given[key] for key in names}
    first = name.startswith("prompt")
    return HeadStep(case, name, "model", feeds, live, past, (rows, np.zeros_like(rows), slots), owners, first)


def _tokens(bundle: Bundle, ids: Int64s, seed: int) -> Arrays:
    """input_ids, or for graphs without embeddings one drawn vector a token of the vocabulary."""
    if not bundle.manifest.interface.inputs_embeds:
        return {"input_ids": ids}
    model = bundle.manifest.model
    table = np.random.default_rng(seed).standard_normal((model.vocab_size, model.hidden_size), dtype=np.float32)
    return {"inputs_embeds": table[ids]}
