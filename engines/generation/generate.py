"""Generate: prompts to tokens over any Session, all prompts in one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import FinishReason, Scheduler, SchedulerLimits
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.config import ModelConfig
from deepseek_trt.export.errors import RequestError

PREFILL_CHUNK = 512  # tokens of one prompt that prefill takes at once


@dataclass(frozen=True)
class Step:
    """One new token of request `row`; `finished` says why it is the last. Stop tokens are given too."""

    row: int
    token: int
    finished: FinishReason | None


def pages_needed(config: ModelConfig, page_size: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Pages that hold all these prompts and answers at once, the scratch page included."""
    totals = [min(len(p) + max_new_tokens, config.max_position_embeddings) for p in prompts]
    return 1 + sum(-(-total // page_size) for total in totals)


def generate(
    session: Session, config: ModelConfig, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> Iterator[Step]:
    """Yield each request's tokens as they are made, in order of row within a step.

    Row i samples with seed params.seed + i. Raises RequestError for an empty prompt, an unknown token id, a prompt that
    leaves no room in max_position_embeddings, and stop strings, which need text.
    """
    if params.stop:
        raise RequestError(f"stop {params.stop!r}: stop strings need text; use stop_token_ids here")
    rows = max(len(prompts), 1)
    limits = SchedulerLimits(rows, rows * PREFILL_CHUNK, PREFILL_CHUNK, prefix_reuse=False)
    scheduler = Scheduler(session, config, limits)
    for row, prompt in enumerate(prompts):
        scheduler.add(prompt, dataclasses.replace(params, seed=params.seed + row), f"prompt {row}")
    while scheduler.busy:
        for event in scheduler.step():
            yield Step(event.request, event.token, event.finished)
