"""OrtCudaSession: the bundle through ONNX Runtime's CUDA provider, the page pools in the GPU's memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from deepseek_trt.engines.sessions.ort import _prepared, _supply_references, _widened_bytes, widened_path
from deepseek_trt.export.arrays import Floats, Int32s, Int64s, numpy_dtype
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import past_name, present_name
from deepseek_trt.export.errors import BackendError
from deepseek_trt.plugins.cpu.library import cpu_library

LIBRARIES = "install the CUDA and cuDNN that this ONNX Runtime names in its documentation, or use --backend tensorrt"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where tensors lie and which provider computes; tests run the same code on the CPU."""

    provider: str = "CUDAExecutionProvider"
    device: str = "cuda"
    ordinal: int = 0


class OrtCudaSession:
    """Both graphs over one set of page pools in device memory; each pool is bound as past and present at once.

    Nodes that the CUDA provider lacks run on the CPU, as ONNX Runtime decides.
    """

    backend = "ort"

    def __init__(self, bundle: Bundle, pages: int, threads: int = 0, place: Place = Place()) -> None:
        """BackendError where the provider does not start. bfloat16 bundles are computed in float32."""
        widened = bundle.manifest.dtype == "bfloat16"
        words = "bfloat16 weights, computed in float32, " if widened else ""
        self.note = f"{words}ONNX Runtime's {place.provider}"
        self.cache = dataclasses.replace(bundle.manifest.cache, dtype="float32") if widened else bundle.manifest.cache
        self.pages = pages
        self.library = cpu_library(bundle.path).path  # samples on the CPU
        self._place = place
        self._sessions = {name: _load(bundle, name, threads, place) for name in ("prefill", "decode")}
        shape = (pages, self.cache.page_size, self.cache.latent_dim)
        dtype = numpy_dtype(self.cache.dtype)
        self._pools = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), place.device, place.ordinal)
            for _ in range(self.cache.layers)
        ]

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
        """A copy of the layer's pool."""
        pool: npt.NDArray[Any] = self._pools[layer].numpy()
        return pool

    def _run(self, graph: str, **feeds: npt.NDArray[Any]) -> Floats:
        session = self._sessions[graph]
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", self._place.device, self._place.ordinal)
        for layer, pool in enumerate(self._pools):
            binding.bind_ortvalue_input(past_name(layer), pool)
            binding.bind_ortvalue_output(present_name(layer), pool)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        logits: Floats = binding.get_outputs()[0].numpy()
        return logits


def _load(bundle: Bundle, graph: str, threads: int, place: Place) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # a provider that does not start is reported by the error below
    kept = _supply_references(options, bundle) if bundle.manifest.by_reference else None
    path = bundle.graph_path(graph)
    source: str | bytes = str(path)
    if bundle.manifest.dtype == "bfloat16":
        source = _prepared(widened_path(bundle, graph)) or _widened_bytes(path)
    if isinstance(source, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    providers = [(place.provider, {"device_id": str(place.ordinal)} if place.device == "cuda" else {})]
    try:
        session = ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
        raise BackendError(f"ONNX Runtime cannot load {path} with {place.provider} ({error}): {LIBRARIES}") from None
    del kept
    if session.get_providers()[0] != place.provider:
        raise BackendError(f"ONNX Runtime's {place.provider} does not start on this machine: {LIBRARIES}")
    return session
