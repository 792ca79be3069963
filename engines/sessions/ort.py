"""OrtSession: the bundle through ONNX Runtime; decode through the compiled CPU operators where there are any."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from deepseek_trt.engines.sessions.huge_pages import weights_fit, weights_in_memory, zeros
from deepseek_trt.export.arrays import Floats, Int32s, Int64s, numpy_dtype
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import past_name, present_name
from deepseek_trt.export.bundle.weights import reference_arrays, weight_arrays
from deepseek_trt.export.errors import BackendError
from deepseek_trt.plugins.cpu.library import CpuLibrary, cpu_library, experts_hit_counter

OrtValues = dict[str, ort.OrtValue]
_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; a served runtime has no onnx package


class OrtSession:
    """Both graphs over one set of page pools; each pool is bound as past and present at once."""

    backend = "ort"

    def __init__(
        self, bundle: Bundle, pages: int, threads: int = 0, compiled: bool = True, mapped: bool | None = None
    ) -> None:
        """`threads` 0 takes all processors. bfloat16 bundles are computed in float32.

        Without `compiled`, or where the compiled operators cannot be had, the exported bodies are run. `mapped` leaves
        the weights in their file instead of copying them to huge pages, which decodes faster; None: as memory allows.
        """
        widened = bundle.manifest.dtype == "bfloat16"
        library = cpu_library(bundle.path) if compiled else CpuLibrary(None)
        self.library = library.path  # samplers are in it, too
        self.experts_hit = experts_hit_counter(library.path) if library.path else None
        self.threads = threads or len(os.sched_getaffinity(0))
        notes = ["bfloat16 weights, computed in float32 (ONNX Runtime's CPU provider)"] if widened else []
        self.cache = dataclasses.replace(bundle.manifest.cache, dtype="float32") if widened else bundle.manifest.cache
        self.pages = pages
        self.vocab_size = bundle.manifest.model.vocab_size
        self.mapped = not weights_fit(bundle) if mapped is None else mapped
        copied = not self.mapped and not bundle.manifest.by_reference  # what is assembled is a copy already
        weights = _ort_values(weights_in_memory(bundle) if copied else weight_arrays(bundle))
        self._weights = weights  # the graphs read them where they are
        self._sessions = {"prefill": load_graph(bundle, "prefill", None, threads, None, weights, self.mapped)}
        left: list[str] = []
        self._sessions["decode"] = load_graph(bundle, "decode", library.path, threads, left, weights, self.mapped)
        # What decode reads: compiled operators widen numbers as they go.
        self.weights_dtype = bundle.manifest.dtype if library.path and not left else self.cache.dtype
        if left:
            notes.append(f"as exported, not compiled: {', '.join(left)}")
        self.note = "; ".join([*notes, library.reason] if library.reason else notes)
        shape = (pages, self.cache.page_size, self.cache.latent_dim)
        self._arrays = [zeros(shape, numpy_dtype(self.cache.dtype)) for _ in range(self.cache.layers)]
        self._pools = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._arrays]
        self._bindings = {graph: self._bind(graph) for graph in self._sessions}

    def prefill(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        return self._run(
            "prefill",
            input_ids=input_ids,
            sequence_lengths=sequence_lengths,
            past_lengths=past_lengths,
            page_table=page_table,
        )

    def decode(self, input_ids: Int64s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        return self._run("decode", input_ids=input_ids, past_lengths=past_lengths, page_table=page_table)

    def pool(self, layer: int) -> npt.NDArray[Any]:
        return self._arrays[layer]

    def _bind(self, graph: str) -> ort.IOBinding:
        binding = self._sessions[graph].io_binding()
        for layer, pool in enumerate(self._pools):
            binding.bind_ortvalue_input(past_name(layer), pool)
            binding.bind_ortvalue_output(present_name(layer), pool)
        return binding

    def _run(self, graph: str, **feeds: npt.NDArray[Any]) -> Floats:
        binding = self._bindings[graph]
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cpu")  # a new one each time
        self._sessions[graph].run_with_iobinding(binding)
        logits: Floats = binding.get_outputs()[-1].numpy()
        return logits


def load_graph(
    bundle: Bundle,
    graph: str,
    library: Path | None = None,
    threads: int = 0,
    left: list[str] | None = None,
    weights: OrtValues | None = None,
    lean: bool = False,
) -> ort.InferenceSession:
    """A graph of the bundle in ONNX Runtime's CPU provider, or with the compiled operators of `library` (decode only).

    `left` receives the names of the custom operators that the compiled ones do not replace. Without `weights` ONNX
    Runtime reads them from their file; given ones must live as long as the session. `lean` keeps it from making its own
    copies of them, packed or cast. BackendError where ONNX Runtime refuses.
    """
    options = _options(threads)
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
    kept = _supply_references(options, bundle) if bundle.manifest.by_reference else None
    for name, value in (weights or {}).items():
        options.add_initializer(name, value)
    source: str | bytes = str(bundle.graph_path(graph))
    if library is not None and graph == "decode":
        source = _with_library(options, bundle, library, threads, left)
    elif bundle.manifest.dtype == "bfloat16":
        source = _prepared(widened_path(bundle, graph)) or _widened_bytes(bundle.graph_path(graph))
    if isinstance(source, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    try:
        session = ort.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"] if lean else [],  # it would cast narrow weights once and for all
        )
    except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
        path = bundle.graph_path(graph)
        raise BackendError(f"ONNX Runtime cannot load {path} ({error}): export the checkpoint again") from None
    del kept
    return session


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _with_library(
    options: ort.SessionOptions, bundle: Bundle, library: Path, threads: int, left: list[str] | None
) -> str | bytes:
    """The decode graph for the compiled operators, which bring their own threads."""
    options.register_custom_ops_library(str(library))
    ctypes.CDLL(str(library)).deepseek_trt_cpu_threads(threads or len(os.sched_getaffinity(0)))
    prepared = _prepared(fused_path(bundle))
    if prepared is not None:
        options.intra_op_num_threads = 1
        return prepared
    from deepseek_trt.plugins.cpu.fuse import fused_bytes  # needs onnx

    source, names = fused_bytes(bundle.graph_path("decode"))
    if left is not None:
        left += names
    if not names:
        options.intra_op_num_threads = 1  # nothing is left for ONNX Runtime's threads
    return source


def _prepared(path: Path) -> str | None:
    return str(path) if path.is_file() else None


def fused_path(bundle: Bundle) -> Path:
    """Where a bundle that is to be loaded without the onnx package keeps decode for the compiled operators."""
    return bundle.path / "decode.cpu.onnx"


def widened_path(bundle: Bundle, graph: str) -> Path:
    """Where a bundle that is to be loaded without the onnx package keeps the graph that computes in float32."""
    return bundle.path / f"{graph}.float32.onnx"


def _widened_bytes(path: Path) -> bytes:
    from deepseek_trt.export.passes.widen import widened_bytes  # needs onnx

    return widened_bytes(path)


def _supply_references(options: ort.SessionOptions, bundle: Bundle) -> OrtValues:
    """Hand the checkpoint's tensors to ONNX Runtime, which copies them; returns what must live until then."""
    values = _ort_values(reference_arrays(bundle))
    options.add_external_initializers(list(values), list(values.values()))
    return values


def _ort_values(arrays: dict[str, npt.NDArray[Any]]) -> OrtValues:
    """Views of the arrays, which they keep alive."""
    return {name: _ort_value(array) for name, array in arrays.items()}


def _ort_value(array: npt.NDArray[Any]) -> ort.OrtValue:
    """A view of the array; ONNX Runtime takes ml_dtypes' bfloat16 as bits and a type."""
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)
