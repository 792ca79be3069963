"""Picker: tokens of a batch, picked on the GPU from logits that stay there, by two launches on the session's stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from deepseek_trt.engines.sessions.holding import Picked
from deepseek_trt.engines.sessions.tensorrt.device import Device, aligned
from deepseek_trt.engines.sessions.tensorrt.kernels import Kernel
from deepseek_trt.export.arrays import Array, Arrays, Floats, Int32s
from deepseek_trt.plugins.cpu.sampling_row import SamplingRow
from deepseek_trt.plugins.kernels.launches import cdiv
from deepseek_trt.plugins.kernels.sampling.batch import (
    MOST_CHANGES,
    RESULTS,
    ResultSpec,
    changes_of,
    packed,
    results_of,
    taken,
)

_FLOAT = 4
_ADJUST = ("places", "starts", "ids", "counts", "drops", "biases", "repetitions", "presences")
_PICK = ("places", "starts", "keys", "draws", "steepness", "top_ps", "top_ks", "leasts", "wanted")
_CHANGES = 4096  # of a row, on the average of a turn
_ROOM = 64  # bytes of a row's arguments, beside its changes: eight numbers of 4 and three of 8


class Picker:
    """Room for `rows` rows at once; more go in several turns. One thread at a time, that of the session."""

    def __init__(
        self, device: Device, kernels: Mapping[str, Kernel], logits: int, places: int, vocab: int, rows: int
    ) -> None:
        """`logits` is the address of [places, vocab] float32."""
        self._device, self._kernels, self._logits, self._places = device, kernels, logits, places
        self._vocab, self._rows, self._row_bytes = vocab, rows, vocab * _FLOAT
        self._adjusted = device.allocate(rows * self._row_bytes, "logits with penalties")
        self._changes = max(MOST_CHANGES, rows * _CHANGES)
        given = rows * _ROOM + 4 * _FLOAT * self._changes + 16 * aligned(1)  # each of 15 arrays is aligned
        self._given, self._pinned_given = device.allocate(given, "what sampling is given"), device.pin(given)
        self._offsets = _offsets(rows)
        size = self._offsets[RESULTS[-1].name] + aligned(RESULTS[-1].nbytes(rows))
        self._made, self._pinned_made = device.allocate(size, "what sampling gives"), device.pin(size)

    def pick(self, rows: Sequence[SamplingRow], places: Int32s) -> list[Picked]:
        """See Holding.pick."""
        turns = list(self._turns(rows))
        results = [self._run(rows[first:last], places[first:last]) for first, last in turns]
        made: list[Picked] = []
        for (first, last), result in zip(turns, results, strict=True):  # all have run: now they are recorded
            made += taken(rows[first:last], result, self._vocab)
        return made

    def read(self, places: Int32s) -> Floats:
        """See Holding.read."""
        logits = np.empty((len(places), self._vocab), dtype=np.float32)
        self._device.activate()
        for row, place in zip(logits, places.tolist(), strict=True):
            self._device.read(self._logits + place * self._row_bytes, row)
        return logits

    def _turns(self, rows: Sequence[SamplingRow]) -> Iterator[tuple[int, int]]:
        """First and last + 1 of rows that fit into one turn."""
        first = changes = 0
        for index, row in enumerate(rows):
            more = changes_of(row)
            if index - first == self._rows or (index > first and changes + more > self._changes):
                yield first, index
                first, changes = index, 0
            changes += more
        if first < len(rows):
            yield first, len(rows)

    def _run(self, rows: Sequence[SamplingRow], places: Int32s) -> Arrays:
        assert places.min() >= 0
        assert places.max() < self._places
        device = self._device
        device.activate()
        arrays = packed(rows, places)
        addresses = self._put(arrays)
        counts = np.diff(arrays["starts"])
        if counts.any():
            self._copy_changed(places, counts)
            kernel = self._kernels["sample_adjust"]
            grid = (len(rows), cdiv(int(counts.max()), kernel.sizes["BLOCK"]))
            self._launch(kernel, grid, [addresses[name] for name in _ADJUST])
        results = [self._made + self._offsets[spec.name] for spec in RESULTS]
        self._launch(self._kernels["sample_pick"], (len(rows), 1), [addresses[name] for name in _PICK] + results)
        wanted = results_of(rows)
        device.download(self._pinned_made.address, self._made, self._end(wanted[-1], len(rows)))
        device.synchronize()
        return {spec.name: self._result(spec, len(rows)) for spec in wanted}

    def _launch(self, kernel: Kernel, grid: tuple[int, int], addresses: Sequence[int]) -> None:
        self._device.launch_kernel(
            kernel.handle, grid, kernel.threads, kernel.shared_bytes, (self._logits, self._adjusted, *addresses)
        )

    def _put(self, arrays: Arrays) -> dict[str, int]:
        """Lay the arguments out in pinned memory and enqueue their copy; each one's address on the GPU."""
        addresses, at = {}, 0
        for name, array in arrays.items():
            addresses[name] = self._given + at
            self._pinned_given.array[at : at + array.nbytes] = array.view(np.uint8)
            at += aligned(array.nbytes)
        self._device.upload(self._given, self._pinned_given.address, at)
        return addresses

    def _copy_changed(self, places: Int32s, counts: Int32s) -> None:
        """Enqueue copies of the changed rows' logits, those side by side together."""
        changed = np.flatnonzero(counts)
        breaks = np.flatnonzero((np.diff(changed) != 1) | (np.diff(places[changed]) != 1)) + 1
        for group in np.split(changed, breaks):
            source = self._logits + int(places[group[0]]) * self._row_bytes
            target = self._adjusted + int(group[0]) * self._row_bytes
            self._device.copy(target, source, len(group) * self._row_bytes)

    def _end(self, last: ResultSpec, rows: int) -> int:
        return self._offsets[last.name] + last.nbytes(rows)

    def _result(self, spec: ResultSpec, rows: int) -> Array:
        start = self._offsets[spec.name]
        array = self._pinned_made.array[start : self._end(spec, rows)].view(spec.dtype).copy()
        return array.reshape(rows, -1) if spec.wide else array


def _offsets(rows: int) -> dict[str, int]:
    """Where each result of `rows` rows lies."""
    offsets, at = {}, 0
    for spec in RESULTS:
        offsets[spec.name] = at
        at += aligned(spec.nbytes(rows))
    return offsets
