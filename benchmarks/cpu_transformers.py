"""transformers as a runner of cpu.py; it makes the reference's logits too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cpu_point import Files, Floats, Job, Point, difference, measure, serve
from transformers import DeepseekV2ForCausalLM

_CHUNK = 2048  # of the reference's prefill: bounds the memory of its attention scores
# grouped_mm computes the chosen experts alone, for all tokens of an expert at once.
_ATTENTION, _EXPERTS = "sdpa", "grouped_mm"


def fill(files: Files, job: Job) -> None:
    model = _convert(files)
    for batch, contexts in job.contexts.items():
        ids = torch.from_numpy(files.prompts(int(batch), max(contexts)))
        ends = sorted({*contexts, *range(_CHUNK, max(contexts), _CHUNK)})
        cache = None
        for begin, end in zip([0, *ends], ends, strict=False):
            out = model(ids[:, begin:end], cache=cache, use_cache=True, logits_to_keep=1)
            cache = out.cache
            np.save(files.logits(Point("decode", int(batch), end, 0)), out.logits[:, -1].numpy())
        latents = [torch.cat([layer.keys, layer.values], dim=-1)[:, 0] for layer in cache.layers]
        np.save(files.state(job.runner, int(batch)), torch.stack(latents).numpy())


def run(files: Files, job: Job, point: Point) -> dict[str, Any]:
    torch.set_num_threads(point.threads)
    model = torch.load(files.folder / "transformers.pt", mmap=True, weights_only=False)
    ids = torch.from_numpy(files.prompts(point.batch, point.context))
    step = _prefill_step(model, ids) if point.kind == "prefill" else _decode_step(files, job, model, ids)
    return {"error": difference(files, point, step()), "ms": measure(step)}


def _convert(files: Files) -> Any:
    """The model, kept as a pickle too: stacking the experts of the checkpoint takes longer than most measurements."""
    path = files.folder / "transformers.pt"
    if not path.exists():
        model = DeepseekV2ForCausalLM.from_pretrained(
            files.checkpoint, dtype=torch.float32, attn_implementation=_ATTENTION, experts_implementation=_EXPERTS
        )
        torch.save(model.eval(), path)
    return torch.load(path, mmap=True, weights_only=False)


def _prefill_step(model: Any, ids: torch.Tensor) -> Any:
    def step() -> Floats:
        logits: Floats = model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].numpy()
        return logits

    return step


def _decode_step(files: Files, job: Job, model: Any, ids: torch.Tensor) -> Any:
    """One token after a cache that is put back before each run."""
    batch, context = ids.shape
    latents = np.load(files.state(job.runner, batch), mmap_mode="r")[:, :, None, : context - 1]
    rank = model.config.kv_lora_rank
    kept = [(torch.tensor(layer[..., :rank]), torch.tensor(layer[..., rank:])) for layer in latents]
    cache = model(ids[:, :1], use_cache=True).cache

    def step() -> Floats:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        logits: Floats = model(ids[:, -1:], cache=cache, use_cache=True).logits[:, -1].numpy()
        return logits

    return step


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve(fill, run)
