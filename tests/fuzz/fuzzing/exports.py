"""Whole exports of a checkpoint whose weights' bytes are changed: the bundle holds what the library reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from fuzzing import good
from fuzzing.mutate import mutated_bytes
from fuzzing.runner import DisagreementError


class Exports:
    """The graphs are traced once, before processes are forked: weights do not change them."""

    name, patience = "export", 60.0

    def prepare(self, folder: Path) -> None:
        from deepseek_trt.export.exporter import ExportRequest, export_bundle

        torch.set_num_threads(1)
        trace_once()
        self.good = {"config.json": good.dumped(good.CONFIG), **good.sharded(good.tensors_of(good.CONFIG), 2)}
        (folder / "in").mkdir()
        good.write(folder / "in", self.good)
        export_bundle(ExportRequest(folder / "in", folder / "out"))

    def change(self, rng: Random, folder: Path) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        name = rng.choice([name for name in self.good if name.endswith(".safetensors")])
        data, start = self.good[name], 8 + int.from_bytes(self.good[name][:8], "little")
        if rng.random() < 0.8:
            body = bytearray(data[start:])
            for _ in range(rng.choice((1, 4, 100))):
                body[rng.randrange(len(body))] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
            if rng.random() < 0.2:
                at = rng.randrange(len(body))
                body[at : at + 256] = bytes(len(body[at : at + 256]))
            data = data[:start] + bytes(body)
        else:
            data = mutated_bytes(rng, data)
        good.write(folder / "in", {**self.good, name: data})

    def read(self, folder: Path) -> Any:
        from deepseek_trt.export.exporter import ExportRequest, export_bundle

        return export_bundle(ExportRequest(folder / "in", folder / "out")).bundle

    def judge(self, folder: Path, found: Any) -> None:
        stored: dict[str, torch.Tensor] = {}
        for file in sorted((folder / "in").glob("*.safetensors")):
            stored |= safetensors.torch.load(file.read_bytes())
        written = safetensors.torch.load((folder / "out" / "weights.safetensors").read_bytes())
        theirs = np.sort(np.concatenate([t.numpy().ravel() for t in stored.values()]))
        ours = np.sort(np.concatenate([t.numpy().ravel() for t in written.values()]))
        if not np.array_equal(theirs, ours) or not np.isfinite(ours).all():
            raise DisagreementError("the bundle's weights are not the checkpoint's numbers")
        for name in stored.keys() & written.keys():
            if not torch.equal(stored[name], written[name]):
                raise DisagreementError(f"{name} is another one in the bundle")


def trace_once() -> None:
    """Exports of one config share their graphs."""
    from deepseek_trt.export import trace as tracing

    real, traced = tracing.trace, {}

    def trace(*args: Any) -> Any:
        key = repr(args)
        if key not in traced:
            traced[key] = real(*args)
        return traced[key].clone()

    if real.__module__.startswith("deepseek_trt"):
        tracing.trace = trace
