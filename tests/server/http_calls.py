"""Requests through tritonclient.http, run by the server's Python: as JSON in a file, answers as JSON on stdout.

In: {"url", "model", "requests": [{input: [dtype, value]}]}. Out: a {output: value} or {"error": text} for each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as http
from tritonclient.utils import InferenceServerException, triton_to_np_dtype


def tensor(name: str, dtype: str, value: Any) -> http.InferInput:
    data = np.array([[value.encode() if isinstance(value, str) else value]], triton_to_np_dtype(dtype))
    made = http.InferInput(name, [1, 1], dtype)
    made.set_data_from_numpy(data)
    return made


def answer(client: http.InferenceServerClient, model: str, inputs: dict[str, Any]) -> dict[str, Any]:
    try:
        result = client.infer(model, [tensor(name, *given) for name, given in inputs.items()])
    except InferenceServerException as error:
        return {"error": error.message()}
    values = {each["name"]: result.as_numpy(each["name"]).reshape(-1)[0] for each in result.get_response()["outputs"]}
    return {k: v.decode() if isinstance(v, bytes) else v.item() for k, v in values.items()}


if __name__ == "__main__":
    if sys.argv[1:] == ["--help"]:  # it can be imported
        sys.exit(__doc__ is None)
    job = json.loads(Path(sys.argv[1]).read_text())
    client = http.InferenceServerClient(job["url"])
    facts = {"ready": client.is_model_ready(job["model"]), "name": client.get_model_metadata(job["model"])["name"]}
    print(json.dumps([facts, *(answer(client, job["model"], inputs) for inputs in job["requests"])]))
