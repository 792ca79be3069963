"""ONNX Runtime: the only place that opens graphs with it, and the sessions that run a bundle's two graphs there."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from deepseek_trt.engines.sessions.door import Door, check_cache_memory
from deepseek_trt.engines.sessions.huge_pages import Progress, zeros
from deepseek_trt.engines.sessions.loading import load_weights, weights_fit
from deepseek_trt.engines.sessions.pools import fill_pools, shapes_of
from deepseek_trt.engines.sessions.prepared import fused_graph
from deepseek_trt.engines.sessions.session import GraphPair, widening_note
from deepseek_trt.engines.sessions.threads import check_threads
from deepseek_trt.export.arrays import Array, Arrays, Floats
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.graph import LAST_HIDDEN, GraphSpec
from deepseek_trt.export.bundle.proof import no_progress
from deepseek_trt.export.dtypes import computed_in, dtype_of
from deepseek_trt.export.errors import BackendError, BundleError
from deepseek_trt.export.text.wording import some
from deepseek_trt.export.writing.working import scratch_folder
from deepseek_trt.plugins.cpu.library import CpuLibrary, ExpertsHit, cpu_library, experts_hit_counter

ROUNDED = "tokens in 16 bits where weights are int8 or int4"
LIBRARIES = "install the CUDA and cuDNN that this ONNX Runtime names in its documentation, or use --backend tensorrt"

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_SMALL = 2**20
_DTYPES = {  # ONNX Runtime's names
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}

OrtValues = dict[str, ort.OrtValue]


@dataclass(frozen=True)
class Place:
    """Which of ONNX Runtime's providers computes, and where its tensors lie."""

    provider: str = "CPUExecutionProvider"
    device: str = "cpu"
    ordinal: int = 0


@dataclass(frozen=True)
class Memory:
    """What ONNX Runtime may hold for speed: packed copies of weights, constants computed once (a cast weight is one),
    and an arena that keeps what a step needed.

    Not folded, weights are cast in every call: of a prefill of 128 tokens that is no measurable part, of a decode step
    most.
    """

    packed: bool = True
    folded: bool = True
    arena: bool = True


CPU, CUDA = Place(), Place("CUDAExecutionProvider", "cuda")
USUAL, UNFOLDED = Memory(packed=False), Memory(packed=False, folded=False)
LEAN = Memory(packed=False, folded=False, arena=False)  # where memory is short


def open_graph(
    bundle: Bundle,
    graph: str,
    threads: int = 0,
    *,
    model: bytes | None = None,
    name: str = "",
    given: OrtValues | None = None,
    shared: OrtValues | None = None,
    library: Path | None = None,
    place: Place = CPU,
    memory: Memory = USUAL,
) -> ort.InferenceSession:
    """A graph of the bundle ready to run, or the `model` that was made of it; errors call it `name`, else by its file.

    Weights are read from the bundle's file, unless they are `given`, which ONNX Runtime copies, or `shared`, which it
    reads where they are: those must live as long as the session. A by-reference bundle has no file to read. `library`
    holds operators that the model wants. `threads` 0 takes all processors. Of a narrow bundle nothing is folded
    whatever `memory` says, and as exported nothing kept: all weights would be there widened. Raises BackendError where
    ONNX Runtime refuses.
    """
    if bundle.manifest.is_narrow:
        memory = dataclasses.replace(memory, folded=False, arena=memory.arena and library is not None)
    model = bundle.graph_bytes(graph) if model is None else model
    bundle.prove_weights()  # ONNX Runtime reads the file by itself
    if bundle.manifest.by_reference and given is None:
        narrow = bundle.manifest.dtype == "float16"  # whose weights ONNX Runtime widens at load
        given = {n: v for n, v in (shared or {}).items() if _read_at_load(n, v, narrow or memory.folded)}
    options = _options(threads, place, memory)
    if given:
        options.add_external_initializers(list(given), list(given.values()))
    for weight, value in (shared or {}).items():
        options.add_initializer(weight, value)
    if library is not None:
        options.register_custom_ops_library(str(library))
    provider = (place.provider, {} if place.device == "cpu" else {"device_id": str(place.ordinal)})
    disabled = [] if memory.folded else ["ConstantFolding"]
    try:
        with _weights_folder(bundle) as folder:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
            session = ort.InferenceSession(model, options, providers=[provider], disabled_optimizers=disabled)
    except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
        name = name or str(bundle.graph_path(graph))
        where, mend = ("", "export the checkpoint again") if place == CPU else (f" with {place.provider}", LIBRARIES)
        raise BackendError(f"ONNX Runtime cannot load {name}{where} ({error}): {mend}") from None
    if session.get_providers()[0] != place.provider:
        raise BackendError(f"ONNX Runtime's {place.provider} does not start on this machine: {LIBRARIES}")
    return session


