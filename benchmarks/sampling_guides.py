"""The guides' part of benchmarks/sampling.py: what guided answers add to a step of 5 ms at batch 32.

Two schedulers over the engine of stand_in.py, whose logits are random, step by turns: one with answers guided by a JSON
schema, one with free answers. Medians count, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from stand_in import STEP_SECONDS, OrtSession

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.engines.generation.guiding import Guides
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle

ROWS, WARM, STEPS, PAGES = 32, 100, 800, 2000
_OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
GUIDE = Guide.json_schema({"type": "array", "items": _OBJECT, "minItems": 500})  # longer than the answers


class RandomLogits(OrtSession):
    """The stand-in, with logits that let answers be all kinds of text."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, PAGES)
        rng = np.random.default_rng(0)
        self._logits = 2 * rng.standard_normal((ROWS, self.vocab_size)).astype(np.float32)


def guides_table(bundle: Bundle) -> str:
    """Microseconds and shares of a step, by the clock and as the engine's thread counts its processor time."""
    schedulers = {"free": _scheduler(bundle, None), "guided": _scheduler(bundle, GUIDE)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in schedulers}
    for _ in range(WARM + STEPS):
        for name, scheduler in schedulers.items():
            clock, own = time.perf_counter(), time.thread_time()
            scheduler.step()
            times[name].append((time.perf_counter() - clock, time.thread_time() - own))
    assert all(scheduler.running == ROWS for scheduler in schedulers.values()), "answers have ended"
    lines = ["| 32 guided rows | a step more, us | share of 5 ms |", "|---|---|---|"]
    for column, name in enumerate(("by the clock", "processor time of the engine's thread")):
        free, guided = (statistics.median(one[column] for one in times[kind][WARM:]) for kind in ("free", "guided"))
        lines.append(f"| {name} | {1e6 * (guided - free):.0f} | {(guided - free) / STEP_SECONDS:.1%} |")
    return "\n".join(lines)


def _scheduler(bundle: Bundle, guide: Guide | None) -> Scheduler:
    model: Any = bundle.manifest.model
    guides = Guides(Text(bundle), model.vocab_size, model.eos_token_ids)
    scheduler = Scheduler(RandomLogits(bundle), model, SchedulerLimits(prefix_reuse=False), guides)
    for seed in range(ROWS):
        most = WARM + STEPS + 100
        params = SamplingParams(most, temperature=1.0, seed=seed, min_tokens=0 if guide else most, guide=guide)
        scheduler.add([0, 5, 6], params)
    return scheduler
