"""llama.cpp as a runner of cpu.py, by llama-cpp-python's low-level functions: exact, fastest, and in narrow forms."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np
import numpy.typing as npt
from cpu_point import Files, Floats, Job, Point, difference, divergence, measure, serve
from gguf_file import write_gguf

_CHUNK = 512  # tokens of a prefill at once
_TYPE_F32, _TYPE_F16 = 0, 1  # of ggml


@dataclass(frozen=True)
class Mode:
    flash_attention: bool
    cache_type: int
    mmap: bool


EXACT = Mode(flash_attention=False, cache_type=_TYPE_F32, mmap=True)
FAST = Mode(flash_attention=True, cache_type=_TYPE_F16, mmap=False)
_FILE_TYPES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15}  # of llama.cpp's llama_ftype


def mode_of(runner: str) -> Mode:
    return EXACT if runner == "llama-exact" else FAST


class Llama:
    """A model and a context for `batch` sequences of at most `length` tokens."""

    def __init__(self, gguf: Path, mode: Mode, batch: int, length: int, threads: int) -> None:
        ll.llama_backend_init()
        model = ll.llama_model_default_params()
        model.load_mode = ll.LLAMA_LOAD_MODE_MMAP if mode.mmap else ll.LLAMA_LOAD_MODE_NONE
        model.n_gpu_layers = 0
        self._model = ll.llama_model_load_from_file(str(gguf).encode(), model)
        self._vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_seq_max = batch * (-(-(length + 1) // 256) * 256), batch
        params.n_batch = params.n_ubatch = _CHUNK
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = mode.cache_type
        params.flash_attn_type = int(mode.flash_attention)
        params.no_perf = True
        self.context = ll.llama_init_from_model(self._model, params)
        self._memory = ll.llama_get_memory(self.context)

    def decode(self, tokens: npt.NDArray[np.int64], rows: list[int], position: int) -> Floats:
        """Logits [rows, vocab] of the last of tokens [rows, n], which stand at position, position + 1, ..."""
        with _batch(tokens, rows, position) as batch:
            if ll.llama_decode(self.context, batch) != 0:
                raise RuntimeError("llama_decode failed")
        last = [(row + 1) * tokens.shape[1] - 1 for row in range(len(rows))]
        out = [ll.llama_get_logits_ith(self.context, index) for index in last]
        return np.stack([np.ctypeslib.as_array(row, (self._vocab,)).copy() for row in out])

    def prefill(self, tokens: npt.NDArray[np.int64], row: int = 0) -> Floats:
        """Logits [1, vocab] of the last of tokens [1, n]."""
        for begin in range(0, tokens.shape[1], _CHUNK):
            logits = self.decode(tokens[:, begin : begin + _CHUNK], [row], begin)
        return logits

    def forget(self, row: int, position: int) -> None:
        """Drop what the cache holds of a sequence from `position` on."""
        ll.llama_memory_seq_rm(self._memory, row, position, -1)


@contextmanager
def _batch(tokens: npt.NDArray[np.int64], rows: list[int], position: int) -> Iterator[Any]:
    count = tokens.shape[1]
    batch = ll.llama_batch_init(tokens.size, 0, 1)
    batch.n_tokens = tokens.size
    for index, token in enumerate(tokens.reshape(-1).tolist()):
        batch.token[index], batch.pos[index] = token, position + index % count
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, rows[index // count]
        batch.logits[index] = index % count == count - 1
    try:
        yield batch
    finally:
        ll.llama_batch_free(batch)


def write_model(files: Files, form: str) -> Path:
    """The GGUF, and of a narrow form what llama.cpp makes of the float32 one."""
    whole, path = files.gguf("float32"), files.gguf(form)
    write_gguf(files.checkpoint, whole)
    if not path.exists():
        params, unfinished = ll.llama_model_quantize_default_params(), path.with_suffix(".part")
        params.ftype = _FILE_TYPES[form]
        if ll.llama_model_quantize(str(whole).encode(), str(unfinished).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama_model_quantize failed for {form}")
        unfinished.rename(path)
    return path


def fill(files: Files, job: Job) -> None:
    gguf = write_model(files, job.form)
    for batch, contexts in job.contexts.items():
        prompts = files.prompts(int(batch), max(contexts))
        llama = Llama(gguf, mode_of(job.runner), int(batch), max(contexts), job.threads)
        for row, prompt in enumerate(prompts[:, :-1]):
            path, nothing = _state(files, job, len(prompts), row), (ctypes.c_int * 1)()
            if not path.exists():
                llama.prefill(prompt[None], row)
                ll.llama_state_seq_save_file(llama.context, str(path).encode(), row, nothing, 0)


def run(files: Files, job: Job, point: Point) -> dict[str, Any]:
    longest = max(job.contexts.get(str(point.batch), [point.context]))
    prompts = files.prompts(point.batch, point.context)
    sequences = point.batch if point.kind == "decode" else 1
    llama = Llama(files.gguf(job.form), mode_of(job.runner), sequences, longest, point.threads)
    rows = list(range(sequences))

    def decode() -> Floats:
        for row in rows:
            llama.forget(row, point.context - 1)
        return llama.decode(prompts[:, -1:], rows, point.context - 1)

    def prefill() -> Floats:
        llama.forget(0, 0)
        return llama.prefill(prompts)

    def ends() -> Floats:
        made = []
        for prompt in prompts:
            llama.forget(0, 0)
            made.append(llama.prefill(prompt[None]))
        return np.concatenate(made)

    if point.kind == "quality":
        return {"ms": [], "error": 0.0, **divergence(files, point, ends())}
    if point.kind == "decode":
        _restore(files, job, llama, rows)
    step = prefill if point.kind == "prefill" else decode
    return {"error": difference(files, point, step()), "ms": measure(step)}


def _restore(files: Files, job: Job, llama: Llama, rows: list[int]) -> None:
    for row in rows:
        path, tokens, count = _state(files, job, len(rows), row), (ctypes.c_int * 1)(), ctypes.c_size_t(0)
        if not ll.llama_state_seq_load_file(llama.context, str(path).encode(), row, tokens, 1, ctypes.byref(count)):
            raise RuntimeError(f"{path}: cannot be loaded; delete it and {job.runner}.filled to have it made again")


def _state(files: Files, job: Job, batch: int, row: int) -> Path:
    return files.state(job.runner, batch, f"-{row}.bin")


if __name__ == "__main__":
    serve(fill, run)
