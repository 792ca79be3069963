"""The dispatch against a counting sort in numpy, bit by bit."""

import numpy as np
import pytest
import torch

from deepseek_trt.plugins.kernels import moe_dispatch
from deepseek_trt.plugins.kernels.launches import dispatch_blocks


def sort_slots(ids, experts, block):
    """What sorted_slots and block_expert must hold, unused ends included."""
    flat, blocks = ids.ravel(), dispatch_blocks(ids.size, experts, block)
    slots = np.full(blocks * block, flat.size, dtype=np.int32)
    owners = np.full(blocks, -1, dtype=np.int32)
    at = 0
    for expert in range(experts):
        mine = np.flatnonzero(flat == expert)
        used = -(-len(mine) // block)
        slots[at * block : at * block + len(mine)] = mine
        owners[at : at + used] = expert
        at += used
    return slots, owners


def distinct(tokens, top_k, experts, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)


CASES = {
    "one token": (distinct(1, 6, 64), 64, 16),
    "few tokens": (distinct(5, 6, 64), 64, 16),
    "odd experts": (distinct(50, 3, 19), 19, 16),
    "V2": (distinct(60, 6, 160), 160, 64),
    "many chunks": (distinct(300, 8, 256), 256, 16),
    "more chunks than a tile": (distinct(700, 4, 16), 16, 128),
    "all to one": (np.full((200, 1), 3, dtype=np.int32), 8, 16),
    "all to the last": (np.full((16, 1), 7, dtype=np.int32), 8, 16),
    "one expert": (np.zeros((5, 1), dtype=np.int32), 1, 16),
    "whole blocks": (np.repeat(np.arange(4, dtype=np.int32), 32)[:, None], 4, 16),
}


@pytest.mark.parametrize(("ids", "experts", "block"), CASES.values(), ids=CASES.keys())
def test_sorts_stably(ids, experts, block, device):
    plan = moe_dispatch.dispatch(torch.from_numpy(ids).to(device), experts, block)
    slots, owners = sort_slots(ids, experts, block)
    np.testing.assert_array_equal(plan.block_expert.cpu().numpy(), owners)
    np.testing.assert_array_equal(plan.sorted_slots.cpu().numpy(), slots)


def test_writes_every_word_itself(device, poison_new_memory):
    """The workspace is not cleared before: what was there does not show."""
    ids = distinct(40, 6, 64)
    plan = moe_dispatch.dispatch(torch.from_numpy(ids).to(device), 64, 16)
    slots, owners = sort_slots(ids, 64, 16)
    np.testing.assert_array_equal(plan.sorted_slots.cpu().numpy(), slots)
    np.testing.assert_array_equal(plan.block_expert.cpu().numpy(), owners)
