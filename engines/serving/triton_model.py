"""TritonPythonModel: the service inside tritonserver's Python backend, which gives triton_python_backend_utils."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from deepseek_trt.engines.serving.metrics import Metrics
from deepseek_trt.engines.serving.opening import open_llm
from deepseek_trt.engines.serving.service import Service
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.serving.stream import Failure, Response
from deepseek_trt.engines.serving.sync_model import CODE_IN_TEXT
from deepseek_trt.engines.serving.triton_board import MetricBoard
from deepseek_trt.export.text.valid import printable

# By name: pb_utils has its classes only when this file has been imported.
_CODES = {
    "invalid": "INVALID_ARG",
    "refused": "UNAVAILABLE",
    "cancelled": "CANCELLED",
    "timeout": "CANCELLED",
    "failed": "INTERNAL",
}


class TritonPythonModel:
    """What the Python backend calls: initialize once, execute for each batch of requests, finalize once."""

    def initialize(self, args: dict[str, str]) -> None:
        _log_to_server()
        config = json.loads(args["model_config"])
        name, version = args["model_name"], args["model_version"]
        settings = ServingSettings.from_parameters(
            {key: value["string_value"] for key, value in config["parameters"].items()}
        )
        llm = open_llm(Path(args["model_repository"]) / version / "bundle", settings)
        metrics, host = Metrics(MetricBoard({"model": name, "version": version})), ServerHost(name)
        self._service = Service(llm, settings.max_inflight, settings.drain_ms / 1000, metrics, host)
        note = f" ({llm.session.note})" if llm.session.note else ""
        pb_utils.Logger.log_info(f"{name}: {llm.session.backend}{note}, as {llm.choice.why}; {settings}")
        for line in llm.defaults.lines:
            pb_utils.Logger.log_info(f"{name}: {line}")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            channel = ResponseChannel(request, marks_codes=CODE_IN_TEXT in request.parameters())
            try:  # copies: the request's memory is not ours for longer than this call
                tensors = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
                parameters = json.loads(request.parameters() or "{}")
            except Exception as error:  # of this request alone
                self._service.refuse(channel, Failure("invalid", f"the request cannot be read ({error})"))
            else:
                self._service.accept(channel, tensors, parameters, request.timeout())

    def finalize(self) -> None:
        """Free what holds shared memory before the process ends, or tritonserver 2.51 crashes then."""
        self._service.close()
        del self._service
        gc.collect()


class ResponseChannel:
    """A Channel over the request's response sender; with `marks_codes` an error's text begins with its code."""

    def __init__(self, request: Any, marks_codes: bool = False) -> None:
        self._sender, self._marks_codes = request.get_response_sender(), marks_codes
        self._wanted = frozenset(request.requested_output_names())

    def send(self, response: Response | Failure | None, final: bool) -> None:
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        if response is None:
            self._sender.send(flags=flags)
        elif isinstance(response, Failure):
            name, text = _CODES[response.kind], printable(response.message)
            text = f"{name}: {text}" if self._marks_codes else text
            error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, name))
            self._sender.send(pb_utils.InferenceResponse(error=error), flags=flags)
        else:
            wanted = self._wanted - response.unwanted
            tensors = [pb_utils.Tensor(*pair) for pair in _arrays(response).items() if pair[0] in wanted]
            self._sender.send(pb_utils.InferenceResponse(tensors), flags=flags)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class ServerHost:
    """A Host that asks tritonserver, which must be up: it crashes when asked before."""

    def __init__(self, name: str) -> None:
        self._name = name

    def wants_model(self) -> bool:
        return bool(pb_utils.is_model_ready(self._name))

    def engine_failed(self, reason: str) -> None:
        """Unload the model: the server then says that it is not ready, until somebody loads it again."""
        pb_utils.unload_model(self._name)

    def flush(self) -> None:
        """Senders have sent."""


def _arrays(response: Response) -> dict[str, Any]:
    """Outputs by name, each with the batch in front."""
    arrays = {
        "text_output": np.array([[response.text.encode()]], dtype=np.object_),
        "finish_reason": np.array([[response.finish_reason.encode()]], dtype=np.object_),
        "num_input_tokens": np.array([[response.num_input_tokens]], dtype=np.int32),
        "num_output_tokens": np.array([[response.num_output_tokens]], dtype=np.int32),
    }
    if response.logprobs is not None:
        arrays["output_log_probs"] = np.array([response.logprobs], dtype=np.float32)
        arrays["cum_log_probs"] = np.array([[response.cum_logprob]], dtype=np.float32)
        arrays["cumulative_logprob"] = arrays["cum_log_probs"]
    return arrays


def _log_to_server() -> None:
    """Python's log, from INFO on, goes into the server's."""
    logger = logging.getLogger("deepseek_trt")
    if not logger.handlers:
        logger.addHandler(_ServerLog())
        logger.setLevel(logging.INFO)


class _ServerLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warn" if record.levelno >= logging.WARNING else "info"
        getattr(pb_utils.Logger, f"log_{level}")(self.format(record))
