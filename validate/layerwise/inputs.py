"""What enters a part: what the reference made before it, or, after a gap, drawn states of the same statistics.

A transformer's states are far from white noise: some channels are many times as large as others, and many are far from
zero on average. Both are taken from the last states that the reference computed: each channel of a drawn state is
normal, with that channel's mean and standard deviation over all real tokens. How large all are together matters little,
as every layer starts with an RMS norm; how they differ from each other matters much.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from deepseek_trt.validate.layerwise.stepper import States
from deepseek_trt.validate.steps import Part, Script


@dataclass
class Stream:
    """The reference's residual stream as far as it is known: what left part `after`."""

    script: Script
    seed: int
    after: int = -2
    states: States = field(default_factory=dict)

    def entering(self, part: Part) -> tuple[States, str]:
        """The states that enter the part (none enter the embedding), and what they are."""
        if part.is_embedding:
            return {}, "the cases' tokens"
        if part.index == self.after + 1:
            return self.states, "what the reference made of the cases' tokens in the parts before"
        rng = np.random.default_rng([self.seed, part.index])
        known = np.concatenate([self.states[i][step.live.reshape(-1)] for i, step in enumerate(self.script.steps)])
        mean, deviation = known.mean(0, dtype=np.float64), known.std(0, dtype=np.float64)
        drawn = {
            index: (mean + deviation * rng.standard_normal((step.input_ids.size, mean.size))).astype(np.float32)
            for index, step in enumerate(self.script.steps)
        }
        where = "the embedding" if self.after < 0 else f"layer {self.after}"
        return drawn, f"drawn (seed {self.seed}): each channel normal, with its mean and deviation after {where}"

    def advance(self, part: Part, states: States) -> None:
        """The reference has computed the part."""
        self.after, self.states = part.index, states
