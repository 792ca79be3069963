"""Write the graph tensors into one safetensors file, in bounded memory, and go on where a killed run stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deepseek_trt.export.arrays import Array, numpy_dtype
from deepseek_trt.export.bundle.assemble import chunks
from deepseek_trt.export.bundle.recipes import Recipe
from deepseek_trt.export.dtypes import dtype_of
from deepseek_trt.export.files import stream_sha256
from deepseek_trt.export.numbers import Numbers, Tally
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.writing.narrow_file import write_narrow
from deepseek_trt.export.writing.written import Progress, WrittenTensor

JOURNAL_FILE = "weights.journal"  # one line for each finished tensor
_ALIGNMENT = 4096  # of the first tensor, so that the file can be mapped
_FLUSH_SECONDS = 0.5


def write_weights(
    recipes: tuple[Recipe, ...], tensors: Mapping[str, StoredTensor], dtype: str, path: Path, progress: Progress
) -> tuple[WrittenTensor, ...]:
    """Write all tensors, in the model's dtype `dtype`, holding a few chunks in memory at a time.

    A file that an earlier run of the same recipes left half done at `path` is continued: tensors that its journal calls
    finished are hashed, not written again. The journal stays, for whoever is killed later.
    """
    header, places = _layout(recipes, dtype)
    journal = path.with_name(JOURNAL_FILE)
    written = _finished(path, journal, header, recipes, places, progress)
    end = written[-1].offset + written[-1].nbytes if written else len(header)
    with (
        _open(path, header, end) as out,
        journal.open("w") as log,
        ThreadPoolExecutor(1) as hasher,
        _flushing(out.fileno()),
    ):
        log.writelines(_line(w) for w in written)
        at, done = len(written), tuple[WrittenTensor, ...]()
        while at < len(recipes):
            if recipes[at].is_scales:  # which come with the codes after them
                done = write_narrow(out, recipes[at + 1], places[at], places[at + 1], tensors, progress)
            else:
                digest, odd = _write_tensor(out, recipes[at], tensors, recipes[at].dtype(dtype), hasher, progress)
                done = (replace(places[at], sha256=digest, odd=odd),)
            out.flush()  # a journal must not be ahead of what it describes
            log.writelines(map(_line, done))
            log.flush()
            written += done
            at += len(done)
    return tuple(written)


@contextmanager
def _flushing(descriptor: int) -> Iterator[None]:
    """Keep the disk busy: send it what is written at once, not when the page cache is full; at the end, all of it."""
    done = threading.Event()

    def flush() -> None:
        while not done.wait(_FLUSH_SECONDS):
            os.fsync(descriptor)

    with ThreadPoolExecutor(1) as flusher:
        flushing = flusher.submit(flush)
        try:
            yield
        finally:
            done.set()
        flushing.result()
    os.fsync(descriptor)


def _write_tensor(
    out: BinaryIO,
    recipe: Recipe,
    tensors: Mapping[str, StoredTensor],
    dtype: str,
    hasher: ThreadPoolExecutor,
    progress: Progress,
) -> tuple[str, tuple[Numbers, ...]]:
    """sha256 and what is odd. A chunk is hashed by another thread while it is written and the next one is read."""
    digest, tally = hashlib.sha256(), Tally(recipe, tensors)
    hashing: Future[None] | None = None
    for chunk in chunks(recipe, tensors):
        converted = _convert(chunk, dtype)
        data = converted.view(np.uint8).data
        if hashing is not None:
            hashing.result()
        hashing = hasher.submit(digest.update, data)
        out.write(data)
        tally.add(chunk, None if converted is chunk else converted)
        progress(len(data))
    if hashing is not None:
        hashing.result()
    return digest.hexdigest(), tally.odd


def _layout(recipes: tuple[Recipe, ...], dtype: str) -> tuple[bytes, list[WrittenTensor]]:
    """The file's header, padded to a page, and where each tensor goes (sha256 still empty)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = list(itertools.accumulate((recipe.nbytes(dtype) for recipe in recipes), initial=0))
    for recipe, place in zip(recipes, itertools.pairwise(ends), strict=True):
        kind = dtype_of(recipe.dtype(dtype)).safetensors
        entries[recipe.name] = {"dtype": kind, "shape": recipe.shape, "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    places = zip(recipes, ends[:-1], strict=True)
    return header, [WrittenTensor(recipe.name, len(header) + at, recipe.nbytes(dtype)) for recipe, at in places]


def _open(path: Path, header: bytes, end: int) -> BinaryIO:
    """The file for writing at `end`; new, with its header, where `end` is the header's."""
    out = path.open("r+b" if end > len(header) else "wb")
    if end == len(header):
        out.write(header)
    out.truncate(end)
    out.seek(end)
    return out


def _finished(
    path: Path,
    journal: Path,
    header: bytes,
    recipes: tuple[Recipe, ...],
    places: list[WrittenTensor],
    progress: Progress,
) -> list[WrittenTensor]:
    """The tensors that an earlier run finished: those whose bytes have the hash that its journal says.

    Scales count as finished with their codes alone.
    """
    if not path.is_file() or not journal.is_file():
        return []
    with path.open("rb") as stream:
        if stream.read(len(header)) != header:
            return []
        found = []
        for place, line in zip(places, _read_journal(journal), strict=False):
            if line.get("name") != place.name or line.get("sha256") != stream_sha256(stream, place.nbytes):
                break
            odd = tuple(Numbers(**n) for n in line["odd"])
            found.append(replace(place, sha256=line["sha256"], odd=odd, error=line.get("error")))
            progress(place.nbytes)
        if found and recipes[len(found) - 1].is_scales:
            progress(-found.pop().nbytes)
        return found


def _read_journal(journal: Path) -> Iterator[dict[str, Any]]:
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # killed while it was written
            return


def _line(tensor: WrittenTensor) -> str:
    odd = [asdict(numbers) for numbers in tensor.odd]
    return json.dumps({"name": tensor.name, "sha256": tensor.sha256, "odd": odd, "error": tensor.error}) + "\n"


def _convert(chunk: Array, dtype: str) -> Array:
    """The chunk as `dtype`; itself where it is so already."""
    target = np.dtype(numpy_dtype(dtype))
    if chunk.dtype == target:
        return chunk
    with np.errstate(over="ignore", invalid="ignore"):  # judge_numbers says what became infinite
        return chunk.astype(target)
