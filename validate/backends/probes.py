"""Probes: what a run computed on its way, by name and layer, so that two runs can be laid side by side.

Names are "<place>.<layer>" in the order of the computation (PLACES); arrays are [tokens, width], real tokens only. The
state that leaves the last layer is "hidden.<number of layers>".
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Array, Arrays
from deepseek_trt.validate.steps import Step

# Place: what computes it, as a report names it.
PLACES = {
    "hidden": "embedding or residual after the MLP",
    "query": "query projection and rope",
    "latent": "latent projection, norm and rope",
    "attended": "MlaPrefill or MlaDecode",
    "after_attention": "output projection and residual",
    "router_logits": "router projection",
    "router_ids": "router",
    "router_weights": "router",
    "experts": "MoeExperts",
}
GAP = "router_gap"  # routing.closest_gap [tokens, 1], which the reference alone knows
ROUTING = ("router_logits", "router_ids", "router_weights", GAP)


@dataclass
class Probes:
    """What was seen, step by step; `places` says what is kept (all of PLACES is much for a large model).

    `cached` holds what a narrow cache made of new tokens' latents, [tokens, L], by step and layer.
    """

    places: tuple[str, ...] = ("hidden", *ROUTING)
    steps: dict[int, Arrays] = field(default_factory=dict)
    cached: dict[tuple[int, int], Array] = field(default_factory=dict)

    def keep(self, index: int, step: Step, name: str, array: Array) -> None:
        """Keep the real tokens of `array`, whose leading axes are [B, S], [B] or [B * S]."""
        if name.rpartition(".")[0] not in (self.places if step.is_watched else ROUTING):
            return
        live = step.live.reshape(-1)
        rows = array.reshape(live.size, -1)[live]
        kept = rows.astype(np.int32 if rows.dtype.kind == "i" else np.float32)
        self.steps.setdefault(index, {})[name] = kept


class Watcher(Protocol):
    """Sees a session at work and fills its probes."""

    probes: Probes

    def watch(self, session: Session, index: int, step: Step) -> AbstractContextManager[object]:
        """Entered around the session's step."""


def all_steps(probes: Probes, name: str) -> Array | None:
    """The named value of all steps, one after the other; None where it was never seen."""
    parts = [seen[name] for _, seen in sorted(probes.steps.items()) if name in seen]
    return np.concatenate(parts) if parts else None
