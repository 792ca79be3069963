"""Rows of tokens for graphs without a cache: padding on either side, and the inputs that say what is real."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.arrays import Arrays, Floats, Int32s, Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import TRANSFORMERS
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BackendError, BundleError, RequestError


def encoder_of(bundle: Bundle) -> Callable[[str | Sequence[int]], list[int]]:
    """A function from text to token ids, which leaves token ids as they are; text without a tokenizer: BundleError."""
    text = Text(bundle) if bundle.tokenizer_path else None

    def encode(given: str | Sequence[int]) -> list[int]:
        if not isinstance(given, str):
            return list(given)
        return (text or Text(bundle)).encode(given)  # Text says what is missing

    return encode


def pad_rows(rows: Sequence[Sequence[int]], pad: int | None = None) -> tuple[Int64s, Int32s]:
    """Right-padded ids [B, S], at least one token wide, and the rows' lengths [B]; None pads with zeros."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    ids = np.full((len(rows), max(int(lengths.max(initial=1)), 1)), pad or 0, dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids, lengths


def strip_padding(input_ids: Int64s, pad_token_id: int | None) -> tuple[Int64s, Int32s]:
    """Right-padded ids and lengths of rows [B, S] that are padded with pad_token_id on the left, the right or both.

    RequestError for a batch whose padding cannot be told from tokens.
    """
    if pad_token_id is None:
        if len(input_ids) > 1:
            raise RequestError(
                f"{len(input_ids)} rows without sequence_lengths, and config.json has no pad_token_id to tell padding "
                "by: give sequence_lengths, or one row at a time"
            )
        return input_ids, np.full(len(input_ids), input_ids.shape[1], dtype=np.int32)
    rows = []
    for row in input_ids:
        real = np.flatnonzero(row != pad_token_id)
        rows.append(row[real[0] : real[-1] + 1] if real.size else row[:0])
    return pad_rows(rows, pad_token_id)


def check_finite(values: Floats, what: str) -> None:
    """BackendError where a row holds NaN or infinity."""
    rows = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
    if rows.size:
        raise BackendError(
            f"the model's {what} of text {rows[0]} are not finite: weights are NaN or infinite, or numbers outgrow the "
            "dtype; `deepseek-trt validate` tells"
        )


def feeds_of(bundle: Bundle, ids: Int64s, lengths: Int32s) -> Arrays:
    """What the bundle's one graph takes for right-padded rows. Raises BundleError or RequestError."""
    if bundle.manifest.interface.inputs_embeds:
        raise BundleError(f"{bundle.path} takes inputs_embeds, not text: export the checkpoint without --inputs-embeds")
    _check(bundle.manifest.model, ids, lengths)
    if bundle.manifest.interface.io == TRANSFORMERS:
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids, "sequence_lengths": lengths}


def _check(config: ModelConfig, ids: Int64s, lengths: Int32s) -> None:
    if len(lengths) != len(ids) or (lengths < 0).any() or (lengths > ids.shape[1]).any():
        raise RequestError(f"sequence_lengths {lengths.tolist()} are not those of {list(ids.shape)} token ids")
    if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise RequestError(f"token ids from {ids.min()} to {ids.max()}: the vocabulary ends at {config.vocab_size - 1}")
    if lengths.max(initial=0) > config.max_position_embeddings:
        raise RequestError(
            f"a row of {lengths.max()} tokens: the model takes at most {config.max_position_embeddings}; shorten it"
        )