def referred_weights(bundle: Bundle) -> OrtValues | None:
    """What graphs of a by-reference bundle are opened with; None where the bundle's own file holds the weights."""
    return ort_values(load_weights(bundle, mapped=True)) if bundle.manifest.by_reference else None


def ort_values(arrays: Arrays) -> OrtValues:
    """Views of the arrays, which they keep alive."""
    return {name: _ort_value(array) for name, array in arrays.items()}


class _BoundSession(GraphPair):
    """Both graphs over one set of page pools; each pool is bound as past and present at once."""

    backend = "ort"

    def __init__(self, bundle: Bundle, pages: int, place: Place, library: Path | None) -> None:
        """bfloat16 bundles are computed in float32. Whoever makes it goes on with `_bind`."""
        cache = bundle.manifest.cache
        self.cache = dataclasses.replace(cache, dtype=computed_in(cache.dtype))
        self.door = Door.of(bundle, pages)
        if place.device == "cpu":
            check_cache_memory(self.cache, pages)
        self.pages, self.vocab_size, self.library = pages, bundle.manifest.model.vocab_size, library
        self._shapes = shapes_of(self.cache, pages)
        self._place, self.drafts = place, bundle.manifest.speculation is not None

    def _bind(self, bundle: Bundle, graphs: dict[str, ort.InferenceSession], pools: list[ort.OrtValue]) -> None:
        for name, graph in graphs.items():
            _check_inputs(bundle, bundle.graph(name).as_computed(), graph)
        self._graphs, self._pools = graphs, pools
        self._bindings = {name: graph.io_binding() for name, graph in graphs.items()}
        named = list(zip(self.cache.pool_names, pools, strict=True))
        for name, binding in self._bindings.items():
            for past, pool in named[-1:] if name == "mtp" else named[: len(named) - self.drafts]:
                binding.bind_ortvalue_input(past, pool)
                binding.bind_ortvalue_output(past.replace("past_key_values", "present"), pool)

    def _of_layer(self, layer: int) -> slice:
        each = len(self.cache.pools)
        return slice(layer * each, (layer + 1) * each)

    def compute(self, graph: str, feeds: Arrays) -> Floats:
        binding = self._bindings[graph]
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in (LAST_HIDDEN, "logits") if self.drafts else ("logits",):  # new ones each time
            binding.bind_output(name, self._place.device, self._place.ordinal)
        self._graphs[graph].run_with_iobinding(binding)
        if self._place.device != "cpu":
            binding.synchronize_outputs()
        made = binding.get_outputs()
        if self.drafts:
            self.hidden = made[-2].numpy()
        logits: Floats = made[-1].numpy()
        return logits


