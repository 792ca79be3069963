"""Steps: what every backend is fed, whatever the bundle's inputs are; and the parts that a model is cut into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import Array, Arrays, Int32s, Int64s
from deepseek_trt.export.bundle.graph import GraphName

Owners = list[tuple[int, int]]  # whose token each line of an output is: row, and position in its sequence
_CACHES = ("latents.", "present.", "draft_latents.")  # how outputs that are a layer's cache are called


@dataclass(frozen=True)
class Slots:
    """The used slots of the cache: `index` picks them out of any layer's, a line a token."""

    index: tuple[Array, ...]
    owners: Owners


@dataclass(frozen=True)
class Step:
    """One call of a graph.

    `feeds` holds its inputs by name, but for the cache, which carries over where no case starts. `slots` is None where
    the cache is not compared. `targets` [B, S] is the token that follows each input token, or IGNORED; None where
    outputs are not compared as predictions. `kept` is the bundle's logits_to_keep. Where `is_watched` is False, only
    router choices are kept of what was computed on the way.
    """

    case: str
    name: str
    graph: GraphName
    feeds: Arrays
    live: npt.NDArray[np.bool_]  # [B, S], which tokens are real
    past_lengths: npt.NDArray[np.integer]  # [B]
    starts_case: bool
    slots: Slots | None
    targets: Int64s | None = None
    kept: int | None = None
    is_watched: bool = True

    @property
    def label(self) -> str:
        return f"{self.case}: {self.name}"

    @property
    def input_ids(self) -> Int64s:
        return self.feeds["input_ids"]

    @property
    def page_table(self) -> Int32s:
        return self.feeds["page_table"]

    @property
    def sequence_lengths(self) -> Int32s:
        """[B], 0 for a row that takes no part."""
        lengths: Int32s = self.live.sum(1, dtype=np.int32)
        return lengths

    @cached_property
    def tokens(self) -> Owners:
        """Whose the real tokens are."""
        return self._owners(self.live)

    def lines(self, output: str, value: Array) -> tuple[Array, Owners]:
        """What means something of an output, a line a token, and whose each line is; idle rows give none.

        `value` is a layer's cache, [B, width] at the last token of each row, or [B, S, width] at the last S tokens.
        """
        if output.startswith(_CACHES):
            assert self.slots is not None
            return value[self.slots.index], self.slots.owners
        rows = np.flatnonzero(self.live.any(1))
        ends = (self.past_lengths + self.sequence_lengths).tolist()
        if value.ndim == 2:
            return value[rows], [(row, ends[row] - 1) for row in rows.tolist()]
        if self.kept and self.graph == "prefill":
            owners = [(row, max(ends[row] - back, 0)) for row in rows.tolist() for back in range(self.kept, 0, -1)]
            return value[rows].reshape(-1, value.shape[-1]), owners
        cut = self.live.shape[1] - value.shape[1]  # 0 but where a graph gives the last logits of all rows alike
        chosen = self.live & (np.arange(self.live.shape[1]) >= cut)
        return value[chosen[:, cut:]], self._owners(chosen) if cut else self.tokens

    def targets_of(self, owners: Owners) -> Int64s:
        """The token that follows each of these; IGNORED where it does not count."""
        assert self.targets is not None
        past = self.past_lengths.tolist()
        return np.array([self.targets[row, at - past[row]] for row, at in owners], dtype=np.int64)

    def _owners(self, chosen: npt.NDArray[np.bool_]) -> Owners:
        positions = self.past_lengths[:, None] + self.live.cumsum(1) - 1
        return list(zip(chosen.nonzero()[0].tolist(), positions[chosen].tolist(), strict=True))


@dataclass(frozen=True)
class Script:
    """All steps, and the pages that they need; page 0 is scratch, a case's last is poison: listed but not written."""

    steps: tuple[Step, ...]
    pages: int

    @property
    def predicts(self) -> bool:
        """Whether steps have targets, so that logits are compared as predictions."""
        return self.steps[0].targets is not None


@dataclass(frozen=True)
class Part:
    """The embedding (index -1), decoder layer `index`, or the last norm and the head (index `layers`)."""

    index: int
    layers: int  # of the model

    @property
    def is_embedding(self) -> bool:
        return self.index < 0

    @property
    def is_head(self) -> bool:
        return self.index == self.layers

    @property
    def is_layer(self) -> bool:
        return not (self.is_embedding or self.is_head)

    @property
    def name(self) -> str:
        if self.is_layer:
            return f"layer {self.index}"
        return "embedding" if self.is_embedding else "last norm and head"

    def owns(self, weight: str) -> bool:
        """Whether the graph tensor is one of this part's; a tied embedding is the head's too."""
        if self.is_layer:
            return weight.startswith(f"model.layers.{self.index}.")
        if self.is_embedding:
            return weight == "model.embed_tokens.weight"
        return not weight.startswith("model.layers.")
