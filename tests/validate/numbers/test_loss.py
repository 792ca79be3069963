"""Cross-entropy as transformers computes it: -100 left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deepseek_trt.validate.numbers.loss import IGNORED, token_losses


def masked(labels, where):
    labels = labels.copy()
    labels[where] = IGNORED
    return labels


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 256, (3, 11))


MASKS = {
    "all": np.s_[:0],
    "prompt": np.s_[:, :4],
    "padding": np.s_[1, 6:],
    "a row": np.s_[2],
    "the first, which nobody foretells": np.s_[:, 0],
    "scattered": ([0, 1, 2], [5, 2, 10]),
}


@pytest.mark.parametrize("where", MASKS.values(), ids=MASKS)
def test_it_is_transformers_loss(small_v2, ids, where):
    labels = masked(ids, where)
    with torch.no_grad():
        out = small_v2.hf(torch.from_numpy(ids), labels=torch.from_numpy(labels))
    losses = token_losses(out.logits[:, :-1].flatten(0, 1).numpy(), labels[:, 1:].reshape(-1))
    assert losses.mean() == pytest.approx(float(out.loss), rel=1e-5)


def test_an_even_distribution_over_eight_tokens():
    targets = np.array([3, IGNORED, 0])
    assert token_losses(np.zeros((3, 8), np.float32), targets) == pytest.approx([math.log(8)] * 2)
