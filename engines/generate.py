"""Generate: prompts to tokens over any Session, all prompts in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deepseek_trt.engines.pages import PagePool, page_table
from deepseek_trt.engines.sampling import Sampler, SamplingParams
from deepseek_trt.engines.session import Floats, Int32s, Session
from deepseek_trt.export.config import ModelConfig
from deepseek_trt.export.errors import RequestError

PREFILL_CHUNK = 512  # tokens of one prompt that prefill takes at once

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """One new token of request `row`; `finished` says why it is the last. Stop tokens are given too."""

    row: int
    token: int
    finished: FinishReason | None


@dataclass
class _Request:
    row: int
    prompt: list[int]
    sampler: Sampler
    pages: list[int]
    limit: int
    cached: int = 0
    last: int = -1
    made: int = 0


def pages_needed(config: ModelConfig, page_size: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Pages that `generate` needs for these prompts, the scratch page included."""
    totals = [min(len(p) + max_new_tokens, config.max_position_embeddings) for p in prompts]
    return 1 + sum(-(-total // page_size) for total in totals)


def generate(
    session: Session, config: ModelConfig, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> Iterator[Step]:
    """Yield each request's tokens as they are made, in order of row within a step.

    Row i samples with seed params.seed + i. Raises RequestError for an empty prompt, an unknown token id, and a prompt
    that leaves no room in max_position_embeddings.
    """
    pool = PagePool(session.pages)
    waiting = [_admit(session, config, pool, row, list(p), params) for row, p in enumerate(prompts)]
    running = _prefill(session, config, waiting)
    while running:
        yield from (step for step, _ in running)
        going = [request for step, request in running if step.finished is None]
        for step, request in running:
            if step.finished is not None:
                pool.give_back(request.pages)
        running = _decode(session, config, going)


def _admit(
    session: Session, config: ModelConfig, pool: PagePool, row: int, prompt: list[int], params: SamplingParams
) -> _Request:
    if not prompt:
        raise RequestError(f"prompt {row} is empty: give at least one token")
    if not all(0 <= token < config.vocab_size for token in prompt):
        raise RequestError(f"prompt {row} holds a token id outside 0..{config.vocab_size - 1}")
    room = config.max_position_embeddings - len(prompt)
    if room < 1:
        raise RequestError(
            f"prompt {row} has {len(prompt)} tokens; the model takes at most {config.max_position_embeddings - 1}"
        )
    limit = min(params.max_new_tokens, room)
    seeded = SamplingParams(limit, params.temperature, params.top_k, params.top_p, params.seed + row)
    pages = pool.take(session.cache.pages_for(len(prompt) + limit))
    return _Request(row, prompt, Sampler(seeded), pages, limit)


def _prefill(session: Session, config: ModelConfig, requests: list[_Request]) -> list[tuple[Step, _Request]]:
    """Cache all prompts chunk by chunk, as one ragged batch; sample each request's first token."""
    done: list[tuple[Step, _Request]] = []
    while requests:
        chunks = [r.prompt[r.cached : r.cached + PREFILL_CHUNK] for r in requests]
        ids = np.zeros((len(requests), max(map(len, chunks))), dtype=np.int64)
        for row, chunk in enumerate(chunks):
            ids[row, : len(chunk)] = chunk
        logits = session.prefill(ids, _int32([len(c) for c in chunks]), *_cached(requests))
        for request, chunk, row_logits in zip(requests, chunks, logits, strict=True):
            request.cached += len(chunk)
            if request.cached == len(request.prompt):
                done.append((_sample(request, row_logits, config.eos_token_ids), request))
        requests = [r for r in requests if r.cached < len(r.prompt)]
    return sorted(done, key=lambda pair: pair[0].row)


def _decode(session: Session, config: ModelConfig, requests: list[_Request]) -> list[tuple[Step, _Request]]:
    if not requests:
        return []
    ids = np.array([[request.last] for request in requests], dtype=np.int64)
    logits = session.decode(ids, *_cached(requests))
    for request in requests:
        request.cached += 1
    return [(_sample(r, row, config.eos_token_ids), r) for r, row in zip(requests, logits, strict=True)]


def _sample(request: _Request, logits: Floats, stops: tuple[int, ...]) -> Step:
    request.last = request.sampler.pick(logits)
    request.made += 1
    if request.last in stops:
        return Step(request.row, request.last, "stop")
    return Step(request.row, request.last, "length" if request.made == request.limit else None)


def _cached(requests: list[_Request]) -> tuple[Int32s, Int32s]:
    """past_lengths and page_table of these requests."""
    return _int32([r.cached for r in requests]), page_table([r.pages for r in requests])


def _int32(values: list[int]) -> Int32s:
    return np.array(values, dtype=np.int32)
