"""Calls every control method of tritonclient.grpc without the key, and one with it; run by the server's Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tritonclient.grpc as grpc

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("code ran")
class TritonPythonModel:
    def execute(self, requests):
        return []
"""


def refusals(client: grpc.InferenceServerClient, mark: str) -> dict[str, str]:
    config = json.dumps({"name": "evil", "backend": "python", "max_batch_size": 0, "input": [], "output": []})
    code = {"file:1/model.py": CODE.format(mark=mark).encode()}
    calls = {
        "load": lambda: client.load_model("evil", config=config, files=code),
        "load again": lambda: client.load_model("deepseek_v2"),
        "unload": lambda: client.unload_model("deepseek_v2"),
        "index": client.get_model_repository_index,
        "log": lambda: client.update_log_settings({"log_file": mark}),
        "log settings": client.get_log_settings,
        "trace": lambda: client.update_trace_settings(settings={"trace_file": mark, "trace_level": ["TIMESTAMPS"]}),
        "trace settings": client.get_trace_settings,
        "memory": lambda: client.register_system_shared_memory("a", "/a", 64),
        "memory status": client.get_system_shared_memory_status,
        "unmemory": client.unregister_system_shared_memory,
        "cuda": lambda: client.register_cuda_shared_memory("a", b"AA==", 0, 64),
        "cuda status": client.get_cuda_shared_memory_status,
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "it was answered"
        except Exception as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    client = grpc.InferenceServerClient(job["url"])
    refused = refusals(client, job["mark"])
    key = {"triton-grpc-protocol-deepseek-trt-control": job["deepseek-trt-control"]}
    index = client.get_model_repository_index(headers=key)
    print(json.dumps({"refused": refused, "with the key": sorted(model.name for model in index.models)}))
