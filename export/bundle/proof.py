"""Proof that a bundle's weights are those that export wrote: hashed once, remembered in the user's cache by their stat.

Whoever writes the file changes its time of change, which no program can set: then it is hashed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.export.bundle.manifest import WEIGHTS_FILE, Manifest, WeightRecord
from deepseek_trt.export.dtypes import dtype_bytes
from deepseek_trt.export.errors import BundleError, CheckpointError
from deepseek_trt.export.reading.header import read_header
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.trust.cache import own_cache, say_once
from deepseek_trt.export.trust.listing import AGAIN
from deepseek_trt.export.trust.own_json import own_record, read_own
from deepseek_trt.export.trust.real_files import open_real
from deepseek_trt.export.writing.working import aside

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_CHUNK = 4 * 2**20  # bytes read and hashed at once
_SCHEMA = ("schema", 1)
_PART = "weights"  # of the cache


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Mark:
    """A weights file that was proven: where it lies, what the system said of it, and the digest of its listing."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    listing: str
    schema: int = _SCHEMA[1]


_proven: set[Mark] = set()  # by this process


def check_size(folder: Path, manifest: Manifest) -> None:
    """BundleError where the weights file is not there, no file, or of another size; by reference there is none."""
    if manifest.weights_file is not None:
        with open_real(folder, WEIGHTS_FILE, BundleError, AGAIN) as stream:
            size = os.fstat(stream.fileno()).st_size
        if size != manifest.weights_file.size:
            raise BundleError(
                f"{folder / WEIGHTS_FILE} has {size} bytes, export wrote {manifest.weights_file.size}: {AGAIN}"
            )


def prove_weights(folder: Path, manifest: Manifest, progress: Progress = no_progress, anew: bool = False) -> None:
    """BundleError unless the weights are those that the manifest lists.

    They are hashed where that was not done since the file last changed, or `anew`. Of a checkpoint that a bundle refers
    to there are no hashes: size and time of its files are compared by who reads it.
    """
    if manifest.weights_file is None:
        if anew:
            say_once(
                f"{folder} takes its weights from {manifest.checkpoint}, of which export read no numbers and kept no "
                "hashes: its files are checked by size and time alone"
            )
        return
    check_size(folder, manifest)
    mark = _mark_of(folder, manifest)
    if not anew and (mark in _proven or mark == _kept(mark)):
        return
    _hash_all(folder, manifest, progress)
    if _mark_of(folder, manifest) != mark:
        raise BundleError(f"{folder / WEIGHTS_FILE} changed while it was read: wait until it is written")
    _keep(mark)


def remember_weights(folder: Path, manifest: Manifest) -> None:
    """For export, which hashed what it wrote."""
    if manifest.weights_file is not None:
        _keep(_mark_of(folder, manifest))


def _mark_of(folder: Path, manifest: Manifest) -> Mark:
    path = folder.resolve() / WEIGHTS_FILE
    found = path.lstat()
    listing = hashlib.sha256(repr((manifest.weights_file, [_listed(w) for w in manifest.weights])).encode())
    times = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return Mark(str(path), found.st_dev, found.st_ino, *times, listing.hexdigest())


def _listed(record: WeightRecord) -> tuple[str, str, tuple[int, ...], str | None]:
    return record.recipe.name, record.dtype, record.recipe.shape, record.sha256


def _name(mark: Mark) -> str:
    return f"{hashlib.sha256(os.fsencode(mark.path)).hexdigest()[:32]}.json"


def _kept(mark: Mark) -> Mark | None:
    """What the cache says of the file at that path."""
    cache = own_cache(_PART)
    if cache is not None:
        with suppress(BundleError, OSError):
            raw = read_own(cache, _name(mark), BundleError, "")
            return own_record(Mark, raw, _SCHEMA, cache / _name(mark), BundleError, "")
    return None


def _keep(mark: Mark) -> None:
    _proven.add(mark)
    cache = own_cache(_PART)
    try:
        if cache is None:
            raise OSError
        with aside(cache / _name(mark)) as draft:
            draft.write_text(json.dumps(dataclasses.asdict(mark), indent=1) + "\n", encoding="ascii")
    except OSError:
        say_once("that weights were checked cannot be kept in the cache: each process hashes them once")


def _hash_all(folder: Path, manifest: Manifest, progress: Progress) -> None:
    """Compare header and tensors with the manifest, on as many threads as there are processors."""
    file = folder / WEIGHTS_FILE
    with open_real(folder, WEIGHTS_FILE, BundleError, AGAIN) as stream, ThreadPoolExecutor(_threads()) as pool:
        stored = _stored(file, stream.fileno(), manifest)
        total, done = sum(tensor.nbytes for tensor in stored.values()), 0
        jobs = {pool.submit(_sha256, stream.fileno(), stored[w.recipe.name]): w for w in manifest.weights}
        try:
            for job in as_completed(jobs):
                record = jobs[job]
                if job.result() != record.sha256:
                    raise BundleError(f"{file}: the weight {record.recipe.name} is not what export wrote: {AGAIN}")
                done += stored[record.recipe.name].nbytes
                progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stored(file: Path, descriptor: int, manifest: Manifest) -> dict[str, StoredTensor]:
    """What the header says of each tensor, once it is the header that export wrote."""
    head = os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    assert manifest.weights_file is not None
    whole = os.pread(descriptor, 8 + length, 0) if length < manifest.weights_file.size else b""
    if hashlib.sha256(whole).hexdigest() != manifest.weights_file.header_sha256:
        raise BundleError(f"{file}: its header is not what export wrote: {AGAIN}")
    return stored_weights(file, manifest)


def stored_weights(file: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """Where each weight lies in the file, by its header; BundleError where that holds others than the manifest."""
    try:
        stored = {tensor.name: tensor for tensor in read_header(file)}
    except CheckpointError as wrong:
        raise BundleError(f"{wrong}; {AGAIN}") from None
    wanted = {w.recipe.name: (w.recipe.shape, w.recipe.size * dtype_bytes(w.dtype)) for w in manifest.weights}
    if {tensor.name: (tensor.shape, tensor.nbytes) for tensor in stored.values()} != wanted:
        raise BundleError(f"{file} does not hold the weights that the manifest lists: {AGAIN}")
    return stored


def _sha256(descriptor: int, tensor: StoredTensor) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, tensor.nbytes)))
    at, end = tensor.offset, tensor.offset + tensor.nbytes
    while at < end:
        part = buffer[: min(_CHUNK, end - at)]
        count = os.preadv(descriptor, [part], at)
        if not count:
            break
        digest.update(part[:count])
        at += count
    return digest.hexdigest()
