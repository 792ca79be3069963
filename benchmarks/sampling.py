"""The share of a step of the shipped model that sampling takes, at batch 32: python benchmarks/sampling.py

Every mode is timed beside the decode step whose logits it samples, and all modes in turn, so that all see the same
machine. The best time of each counts: others may use the machine, too. At the end, what guides add to the shipped one.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from sampling_guides import guides_table

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.sampling import Sampler, sample_rows
from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.plugins.cpu.sampler import NativeSampler, load_sampler

BATCH, CONTEXT, WARM = 32, 128, 9
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2}
MODES: dict[str, dict[str, Any]] = {
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
    parser.add_argument("--rounds", type=int, default=100, help="of each mode, beside 9 that warm up")
    parser.add_argument("--library", type=Path, help="a compiled sampler other than the session's")
    parser.add_argument("--numpy", action="store_true", help="time numpy's sampler too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(options.bundle) if options.bundle else shipped_bundle(Path(folder))
        for threads in options.threads:
            _table(bundle, threads, options)
        if not options.library and not options.bundle:
            print(f"\n{guides_table(bundle)}")


def shipped_bundle(folder: Path) -> Bundle:
    """The model that ships, exported into `folder`."""
    checkpoint = Path(str(files("deepseek_trt.cli") / "demo_model"))
    return export_bundle(ExportRequest(checkpoint, folder / "bundle")).bundle


def _table(bundle: Bundle, threads: int, options: argparse.Namespace) -> None:
    decode = Decode(bundle, threads)
    library = options.library or decode.session.library
    names = (["compiled"] if library else []) + (["numpy"] if options.numpy or not library else [])
    loads = [partial(load_sampler, library, threads) if name == "compiled" else lambda: None for name in names]
    total = WARM + options.rounds
    modes = [_Mode(decode, fields, [load() for load in loads], total) for fields in MODES.values()]
    for _ in range(total):
        for mode in modes:
            mode.step()
    step = min(mode.best(0) for mode in modes)  # the same step in every mode
    print(f"\n{threads} threads, batch {BATCH}, context {CONTEXT}; best of {options.rounds}; ", end="")
    print(f"a step: {1e3 * step:.2f} ms\n")
    print("| sampling | " + " | ".join(f"{name}, us | share of the step" for name in names) + " |")
    print("|---|" + "---|---|" * len(names))
    for name, mode in zip(MODES, modes, strict=True):
        own = [mode.best(column) for column in range(1, 1 + len(names))]
        cells = " | ".join(f"{1e6 * seconds:.0f} | {100 * seconds / step:.1f} %" for seconds in own)
        print(f"| {name} | {cells} |")


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
        return self.session.decode(self.ids, np.ones(BATCH, dtype=np.int32), self.past, self.table)[:, 0]


class _Mode:
    """The seconds of a step, and of each sampler on its logits; its batch stays the same."""

    def __init__(self, decode: Decode, fields: dict[str, Any], natives: list[NativeSampler | None], steps: int) -> None:
        params = SamplingParams(steps, **{"temperature": 0.8, **fields})
        each = [(dataclasses.replace(params, seed=i), prompt.tolist()) for i, prompt in enumerate(decode.prompts)]
        self._rows = [[Sampler(own, prompt) for own, prompt in each] for _ in natives]
        self._decode, self._natives = decode, natives
        self._times: list[list[float]] = [[] for _ in range(len(natives) + 1)]

    def step(self) -> None:
        start = time.perf_counter()
        logits = self._decode.step()
        self._times[0].append(time.perf_counter() - start)
        for own, native, column in zip(self._rows, self._natives, self._times[1:], strict=True):
            start = time.perf_counter()
            choices = sample_rows(own, logits, native)
            column.append(time.perf_counter() - start)
        self._decode.ids[:, 0] = [token for token, *_ in choices]

    def best(self, column: int) -> float:
        return min(self._times[column][WARM:])


if __name__ == "__main__":
    main()
