"""The sampling kernels on torch's tensors: for tests, and for the one who measures them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek_trt.plugins.cpu.sampling_row import SamplingRow
from deepseek_trt.plugins.kernels.chips import chip_of
from deepseek_trt.plugins.kernels.constants import sampling_constants
from deepseek_trt.plugins.kernels.launches import SAMPLING_TOPS, cdiv
from deepseek_trt.plugins.kernels.sampling.adjust import sample_adjust
from deepseek_trt.plugins.kernels.sampling.batch import RESULTS, Picked, packed, taken
from deepseek_trt.plugins.kernels.sampling.pick import sample_pick
from deepseek_trt.plugins.kernels.tiles import sample_adjust_tile, sample_pick_tile

if TYPE_CHECKING:
    from torch import Tensor


def run(rows: Sequence[SamplingRow], logits: Tensor, places: Sequence[int] | None = None) -> list[Picked]:
    """Pick and record a token for each row, of logits float32 [places, vocab]; row r reads logits[r] where no places
    are given.
    """
    import torch

    count, vocab = len(rows), logits.shape[1]
    at = np.arange(count) if places is None else np.array(places)
    host = packed(rows, at.astype(np.int32))
    given: dict[str, Any] = {name: torch.from_numpy(array).to(logits.device) for name, array in host.items()}
    shapes = {spec.name: (count, SAMPLING_TOPS) if spec.wide else (count,) for spec in RESULTS}
    dtypes = {spec.name: getattr(torch, np.dtype(spec.dtype).name) for spec in RESULTS}
    results = {name: logits.new_empty(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
    sm, most = chip_of(logits), int(np.diff(host["starts"]).max())
    logits = logits.contiguous()
    adjusted = logits[at].contiguous()
    constants, adjust, pick = sampling_constants(vocab), sample_adjust_tile(sm), sample_pick_tile(vocab, sm)
    if most:
        changes = [given[name] for name in ("places", "starts", "ids", "counts", "drops", "biases")]
        rules = [given[name] for name in ("repetitions", "presences")]
        grid = (count, cdiv(most, adjust["BLOCK"]))
        options = {**constants.adjust, **adjust.launch_options()}
        sample_adjust[grid](logits, adjusted, *changes, *rules, **options)
    names = ("places", "starts", "keys", "draws", "steepness", "top_ps", "top_ks", "leasts", "wanted")
    options = {**constants.pick, **pick.launch_options()}
    sample_pick[(count,)](logits, adjusted, *(given[name] for name in names), *results.values(), **options)
    return taken(rows, {name: tensor.cpu().numpy() for name, tensor in results.items()}, vocab)
