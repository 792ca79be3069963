"""OrtSession: the bundle through ONNX Runtime, custom ops through their function bodies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from deepseek_trt.engines.session import Floats, Int32s, Int64s
from deepseek_trt.engines.weights import reference_arrays
from deepseek_trt.export.bundle import Bundle
from deepseek_trt.export.errors import BackendError
from deepseek_trt.export.graph import past_name, present_name
from deepseek_trt.export.weight_file import NUMPY_DTYPES

_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; a served runtime has no onnx package


class OrtSession:
    """Both graphs over one set of page pools; each pool is bound as past and present at once."""

    backend = "ort"

    def __init__(self, bundle: Bundle, pages: int, threads: int = 0) -> None:
        """`threads` 0 lets ONNX Runtime choose. bfloat16 bundles are computed in float32."""
        widened = bundle.manifest.dtype == "bfloat16"
        self.note = "bfloat16 weights, computed in float32 (ONNX Runtime's CPU provider)" if widened else ""
        self.cache = dataclasses.replace(bundle.manifest.cache, dtype="float32") if widened else bundle.manifest.cache
        self.pages = pages
        self.vocab_size = bundle.manifest.model.vocab_size
        self._sessions = {name: _load(bundle, name, threads, widened) for name in ("prefill", "decode")}
        shape = (pages, self.cache.page_size, self.cache.latent_dim)
        self._arrays = [np.zeros(shape, dtype=NUMPY_DTYPES[self.cache.dtype]) for _ in range(self.cache.layers)]
        self._pools = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._arrays]

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

    def _run(self, graph: str, **feeds: npt.NDArray[Any]) -> Floats:
        session = self._sessions[graph]
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cpu")
        for layer, pool in enumerate(self._pools):
            binding.bind_ortvalue_input(past_name(layer), pool)
            binding.bind_ortvalue_output(present_name(layer), pool)
        session.run_with_iobinding(binding)
        logits: Floats = binding.get_outputs()[0].numpy()
        return logits


def _load(bundle: Bundle, graph: str, threads: int, widened: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    path = bundle.graph_path(graph)
    kept = _supply_references(options, bundle) if bundle.manifest.by_reference else None
    source: str | bytes = str(path)
    if widened and widened_path(bundle, graph).is_file():
        source = str(widened_path(bundle, graph))
    elif widened:
        source = _widened_bytes(path)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    try:
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
        raise BackendError(f"ONNX Runtime cannot load {path} ({error}): export the checkpoint again") from None
    del kept
    return session


def widened_path(bundle: Bundle, graph: str) -> Path:
    """Where a bundle that is to be loaded without the onnx package keeps the graph that computes in float32."""
    return bundle.path / f"{graph}.float32.onnx"


def _widened_bytes(path: Path) -> bytes:
    from deepseek_trt.engines.widen import widened_bytes  # needs onnx

    return widened_bytes(path)


def _supply_references(options: ort.SessionOptions, bundle: Bundle) -> list[Any]:
    """Hand the checkpoint's tensors to ONNX Runtime; returns what must live until the session is made."""
    arrays = reference_arrays(bundle)
    values = [_ort_value(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    return [arrays, values]


def _ort_value(array: npt.NDArray[Any]) -> ort.OrtValue:
    """A view of the array; ONNX Runtime takes ml_dtypes' bfloat16 as bits and a type."""
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)
