"""Greedy generation with the two graphs of a bundle of `deepseek-trt export`, by onnxruntime and numpy alone.

    python examples/onnxruntime_paged.py BUNDLE 24 0,17,4 0,9

prints 24 new tokens for each prompt of token ids. Row b's page p is page 1 + b * M + p of the pool; page 0 is scratch.
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
    graphs = {
        name: ort.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("prefill", "decode")
    }
    pools = [i for i in graphs["decode"].get_inputs() if i.name.startswith("past_key_values.")]
    page_size = pools[0].shape[1]
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    pages = -(-(int(lengths.max()) + steps) // page_size)  # of each row
    table = 1 + np.arange(len(prompts) * pages, dtype=np.int32).reshape(len(prompts), pages)
    cache = {i.name: np.zeros((1 + table.size, *i.shape[1:]), dtype=DTYPES[i.type]) for i in pools}

    def run(graph: str, **feeds: np.ndarray) -> np.ndarray:
        """The next tokens [B]; the cache takes in what was computed."""
        names = [output.name for output in graphs[graph].get_outputs()]
        out = dict(zip(names, graphs[graph].run(names, {**feeds, "page_table": table, **cache}), strict=True))
        for name in cache:
            cache[name] = out[name.replace("past_key_values", "present")]
        return out["logits"].argmax(-1).reshape(-1)  # of decode they are [B, 1, vocab]

    ids = np.zeros((len(prompts), int(lengths.max())), dtype=np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    past = np.zeros_like(lengths)
    tokens = [run("prefill", input_ids=ids, sequence_lengths=lengths, past_lengths=past)]
    for step in range(steps - 1):
        past = lengths + np.int32(step)
        one = np.ones_like(lengths)
        tokens.append(run("decode", input_ids=tokens[-1][:, None], sequence_lengths=one, past_lengths=past))
    return np.stack(tokens, axis=1)


if __name__ == "__main__":
    bundle, count, *rows = sys.argv[1:]
    for answer in generate(bundle, [[int(token) for token in row.split(",")] for row in rows], int(count)):
        print(",".join(map(str, answer)))
