"""Runs the graph of compiled operators by ONNX Runtime alone, with one thing wrong: raw_graph.py BUNDLE WHAT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import deepseek_trt  # noqa: F401
from deepseek_trt.engines.sessions.loading import load_weights
from deepseek_trt.engines.sessions.ort import LEAN, open_graph, ort_values
from deepseek_trt.engines.sessions.prepared import fused_graph
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.plugins.cpu.library import cpu_library

INPUTS = {
    "page_table": {"page_table": np.int32([[99, 2], [3, 4]])},
    "negative": {"page_table": np.int32([[-7, 2], [3, 4]])},
    "past_lengths": {"past_lengths": np.int32([9999, 0])},
    "negative length": {"past_lengths": np.int32([-1, 0])},
    "rows": {"page_table": np.int32([[1, 2]])},
    "lengths": {"past_lengths": np.int32([0])},
    "new tokens": {"sequence_lengths": np.int32([1, 4])},
    "new tokens beyond the table": {"past_lengths": np.int32([14, 0]), "sequence_lengths": np.int32([3, 1])},
    "negative new tokens": {"sequence_lengths": np.int32([-1, 1])},
    "nothing": {},
}


def main(path: str, what: str) -> None:
    bundle = Bundle.open(Path(path))
    made, _ = fused_graph(bundle, "decode")
    data = made if isinstance(made, bytes) else made.read_bytes()
    if what.startswith("attribute "):
        data = with_attribute(data, what.removeprefix("attribute "))
    weights = ort_values(load_weights(bundle, False))
    session = open_graph(bundle, "decode", 1, model=data, shared=weights, library=cpu_library(bundle).path, memory=LEAN)
    cache = bundle.manifest.cache
    feeds: dict[str, Any] = {
        "input_ids": np.full((2, 3), 7, np.int64),
        "sequence_lengths": np.int32([3, 1]),
        "past_lengths": np.int32([0, 0]),
        "page_table": np.int32([[1, 2], [3, 4]]),
        **INPUTS.get(what, {}),
    }
    pools = [i.name for i in session.get_inputs() if i.name.startswith("past_key_values")]
    shape = (12, cache.page_size, cache.latent_dim)
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[session.get_inputs()[-1].type]
    try:
        session.run(["logits"], feeds | {name: np.zeros(shape, dtype) for name in pools})
        print("it ran")
    except Exception as error:
        print(f"refused: {error}")


def with_attribute(data: bytes, name: str) -> bytes:
    model = onnx.load_model_from_string(data)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == name and node.op_type == "FeedForward":
                attribute.i = 10**6
    return model.SerializeToString()


if __name__ == "__main__":
    ort.set_default_logger_severity(4)
    main(*sys.argv[1:])
