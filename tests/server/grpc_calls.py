"""gRPC streams through tritonclient, run by the server's Python: requests as JSON on stdin, answers as JSON on stdout.

In: {"url", "model", "requests": [{input: value}], "cancel_after": n or null}. All requests run at once, each on a
connection of its own. Out: one list a request, of {output: value, "final": bool} or {"error": text} in order.
With cancel_after a request is cancelled after that many responses; its list ends with {"left": time.monotonic()}.
A value is a str, a bool, an int or a float, {"bytes": hex}, or {"dtype": name, "value": ...} for another type, or a
list of str. The name "parameters" is for the request's own ones. With "unary" the requests are no streams.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np
import tritonclient.grpc as sync
import tritonclient.grpc.aio as grpc

DTYPES: dict[str, tuple[str, type]] = {
    "max_tokens": ("INT32", np.int32),
    "min_tokens": ("INT32", np.int32),
    "top_k": ("INT32", np.int32),
    "timeout_ms": ("INT32", np.int32),
    "end_id": ("INT32", np.int32),
    "beam_width": ("INT32", np.int32),
    "sampling_param_max_tokens": ("INT32", np.int32),
    "seed": ("UINT64", np.uint64),
}
NAMED = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BOOL": np.bool_, "UINT64": np.uint64}


def tensor(name: str, value: Any) -> sync.InferInput:
    """The value as a [1, 1] tensor, in the type that the model's config gives it."""
    if isinstance(value, dict) and "dtype" in value:
        dtype, array = value["dtype"], np.array([value["value"]], NAMED[value["dtype"]])
    elif isinstance(value, bool):
        dtype, array = "BOOL", np.array([value])
    elif isinstance(value, list):
        dtype, array = "BYTES", np.array([text.encode() for text in value], np.object_)
    elif isinstance(value, (str, dict)):
        data = value.encode() if isinstance(value, str) else bytes.fromhex(value["bytes"])
        dtype, array = "BYTES", np.array([data], np.object_)
    else:
        dtype, numpy_type = DTYPES.get(name, ("FP32", np.float32))
        array = np.array([value], numpy_type)
    made = sync.InferInput(name, [1, array.size], dtype)
    made.set_data_from_numpy(array.reshape(made.shape()))
    return made


def plain(result: sync.InferResult, streamed: bool = True) -> dict[str, Any]:
    response = result.get_response()
    values = {output.name: result.as_numpy(output.name).reshape(-1).tolist() for output in response.outputs}
    flat = {name: value[0] if len(value) == 1 else value for name, value in values.items()}
    text = {name: value.decode() if isinstance(value, bytes) else value for name, value in flat.items()}
    return {**text, "final": response.parameters["triton_final_response"].bool_param} if streamed else text


async def unary(job: dict[str, Any], inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """One request's only answer, by the call that decoupled models refuse."""
    parameters = inputs.pop("parameters", None)
    tensors = [tensor(name, value) for name, value in inputs.items()]
    async with grpc.InferenceServerClient(job["url"]) as client:
        try:
            asked = {"parameters": parameters, "timeout": job.get("timeout")}
            return [plain(await client.infer(job["model"], tensors, **asked), streamed=False)]
        except sync.InferenceServerException as error:
            return [{"error": error.message()}]


async def call(job: dict[str, Any], inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """One request's answers, up to its final one or its error."""

    async def requests() -> Any:
        parameters = inputs.pop("parameters", None)
        tensors = [tensor(name, value) for name, value in inputs.items()]
        asked = {"model_name": job["model"], "inputs": tensors, "parameters": parameters}
        yield {**asked, "enable_empty_final_response": True}

    answers: list[dict[str, Any]] = []
    async with grpc.InferenceServerClient(job["url"]) as client:
        stream = client.stream_infer(requests())
        async for result, error in stream:
            answers.append({"error": error.message()} if error else plain(result))
            if len(answers) == job.get("cancel_after"):
                stream.cancel()
                answers.append({"left": time.monotonic()})
                break
    return answers


async def main(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return list(
        await asyncio.gather(*((unary if job.get("unary") else call)(job, inputs) for inputs in job["requests"]))
    )


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.load(sys.stdin)))))
