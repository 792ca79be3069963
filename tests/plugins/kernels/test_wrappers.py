"""The wrappers stand in for the ops' references: same arguments, same results."""

import importlib
import inspect

import pytest
import torch

from deepseek_trt.export.ops import OPS
from deepseek_trt.plugins.kernels import KERNEL_OPS

WITH_KERNELS = [op for op in OPS if op.name in KERNEL_OPS]
MODULES = {
    "MlaPrefill": "mla_prefill",
    "MlaDecode": "mla_decode",
    "MoeRouter": "moe_router",
    "MoeBiasedRouter": "moe_biased_router",
    "MoeExperts": "moe_experts",
    "LinearNarrow": "narrow.linear",
    "MoeExpertsNarrow": "narrow.experts",
    "MlaPrefillNarrow": "cache.prefill",
    "MlaDecodeNarrow": "cache.decode",
}


def test_kernels_are_of_ops():
    assert {op.name for op in WITH_KERNELS} == set(KERNEL_OPS) == set(MODULES)


@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_takes_what_the_reference_takes(op):
    module = importlib.import_module(f"deepseek_trt.plugins.kernels.{MODULES[op.name]}")
    assert [*inspect.signature(module.run).parameters] == [*inspect.signature(op.reference).parameters]


def operands(name):
    """Of the size of a very small model: dims below what tl.dot takes."""
    torch.manual_seed(0)
    table = torch.tensor([[3, 1, 0], [2, 4, 5]], dtype=torch.int32)
    pool, past = torch.randn(6, 4, 12), torch.tensor([0, 6], dtype=torch.int32)
    new = torch.tensor([5, 2], dtype=torch.int32)
    pools = torch.randint(-127, 128, (6, 4, 8), dtype=torch.int8), torch.rand(6, 4, 5) / 50
    return {
        "MlaDecode": (torch.randn(2, 5, 3, 12), torch.randn(2, 5, 12), pool, table, past, new, 0.4, 8),
        "MlaPrefill": (
            torch.randn(2, 5, 3, 10),
            torch.randn(2, 5, 12),
            pool,
            table,
            past,
            new,
            torch.randn(3, 6, 8),
            torch.randn(3, 5, 8),
            0.4,
        ),
        "MlaDecodeNarrow": (
            torch.randn(2, 5, 3, 12),
            torch.randn(2, 5, 12),
            *pools,
            table,
            past,
            new,
            0.4,
            8,
            "int8",
            8,
        ),
        "MlaPrefillNarrow": (
            torch.randn(2, 5, 3, 10),
            torch.randn(2, 5, 12),
            *pools,
            table,
            past,
            new,
            torch.randn(3, 6, 8),
            torch.randn(3, 5, 8),
            0.4,
            "fp8",
            8,
        ),
        "MoeRouter": (torch.randn(4, 6), 2, 3, 2, 0, 1.5),
        "MoeBiasedRouter": (torch.randn(4, 6), torch.randn(6), 2, 3, 2, 1, 1.5),
        "MoeExperts": (
            torch.randn(4, 12),
            torch.rand(4, 2),
            torch.tensor([[0, 5], [5, 1], [2, 1], [0, 1]], dtype=torch.int32),
            torch.randn(6, 7, 12),
            torch.randn(6, 7, 12),
            torch.randn(6, 12, 7),
            "silu",
        ),
        "LinearNarrow": (torch.randn(4, 32), *narrow(7, 32), "int4", 32),
        "MoeExpertsNarrow": (
            torch.randn(4, 32),
            torch.rand(4, 2),
            torch.tensor([[0, 5], [5, 1], [2, 1], [0, 1]], dtype=torch.int32),
            *narrow(6, 32, 32),
            *narrow(6, 32, 32),
            *narrow(6, 32, 32),
            "silu",
            "int4",
            32,
        ),
    }[name]


def narrow(*shape):
    """Codes of 4 bits and their scales."""
    *rows, columns = shape
    return torch.randint(0, 256, (*rows, columns // 2), dtype=torch.uint8), torch.rand(*rows, columns // 32).half() / 16


@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_gives_what_the_reference_gives(op, device):
    args = [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in operands(op.name)]
    actual, expected = KERNEL_OPS[op.name](*args), op.reference(*args)
    if op.name.startswith("Mla"):
        kept = torch.arange(actual[0].shape[1], device=device) < torch.tensor([5, 2], device=device)[:, None]
        # padding and page 0 mean nothing
        actual, expected = ((a[kept], *(pool[1:] for pool in pools)) for a, *pools in (actual, expected))
    torch.testing.assert_close(actual, expected, check_stride=False)
