"""llama.cpp as a runner of cpu.py, through llama-cpp-python's low-level functions: `llama-exact`, `llama-fast`."""

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
from cpu_point import Files, Floats, Job, Point, difference, measure, serve
from gguf_file import write_gguf

_CHUNK = 512  # tokens of a prefill at once
_TYPE_F32, _TYPE_F16 = 0, 1  # of ggml


@dataclass(frozen=True)
class Mode:
    flash_attention: bool
    cache_type: int
    mmap: bool


MODES = {
    "llama-exact": Mode(flash_attention=False, cache_type=_TYPE_F32, mmap=True),
    "llama-fast": Mode(flash_attention=True, cache_type=_TYPE_F16, mmap=False),
}


class Llama:
    """A model and a context for `batch` sequences of at most `length` tokens."""

    def __init__(self, files: Files, mode: Mode, batch: int, length: int, threads: int) -> None:
        ll.llama_backend_init()
        model = ll.llama_model_default_params()
        model.use_mmap, model.n_gpu_layers = mode.mmap, 0
        self._model = ll.llama_model_load_from_file(str(files.gguf).encode(), model)
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


def fill(files: Files, job: Job) -> None:
    write_gguf(files.checkpoint, files.gguf)
    for batch, contexts in job.contexts.items():
        prompts = files.prompts(int(batch), max(contexts))
        llama = Llama(files, MODES[job.runner], int(batch), max(contexts), job.threads)
        for row, prompt in enumerate(prompts[:, :-1]):
            path, nothing = _state(files, job, len(prompts), row), (ctypes.c_int * 1)()
            if not path.exists():
                llama.prefill(prompt[None], row)
                ll.llama_state_seq_save_file(llama.context, str(path).encode(), row, nothing, 0)


def run(files: Files, job: Job, point: Point) -> dict[str, Any]:
    longest = max(job.contexts[str(point.batch)])
    prompts = files.prompts(point.batch, point.context)
    llama = Llama(files, MODES[job.runner], point.batch, longest, point.threads)
    rows = list(range(point.batch))

    def decode() -> Floats:
        for row in rows:
            llama.forget(row, point.context - 1)
        return llama.decode(prompts[:, -1:], rows, point.context - 1)

    def prefill() -> Floats:
        llama.forget(0, 0)
        return llama.prefill(prompts)

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
