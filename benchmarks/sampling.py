"""The share of a step of the shipped model that sampling takes, at batch 32: python benchmarks/sampling.py [--markdown]

Every mode is timed beside the decode step whose logits it samples, in turn, so that both see the same machine. The best
time of each counts: others may use the machine, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np

from deepseek_trt.engines.ort import OrtSession
from deepseek_trt.engines.sampling import Sampler, SamplingParams, sample_rows
from deepseek_trt.engines.sampling_native import NativeSampler, load_sampler
from deepseek_trt.export.bundle import Bundle
from deepseek_trt.export.exporter import ExportRequest, export_checkpoint

BATCH, CONTEXT, ROUNDS = 32, 128, 100
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2}
MODES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "penalties": PENALTIES,
    "logprobs 5": {"logprobs": 5},
    "greedy, penalties, logprobs 5": {"temperature": 0.0, "logprobs": 5, **PENALTIES},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "top-k 50, top-p 0.9, penalties": {"top_k": 50, "top_p": 0.9, **PENALTIES},
    "top-p 0.9, min-p 0.05, logprobs 5": {"top_p": 0.9, "min_p": 0.05, "logprobs": 5},
    "all of it": {"top_k": 50, "top_p": 0.9, "min_p": 0.05, "logprobs": 5, **PENALTIES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="default: the shipped model, exported to a temporary folder")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--library", type=Path, help="a compiled sampler other than the session's")
    parser.add_argument("--numpy", action="store_true", help="time numpy's sampler too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(options.bundle) if options.bundle else _shipped(Path(folder))
        for threads in options.threads:
            _table(bundle, threads, options)


def _shipped(folder: Path) -> Bundle:
    checkpoint = Path(str(files("deepseek_trt.cli") / "demo_model"))
    return export_checkpoint(ExportRequest(checkpoint, folder / "bundle")).bundle


def _table(bundle: Bundle, threads: int, options: argparse.Namespace) -> None:
    decode = Decode(bundle, threads)
    library = options.library or getattr(decode.session, "library", None)
    native = load_sampler(library, threads) if library else None
    samplers: dict[str, NativeSampler | None] = {"compiled": native} if native else {}
    if options.numpy or not native:
        samplers["numpy"] = None
    times = {mode: _time(decode, fields, list(samplers.values())) for mode, fields in MODES.items()}
    step = min(first for first, *_ in times.values())  # the same step in every mode
    print(f"\n{threads} threads, batch {BATCH}, context {CONTEXT}; best of {ROUNDS}; a step: {1e3 * step:.2f} ms\n")
    print("| sampling | " + " | ".join(f"{name}, us | share of the step" for name in samplers) + " |")
    print("|---|" + "---|---|" * len(samplers))
    for mode, (_, *own) in times.items():
        cells = " | ".join(f"{1e6 * seconds:.0f} | {100 * seconds / step:.1f} %" for seconds in own)
        print(f"| {mode} | {cells} |")


class Decode:
    """One decode step over and over, at the same lengths."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        cache = bundle.manifest.cache
        width = cache.pages_for(CONTEXT + 1)
        self.session = OrtSession(bundle, 1 + BATCH * width, threads)
        rng = np.random.default_rng(0)
        self.prompts = rng.integers(2, bundle.manifest.model.vocab_size, (BATCH, CONTEXT))
        self.table = np.arange(1, 1 + BATCH * width, dtype=np.int32).reshape(BATCH, width)
        self.past = np.full(BATCH, CONTEXT, dtype=np.int32)
        self.session.prefill(self.prompts, self.past, np.zeros(BATCH, dtype=np.int32), self.table)
        self.ids = self.prompts[:, -1:].copy()

    def step(self) -> np.ndarray:
        return self.session.decode(self.ids, self.past, self.table)


def _time(decode: Decode, fields: dict[str, float], natives: list[NativeSampler | None]) -> list[float]:
    """Seconds of the step, and of each sampler on its logits, at best."""
    params = SamplingParams(ROUNDS + 9, **{"temperature": 0.8, **fields})  # type: ignore[arg-type]
    each = [(dataclasses.replace(params, seed=i), prompt.tolist()) for i, prompt in enumerate(decode.prompts)]
    rows = [[Sampler(own, prompt) for own, prompt in each] for _ in natives]
    times: list[list[float]] = [[] for _ in range(len(natives) + 1)]
    for _ in range(ROUNDS + 9):
        start = time.perf_counter()
        logits = decode.step()
        times[0].append(time.perf_counter() - start)
        for own, native, column in zip(rows, natives, times[1:], strict=True):
            start = time.perf_counter()
            choices = sample_rows(own, logits, native)
            column.append(time.perf_counter() - start)
        decode.ids[:, 0] = [choice.token for choice in choices]
    return [min(column[9:]) for column in times]


if __name__ == "__main__":
    main()
