"""TransformersSession: Hugging Face's model of the checkpoint as a second oracle, without any cache.

It shares neither code nor converted weights with the reference, so it also checks the export of the weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Array, Floats, Int32s, Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.weights import unchanged_checkpoint
from deepseek_trt.export.errors import BackendError
from deepseek_trt.export.reading.tensors import StoredTensor

MINIMUM = (5, 15)  # earlier versions leave out YaRN's factor on the softmax scale


class TransformersSession(Session):
    """Runs each row's whole history anew at every step, in float32. It has no latents: `cache.layers` is 0."""

    backend = "transformers"
    note = "the checkpoint's weights, computed in float32 without a cache"

    def __init__(self, request: SessionRequest) -> None:
        bundle = request.bundle
        self.cache = dataclasses.replace(bundle.manifest.cache, dtype="float32", layers=0)
        self.pages = request.pages
        self._model, self._all_logits = _load(bundle), bundle.manifest.all_logits
        self._histories: dict[int, list[int]] = {}  # by the first page of a sequence

    def fill(self, value: float) -> None:
        """There are no pages to fill."""
        self._histories.clear()

    def pool(self, layer: int) -> Array:
        raise IndexError(f"no pool {layer}: transformers keeps no latents")

    def prefill(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        every = self.decode(input_ids, sequence_lengths, past_lengths, page_table)
        return every if self._all_logits else every[np.arange(len(every)), sequence_lengths - 1]

    def decode(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        rows = zip(input_ids, sequence_lengths, past_lengths, page_table[:, 0], strict=True)
        found = [self._row(ids[:new].tolist(), int(past), int(page)) for ids, new, past, page in rows]
        every = np.zeros((*input_ids.shape, found[0].shape[-1]), dtype=np.float32)
        for row, (logits, past) in enumerate(zip(found, past_lengths, strict=True)):
            every[row, : len(logits) - past] = logits[past:]
        return every

    @torch.inference_mode()
    def _row(self, new: list[int], past: int, page: int) -> Floats:
        """Logits of the sequence's whole history [tokens, vocab]."""
        history = self._histories.get(page, [])[:past] + new
        self._histories[page] = history
        logits: Floats = self._model(torch.tensor([history]), use_cache=False).logits[0].float().numpy()
        return logits


def comparable_checkpoint(bundle: Bundle) -> Path:
    """The folder of the checkpoint that the bundle was made of; BackendError where it cannot be compared here."""
    try:
        import transformers
    except ImportError:
        raise BackendError("transformers is not installed: pip install 'transformers>=5.15'") from None
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < MINIMUM:
        raise BackendError(f"transformers {transformers.__version__} computes YaRN models wrongly: use 5.15 or later")
    folder, adapter = unchanged_checkpoint(bundle), bundle.manifest.adapter
    stored = _stored(folder)
    taken = {piece.source for weight in bundle.manifest.weights for piece in weight.recipe.pieces}
    if adapter is None and not taken <= stored.keys():
        raise BackendError(
            "the checkpoint's weights are packed, and transformers has no experts of codes: leave it out"
        )
    exact = ("float32",) if adapter else ("float32", next(iter(stored.values())).dtype)
    if bundle.manifest.dtype not in exact:
        raise BackendError(
            f"export rounded the weights to {bundle.manifest.dtype}: compare with transformers after an export with "
            f"--dtype {' or '.join(dict.fromkeys(exact))}"
        )
    if adapter and importlib.util.find_spec("peft") is None:
        raise BackendError("the bundle has a merged adapter, and peft is not installed: pip install peft")
    return folder


def _load(bundle: Bundle) -> Any:
    """Load the checkpoint that the bundle was made of; BackendError where that cannot be compared."""
    folder, adapter = comparable_checkpoint(bundle), bundle.manifest.adapter
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, loaded = found
    missing = sorted(loaded["missing_keys"])
    if missing:  # which it fills with random numbers
        raise BackendError(f"transformers does not find {missing[0]} in {folder}: its tensors have other names")
    return (_merged(model, Path(adapter.path), folder) if adapter else model).eval()


def _merged(model: Any, adapter: Path, folder: Path) -> Any:
    """The model with the adapter as peft merges it; one in the model's own folder is loaded by transformers itself."""
    import peft

    if adapter == folder.resolve():
        return model
    return peft.PeftModel.from_pretrained(model, adapter, local_files_only=True).merge_and_unload()


def _stored(folder: Path) -> dict[str, StoredTensor]:
    from deepseek_trt.export.reading.checkpoint import Checkpoint

    return Checkpoint.open(folder).tensors
