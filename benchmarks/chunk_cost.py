"""Whether chunks of a prompt take the time that the scheduler counts for them: python benchmarks/chunk_cost.py

Processor time of one thread for chunks at several places of a prompt, over that of the first chunk, beside the ratio of
their costs (engines/generation/chunking/cost.py). All chunks by turns; the best time of each counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from sampling import shipped_bundle

from deepseek_trt.engines.generation.chunking.cost import PrefillCost
from deepseek_trt.engines.generation.pages import page_table
from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.export.bundle.folder import Bundle

FIRST = 512
Chunk = tuple[int, int]  # new tokens, cached ones


def chunks_of(length: int) -> list[Chunk]:
    """Whole chunks all along, and shorter ones at both ends."""
    end = length - FIRST
    return [*((FIRST, past) for past in range(0, length, FIRST)), (128, 0), (64, 0), (128, end), (64, end)]


class Prompt:
    """One prompt of random tokens, all of it cached, whose chunks are computed again and again."""

    def __init__(self, bundle: Bundle, length: int) -> None:
        self._page = bundle.manifest.cache.page_size
        pages = bundle.manifest.cache.pages_for(length)
        self._session = OrtSession(bundle, pages + 1, threads=1)
        self._ids = np.random.default_rng(0).integers(2, bundle.manifest.model.vocab_size, (1, length))
        self._table = page_table([range(1, pages + 1)])
        for past in range(0, length, FIRST):
            self.seconds((FIRST, past))

    def seconds(self, chunk: Chunk) -> float:
        """Processor time that the chunk takes, all that comes before it cached."""
        new, past = chunk
        ids, table = self._ids[:, past : past + new], self._table[:, : -(-(past + new) // self._page)]
        start = time.process_time()
        self._session.prefill(ids, np.array([new], np.int32), np.array([past], np.int32), table)
        return time.process_time() - start


def table(times: dict[Chunk, float], cost: PrefillCost) -> str:
    lines = ["| new tokens | after | ms | over the first | cost over the first's |", "|---" * 5 + "|"]
    for (new, past), seconds in times.items():
        ratios = seconds / times[FIRST, 0], cost.of(new, past) / cost.of(FIRST, 0)
        lines.append(f"| {new} | {past:,} | {1e3 * seconds:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the model that ships, exported to a temporary folder")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the prompt, whole chunks of 512")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if given.length < FIRST or given.length % FIRST:
        parser.error(f"--length {given.length}: give a multiple of {FIRST}")
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(given.bundle) if given.bundle else shipped_bundle(Path(folder))
        prompt, chunks = Prompt(bundle, given.length), chunks_of(given.length)
        rounds = [[prompt.seconds(chunk) for chunk in chunks] for _ in range(given.rounds)]
    best = dict(zip(chunks, map(min, zip(*rounds, strict=True)), strict=True))
    print(table(best, PrefillCost.of_model(bundle.manifest.model)))


if __name__ == "__main__":
    main()
