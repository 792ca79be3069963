"""Greedy generation with a bundle of `deepseek-trt export --io transformers`, by onnxruntime and numpy alone.

    python examples/onnxruntime_generate.py BUNDLE 24 0,17,4 0,9

prints 24 new tokens for each prompt of token ids; shorter prompts are padded on the left.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported

import numpy as np
import onnxruntime as ort

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def generate(folder: str, prompts: list[list[int]], steps: int) -> np.ndarray:
    """New tokens [B, steps]."""
    session = ort.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    longest = max(map(len, prompts))
    input_ids = np.array([[0] * (longest - len(p)) + p for p in prompts], dtype=np.int64)
    mask = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=np.int64)
    past = {
        i.name: np.zeros((len(prompts), 1, 0, i.shape[3]), dtype=DTYPES[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    names = [output.name for output in session.get_outputs()]
    tokens = []
    for _ in range(steps):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -input_ids.shape[1] :]
        feeds = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, **past}
        out = dict(zip(names, session.run(names, feeds), strict=True))
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        input_ids = out["logits"][:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(input_ids)], axis=1)
        tokens.append(input_ids)
    return np.concatenate(tokens, axis=1)


if __name__ == "__main__":
    bundle, count, *rows = sys.argv[1:]
    for answer in generate(bundle, [[int(token) for token in row.split(",")] for row in rows], int(count)):
        print(",".join(map(str, answer)))
