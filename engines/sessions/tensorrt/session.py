"""TrtSession: prefill.plan and decode.plan on one GPU, through TensorRT or TensorRT-RTX."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from deepseek_trt.engines.plans.check import (
    check_library,
    check_pages,
    check_version,
    chunk_of,
    kernels_note,
    limits_of,
    open_plan,
    read_plans,
)
from deepseek_trt.engines.plans.flavour import open_flavour
from deepseek_trt.engines.plans.plan import Plan
from deepseek_trt.engines.sessions.door import Door
from deepseek_trt.engines.sessions.holding import Holding, Picked
from deepseek_trt.engines.sessions.pools import fill_pools, shapes_of
from deepseek_trt.engines.sessions.session import Session, feeds_of
from deepseek_trt.engines.sessions.tensorrt.cuda import open_device
from deepseek_trt.engines.sessions.tensorrt.device import ALIGNMENT, Device, aligned
from deepseek_trt.engines.sessions.tensorrt.engine import Engine
from deepseek_trt.engines.sessions.tensorrt.graphs import Graphs
from deepseek_trt.engines.sessions.tensorrt.kernels import load_kernels
from deepseek_trt.engines.sessions.tensorrt.picker import Picker
from deepseek_trt.engines.sessions.tensorrt.staging import Staging, given_inputs
from deepseek_trt.engines.sessions.tensorrt.weight_upload import UploadProgress, upload_weights
from deepseek_trt.export.arrays import Array, Arrays, Floats, Int32s, Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import MOST_NEW_TOKENS, present_name
from deepseek_trt.export.errors import BackendError, RequestError
from deepseek_trt.plugins.aot.variants import SAMPLING
from deepseek_trt.plugins.cpu.library import cpu_library
from deepseek_trt.plugins.cpu.sampling_row import SamplingRow
from deepseek_trt.plugins.kernels.sampling.batch import takes
from deepseek_trt.plugins.tensorrt.loading import load_library
from deepseek_trt.plugins.tensorrt.manifest import read_manifest

_log = logging.getLogger(__name__)


class TrtSession(Session):
    """Both engines over one set of page pools and one copy of the weights, on one stream.

    Decode is padded to powers of two of rows, of new tokens and of table width, so that a few CUDA graphs serve all: a
    bucket that comes back is captured after its run, and replayed from the third time on. Padding writes to the scratch
    page. Tokens are picked where the logits are, by kernels of the plugin library (`holding`).
    One thread at a time.

    `limits` says what the engines were built for: more rows at once, or longer ones, are refused by name.
    """

    backend = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        pages: int,
        *,
        cuda_graphs: bool = True,
        progress: UploadProgress | None = None,
        make_device: Callable[[], Device] = open_device,
    ) -> None:
        """Raises BackendError, BuildError or BundleError, saying what to do, where plans, plugin library, TensorRT and
        GPU do not belong together; all of that is checked before TensorRT reads a plan.
        """
        plans = read_plans(bundle)
        self.limits = limits_of(plans)
        self.door = Door.of(bundle, pages)
        check_pages(self.limits, bundle.manifest.cache, pages)
        self.cache, self.pages = bundle.manifest.cache, pages
        self.library = cpu_library(bundle).path  # samples on the CPU what the GPU does not
        self._pools = shapes_of(self.cache, pages)  # of all layers' pools, in order
        self.vocab_size = bundle.manifest.model.vocab_size
        self._all_logits = bundle.manifest.all_logits
        self._on_its_way = False  # whether a run was not waited for
        self.chunk = chunk_of(self.limits)
        self._plans, self._cuda_graphs = plans, cuda_graphs
        with contextlib.ExitStack() as stack:
            self._open(bundle, make_device, stack, progress)
            self._closing = weakref.finalize(self, stack.pop_all().close)

    def _open(
        self,
        bundle: Bundle,
        make_device: Callable[[], Device],
        stack: contextlib.ExitStack,
        progress: UploadProgress | None,
    ) -> None:
        plans = list(self._plans.values())
        flavour = open_flavour(plans[0].record.spec.flavour)
        for plan in plans:
            check_version(plan, flavour)
        device = self._device = make_device()
        stack.callback(device.close)
        device.activate()
        libraries = {check_library(bundle, plan, device.sm) for plan in plans} - {None}
        with contextlib.ExitStack() as streams:
            opened = {name: streams.enter_context(open_plan(bundle, plan)) for name, plan in self._plans.items()}
            for library in libraries:
                load_library(library, flavour.trt, plans[0].record.plugin_library_sha256)  # type: ignore[arg-type]
            self._engines: dict[str, Engine] = {}
            for name, plan in self._plans.items():
                captured = self._cuda_graphs and name == "decode"
                engine = Engine(plan, opened[name], flavour, device.sm, device.name, captured)
                stack.callback(engine.close)
                self._engines[name] = engine
        kernels = (kernels_note(bundle, plan, device.sm) for plan in plans)
        engines = (engine.note for engine in self._engines.values())
        uncaptured = "" if self._cuda_graphs else "CUDA graphs are off: every step costs its launches"
        where = f"{flavour.name} {flavour.version} on {device.name}"
        self._allocate(bundle, progress)
        sampling = self._open_picker(next(iter(libraries), None))
        notes = [where, *engines, *kernels, *flavour.log.notes, uncaptured, sampling]
        self.note = "; ".join(dict.fromkeys(filter(None, notes)))
        self._graphs = self._make_graphs(stack)

    def _allocate(self, bundle: Bundle, progress: UploadProgress | None) -> None:
        """All memory there will be: nothing is allocated while tokens are made."""
        device, plans = self._device, self._plans.values()
        working = max(engine.activation_bytes for engine in self._engines.values())
        activations = device.allocate(working, "TensorRT's working memory")
        slots = [aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in self._pools]
        pools = device.allocate(sum(slots), f"the latent cache of {self.pages} pages")
        device.zero(pools, sum(slots))
        self.pool_addresses = tuple(pools + before for before in itertools.accumulate(slots[:-1], initial=0))
        self._staging = Staging(device, [plan.record for plan in plans])
        self._allocate_logits()
        names = {name for plan in plans for name in plan.record.weights}
        weights = upload_weights(device, bundle, names, progress)
        for name, engine in self._engines.items():
            engine.use_memory(activations, working)
            self._bind(engine, self._plans[name], weights)

    def _allocate_logits(self) -> None:
        """One block, in rows of a token's logits; `_places` are the first rows of each graph's."""
        batch, row = self.limits.batch, self.vocab_size * 4
        tokens = self.limits.input_len if self._all_logits else 1
        decoded, prefilled = batch * MOST_NEW_TOKENS, batch * tokens
        step = ALIGNMENT // math.gcd(ALIGNMENT, row)  # rows after which an address is aligned again
        behind = 0 if self._all_logits else -(-decoded // step) * step
        self._places = {"decode": 0, "prefill": behind}
        self._all_places = max(decoded, behind + prefilled)
        self._logits = self._device.allocate(self._all_places * row, "the logits")
        self._pinned_logits = self._device.pin(max(decoded, prefilled) * row)

    def _make_graphs(self, stack: contextlib.ExitStack) -> Graphs | None:
        """The CUDA graphs of decode, whose contexts go before the engine; they must not keep the session alive."""
        if not self._cuda_graphs:
            return None
        say = weakref.WeakMethod(self._say)

        def say_while_alive(note: str) -> None:
            method = say()
            if method is not None:
                method(note)

        graphs = Graphs(self._device, self._engines["decode"], say_while_alive)
        stack.callback(graphs.close)
        return graphs

    def _say(self, note: str) -> None:
        """What turns out while it runs: a warning now, and part of the note from now on."""
        self.note = f"{self.note}; {note}"
        _log.warning("%s", note)

    def _bind(self, engine: Engine, plan: Plan, weights: dict[str, int]) -> None:
        """What stays where it is: weights, pools (as past and present at once) and logits."""
        for name in plan.record.weights:
            engine.bind(name, weights[name])
        presents = [present_name(n, pool.part) for n in range(self.cache.layers) for pool in self.cache.pools]
        named = zip(self.cache.pool_names, presents, self.pool_addresses, self._pools, strict=True)
        for past, present, address, (shape, _) in named:
            engine.bind(past, address)
            engine.bind(present, address)
            engine.shape(past, shape)
        engine.bind("logits", self._logits_of(plan.record.graph))

    def _logits_of(self, graph: str) -> int:
        """The address of a graph's logits: its own, as they may be read after the other's run, unless prefill gives
        those of every token.
        """
        return self._logits + self._places[graph] * self.vocab_size * 4

    def _open_picker(self, library: Path | None) -> str:
        """Have tokens picked on the GPU; where that cannot be, the reason, for the note."""
        self._picker: Picker | None = None
        try:
            if self._all_logits:
                raise BackendError("the bundle gives logits of every token of a prompt")
            if library is None:
                raise BackendError("the plans carry their plugin library")
            loaded = load_kernels(self._device, library, read_manifest(library), SAMPLING)
        except BackendError as error:
            return f"tokens are sampled on the CPU, to which all logits are copied: {error}"
        where = self._device, loaded.kernels, self._logits, self._all_places
        self._picker = Picker(*where, self.vocab_size, self.limits.batch)
        return loaded.note

    def holding(self) -> Holding | None:
        return self if self._picker else None

    def prefill(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        """As Session's; more tokens than the engine takes at once are cached piece by piece."""
        self._check_prefill(input_ids, sequence_lengths, past_lengths, page_table)
        batch, steps = input_ids.shape
        logits = np.zeros((*self._logits_rows(batch, steps), self.vocab_size), dtype=np.float32)
        for start in range(0, max(steps, 1), self.limits.input_len):
            rows = np.flatnonzero((sequence_lengths > start) | (start == 0))
            if not rows.size:
                break
            ids = input_ids[rows, start : start + self.limits.input_len]
            lengths = np.clip(sequence_lengths[rows] - start, 0, ids.shape[1])
            feeds = feeds_of(ids, lengths, past_lengths[rows] + start, page_table[rows])
            self._run("prefill", feeds)
            part = self._fetch("prefill", self._logits_rows(*ids.shape))
            if self._all_logits:
                logits[rows, start : start + ids.shape[1]] = part
            else:
                logits[rows] = part  # of a row's last piece, in the end
        return logits

    def _logits_rows(self, batch: int, steps: int) -> tuple[int, ...]:
        return (batch, steps) if self._all_logits else (batch,)

    def prefill_held(
        self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> Int32s:
        """See Holding; logits of more tokens than the engine takes at once are brought back to the GPU."""
        given = input_ids, sequence_lengths, past_lengths, page_table
        if input_ids.shape[1] > self.limits.input_len:
            self._device.write(self._logits_of("prefill"), self.prefill(*given))
        else:
            self._check_prefill(*given)
            self._run("prefill", feeds_of(*given))
        return self._places["prefill"] + np.arange(len(input_ids), dtype=np.int32)

    def decode(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        (rows, steps), padded = input_ids.shape, self._decode(input_ids, sequence_lengths, past_lengths, page_table)
        return self._fetch("decode", padded)[:rows, :steps]

    def decode_held(
        self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> Int32s:
        """See Holding."""
        (rows, steps), padded = input_ids.shape, self._decode(input_ids, sequence_lengths, past_lengths, page_table)
        return np.arange(padded[0] * padded[1], dtype=np.int32).reshape(padded)[:rows, :steps]

    def picks(self, row: SamplingRow) -> bool:
        """See Holding."""
        return takes(row)

    def pick(self, rows: Sequence[SamplingRow], places: Int32s) -> list[Picked]:
        """See Holding."""
        assert self._picker
        return self._picker.pick(rows, places)

    def read(self, places: Int32s) -> Floats:
        """See Holding."""
        assert self._picker
        return self._picker.read(places)

    def _check_prefill(
        self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> None:
        self.door.check_prefill(input_ids, sequence_lengths, past_lengths, page_table)
        self._check_sizes(input_ids, page_table)

    def _decode(
        self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> tuple[int, int]:
        """Run a step padded to its bucket; rows and tokens a row of that."""
        self.door.check_decode(input_ids, sequence_lengths, past_lengths, page_table)
        self._check_sizes(input_ids, page_table)
        (rows, steps), width = input_ids.shape, page_table.shape[1]
        more = (0, bucket(rows, self.limits.batch) - rows)
        longer = (0, bucket(steps, MOST_NEW_TOKENS) - steps)
        wider = (0, bucket(width, self.limits.table) - width)
        feeds = feeds_of(
            np.pad(input_ids, (more, longer)),
            np.pad(sequence_lengths, more, constant_values=1),
            np.pad(past_lengths, more),
            np.pad(page_table, (more, wider)),  # with page 0: scratch
        )
        self._run("decode", feeds)
        return rows + more[1], steps + longer[1]

    def pools(self, layer: int) -> tuple[Array, ...]:
        """Copies of the layer's pools."""
        each = len(self.cache.pools)
        self._device.activate()
        found = []
        for index in range(layer * each, (layer + 1) * each):
            array = np.empty(*self._pools[index])
            self._device.read(self.pool_addresses[index], array.view(np.uint8))
            found.append(array)
        return tuple(found)

    def fill(self, value: float) -> None:
        self._device.activate()
        for address, (shape, dtype) in zip(self.pool_addresses, self._pools, strict=True):
            array = np.empty(shape, dtype)
            fill_pools([array], value)
            self._device.write(address, array.view(np.uint8))

    def close(self) -> None:
        self._engines.clear()
        self._closing()

    def _check_sizes(self, input_ids: Int64s, page_table: Int32s) -> None:
        """RequestError where the engines take fewer rows or shorter sequences."""
        rows, width = page_table.shape
        if len(input_ids) > self.limits.batch:
            raise RequestError(
                f"{rows} prompts at once; the engines were built for {self.limits.batch}: "
                f"give fewer, or build with --max-batch-size {rows}"
            )
        if width > self.limits.table:
            tokens, most = width * self.cache.page_size, self.limits.table * self.cache.page_size
            raise RequestError(
                f"a sequence of up to {tokens} tokens; the engines were built for {most}: "
                f"use a shorter prompt or fewer new tokens, or build with --max-seq-len {tokens}"
            )

    def _run(self, graph: str, feeds: Arrays) -> None:
        """Stage the inputs and enqueue the run, which leaves its logits on the GPU."""
        device = self._device
        device.activate()
        if self._on_its_way:  # the pinned inputs of the run before may not be sent yet
            device.synchronize()
        inputs = given_inputs(self._plans[graph].record)
        addresses = self._staging.put(inputs, feeds)

        def enqueue(engine: Engine) -> None:
            for name, address in addresses.items():
                engine.shape(name, feeds[name].shape)
                engine.bind(name, address)
            self._staging.upload()
            engine.enqueue(device.stream)

        self._on_its_way = True
        if graph == "decode" and self._graphs is not None:
            self._graphs.run(tuple(feeds[tensor.name].shape for tensor in inputs), enqueue)
        else:
            enqueue(self._engines[graph])

    def _fetch(self, graph: str, rows: tuple[int, ...]) -> Floats:
        """Wait for the run, and give its logits [*rows, vocab]."""
        nbytes = int(np.prod(rows)) * self.vocab_size * 4
        self._device.download(self._pinned_logits.address, self._logits_of(graph), nbytes)
        self._device.synchronize()
        self._on_its_way = False
        logits: Floats = self._pinned_logits.array[:nbytes].view(np.float32).copy()
        return logits.reshape(*rows, self.vocab_size)


def bucket(size: int, most: int) -> int:
    """The next power of two, but not above `most`."""
    return min(1 << (size - 1).bit_length(), most)
