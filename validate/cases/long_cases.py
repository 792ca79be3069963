"""Longer cases, for measures that a few steps cannot give: the loss over a text, and greedy generation.

They are many decode steps: backends that take seconds a step are spared them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Floats, Int64s
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.validate.backends.sessions import run_step
from deepseek_trt.validate.cases.cases import ROWS, Plan, build_case
from deepseek_trt.validate.numbers.loss import IGNORED
from deepseek_trt.validate.steps import Step

WINDOW = 128  # tokens
MOST_TOKENS = 2048  # of a text
MOST_LOGITS = 2**27  # half a GiB of float32, for each side
GREEDY = "greedy"
GREEDY_STEPS = 32
PROMPTS = (24, 12, 6, 1)  # tokens
WINDOWS = "windows"  # how such cases' names begin


def greedy_plan(limit: int) -> Plan:
    """Prompts, then as many decode steps as a model of `limit` positions takes, at most GREEDY_STEPS."""
    return Plan((PROMPTS,), min(GREEDY_STEPS, limit - max(PROMPTS) - 1))


def greedy_case(reference: Session, prompts: Sequence[Int64s], plan: Plan, seed: int) -> tuple[Step, ...]:
    """Steps that feed what the reference generates from the prompts, always taking its likeliest token.

    Until a backend's own choice differs, this is what the backend would generate when left alone: how long the two free
    runs agree can be read from it. `prompts` holds a row of tokens each, as many as the plan's prefill takes.
    """
    tokens = [np.append(prompt, np.zeros(plan.decode_steps + 1, dtype=np.int64)) for prompt in prompts]
    steps = build_case(GREEDY, tokens, plan, reference.cache, seed, is_watched=False)
    for step in steps:
        choices = _last_logits(reference, step, tokens).argmax(-1)
        for row, at in enumerate(step.past_lengths + step.sequence_lengths):
            tokens[row][at] = choices[row]
    return build_case(GREEDY, tokens, plan, reference.cache, seed, is_watched=False)


def window_cases(
    ids: Sequence[int], cache: CacheSpec, limit: int, vocab_size: int, all_logits: bool, seed: int
) -> list[tuple[Plan, tuple[Step, ...]]]:
    """Cases over windows of a text, which overlap by one token, so that every token but the first is scored once.

    A graph that gives a row's last logits only takes one token a step. Of a text with more than MOST_TOKENS tokens, or
    with more than MOST_LOGITS logits, the start is taken.
    """
    stride = min(WINDOW, limit) - 1
    kept = list(ids[: min(MOST_TOKENS, MOST_LOGITS // vocab_size)])
    windows = [kept[start : start + stride + 1] for start in range(0, len(kept) - 1, stride)]
    cases = []
    for first in range(0, len(windows), ROWS):
        rows = windows[first : first + ROWS]
        read = max(map(len, rows)) - 1
        plan = Plan(((read,) * len(rows),), 0) if all_logits else Plan(((1,) * len(rows),), read - 1)
        tokens = [np.array(row + [IGNORED] * (read + 1 - len(row)), dtype=np.int64) for row in rows]
        name = f"{WINDOWS} {first // ROWS}"
        cases.append((plan, build_case(name, tokens, plan, cache, seed, is_watched=False)))
    return cases


def _last_logits(session: Session, step: Step, tokens: Sequence[Int64s]) -> Floats:
    """Logits [B, vocab] after the step's last tokens, its input taken from `tokens` as they are now."""
    feeds = dict(step.feeds)
    if step.graph == "decode":
        feeds["input_ids"] = np.array([[row[at]] for row, at in zip(tokens, step.past_lengths, strict=True)])
    logits = run_step(session, step, feeds)
    return logits[np.arange(len(logits)), step.sequence_lengths - 1] if logits.ndim == 3 else logits
