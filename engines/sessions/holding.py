"""Holding: what a session offers that leaves logits where it computed them, and picks tokens there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from deepseek_trt.export.arrays import Floats, Int32s, Int64s
from deepseek_trt.plugins.cpu.sampling_row import SamplingRow

# A token, and where they were asked for its log-probability and the likeliest tokens (see sampling_row.unpack).
Picked = tuple[int, float | None, bytes]


class Holding(Protocol):
    """Prefill and decode whose logits stay on the device, named by their places there.

    A place holds its logits until the same graph runs again. Sessions without such a device have none: see
    Session.holding.
    """

    def prefill_held(
        self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> Int32s:
        """As Session's prefill; the places [B] of the logits at each row's last token."""

    def decode_held(
        self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> Int32s:
        """As Session's decode; the places [B, S] of each token's logits."""

    def picks(self, row: SamplingRow) -> bool:
        """Whether `pick` does all that the row asks for now."""

    def pick(self, rows: Sequence[SamplingRow], places: Int32s) -> list[Picked]:
        """The next token of each row by the logits at its place, as the CPU samplers pick it; the rows record it.

        Nothing is recorded where it raises.
        """

    def read(self, places: Int32s) -> Floats:
        """The logits [n, vocab] at places [n], for whoever samples them on the CPU."""