class OrtSession(_BoundSession):
    """On the CPU, through the compiled operators where there are any."""

    def __init__(
        self,
        bundle: Bundle,
        pages: int,
        threads: int = 0,
        compiled: bool = True,
        mapped: bool | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """`threads` 0 takes all processors.

        Without `compiled`, or where the compiled operators cannot be had, the exported bodies are run. `mapped` leaves
        the weights in their file instead of copying them to huge pages, which decodes faster; None: as memory allows.
        `progress` is told of what is copied or assembled.
        """
        check_threads(threads)
        library = cpu_library(bundle) if compiled else CpuLibrary(None)
        super().__init__(bundle, pages, CPU, library.path)
        self.threads = threads or len(os.sched_getaffinity(0))
        self._count = experts_hit_counter(library.path) if library.path else None
        mapped = not weights_fit(bundle) if mapped is None else mapped
        self._weights = ort_values(load_weights(bundle, mapped, progress))
        short = mapped or bundle.manifest.by_reference
        opened = {
            "prefill": self._open(bundle, "prefill", threads, LEAN if short else UNFOLDED),
            "decode": self._open(bundle, "decode", threads, LEAN if short else USUAL),
        }
        if self.drafts:
            opened["mtp"] = self._open(bundle, "mtp", threads, LEAN if short else USUAL)
        graphs = {name: graph for name, (graph, _) in opened.items()}
        narrow = library.path is not None and not opened["decode"][1]  # compiled operators widen numbers as they go
        self._weights_dtype = bundle.manifest.dtype if narrow else self.cache.dtype
        left = [name for _, names in opened.values() for name in names]
        self.rounds_tokens = library.path is not None and bundle.manifest.rounds_tokens(left)
        as_exported = f"as exported, not compiled: {some(left)}" if left else ""
        words = (
            widening_note(bundle.manifest.dtype),
            ROUNDED if self.rounds_tokens else "",
            as_exported,
            library.reason,
        )
        self.note = "; ".join(filter(None, words))
        self._arrays = [zeros(shape, dtype) for shape, dtype in self._shapes]
        self._bind(bundle, graphs, [ort.OrtValue.ortvalue_from_numpy(array) for array in self._arrays])

    @property
    def weights_dtype(self) -> str:
        return self._weights_dtype

    def experts_hit(self) -> ExpertsHit:
        return self._count() if self._count else super().experts_hit()

    def pools(self, layer: int) -> tuple[Array, ...]:
        return tuple(self._arrays[self._of_layer(layer)])

    def _open(self, bundle: Bundle, name: str, threads: int, memory: Memory) -> tuple[ort.InferenceSession, list[str]]:
        """The graph, and the names of the custom operators that are run as exported though others are compiled."""
        if self.library is None:
            return open_graph(bundle, name, threads, shared=self._weights, memory=memory), []
        ctypes.CDLL(str(self.library)).deepseek_trt_cpu_threads(self.threads)
        model, left = fused_graph(bundle, name)
        memory = LEAN if left and bundle.manifest.is_narrow else memory
        graph = open_graph(
            bundle,
            name,
            threads if left else 1,  # of ONNX Runtime: the compiled operators bring their own
            model=model,
            shared=self._weights,
            library=self.library,
            memory=memory,
        )
        return graph, left


class OrtCudaSession(_BoundSession):
    """Through the CUDA provider, the pools in the GPU's memory. Nodes that the provider lacks run on the CPU, as ONNX
    Runtime decides.
    """

    def __init__(self, bundle: Bundle, pages: int, threads: int = 0, place: Place = CUDA) -> None:
        """BackendError where the provider does not start. Tests run the same code at another place, the CPU."""
        super().__init__(bundle, pages, place, cpu_library(bundle).path)  # samples on the CPU
        dtype, computed = bundle.manifest.dtype, self.cache.dtype
        words = "" if computed == dtype else f"{dtype} weights, computed in {computed}, "
        self.note = f"{words}ONNX Runtime's {place.provider}"
        weights, names = referred_weights(bundle), [str(graph.name) for graph in bundle.manifest.graphs]
        graphs = {name: open_graph(bundle, name, threads, given=weights, place=place) for name in names}
        zeroed = (np.zeros(shape, dtype) for shape, dtype in self._shapes)
        self._bind(bundle, graphs, [ort.OrtValue.ortvalue_from_numpy(a, place.device, place.ordinal) for a in zeroed])

    def pools(self, layer: int) -> tuple[Array, ...]:
        """Copies of the layer's pools."""
        return tuple(pool.numpy() for pool in self._pools[self._of_layer(layer)])

    def fill(self, value: float) -> None:
        for pool, (shape, dtype) in zip(self._pools, self._shapes, strict=True):
            filled = np.empty(shape, dtype)
            fill_pools([filled], value)
            pool.update_inplace(filled)


def _check_inputs(bundle: Bundle, graph: GraphSpec, session: ort.InferenceSession) -> None:
    """BundleError where a graph does not take what it is going to be fed, by name, dtype and fixed dims."""
    wanted = {t.name: (t.dtype, [d if isinstance(d, int) else None for d in t.dims]) for t in graph.inputs}
    found = {
        t.name: (_DTYPES.get(t.type, t.type), [d if isinstance(d, int) else None for d in t.shape])
        for t in session.get_inputs()
    }
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise BundleError(
                f"{bundle.path}: its {graph.name} graph takes {name} as {found.get(name)}, the manifest says "
                f"{wanted.get(name)}: export the checkpoint again"
            )


@contextmanager
def _weights_folder(bundle: Bundle) -> Iterator[Path]:
    """Give where the weights file lies. By reference it is an empty one: ONNX Runtime wants the file that graphs name,
    reads nothing from it that it was given, and fails where it would read.
    """
    if not bundle.manifest.by_reference:
        yield bundle.path
        return
    with scratch_folder() as folder:
        (folder / WEIGHTS_FILE).touch()
        yield folder


def _read_at_load(name: str, value: ort.OrtValue, dense: bool) -> bool:
    """Whether ONNX Runtime may look at the weight's numbers when it loads a graph: experts are none that it folds, and
    others matter only where they are small or `dense` weights are folded. What it may look at it copies.
    """
    return ".experts." not in name and (dense or value.tensor_size_in_bytes() < _SMALL)


def _options(threads: int, place: Place, memory: Memory) -> ort.SessionOptions:
    options = ort.SessionOptions()
    check_threads(threads)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Errors, but of another provider: one that does not start is reported by an exception.
    options.log_severity_level = 3 if place.device == "cpu" else 4
    options.enable_cpu_mem_arena = memory.arena
    if not memory.packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _ort_value(array: Array) -> ort.OrtValue:
    """A view of the array; ONNX Runtime takes ml_dtypes' bfloat16 as bits and a type."""
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), dtype_of("bfloat16").onnx)
    return ort.OrtValue.ortvalue_from_numpy(array)
