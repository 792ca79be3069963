"""Whatever lengths, pages and expert ids say, the kernels stay within the tensors that they were given."""

import pytest
import torch

from deepseek_trt.plugins.kernels import KERNEL_OPS, moe_dispatch

if torch.cuda.is_available():
    pytest.skip("the interpreter is what watches memory here", allow_module_level=True)

LARGEST, SMALLEST = 2**31 - 1, -(2**31)
GARBAGE = {
    "largest": lambda shape: torch.full(shape, LARGEST),
    "smallest": lambda shape: torch.full(shape, SMALLEST),
    "just past the end": lambda shape: torch.full(shape, 12),
    "mixed": lambda shape: (
        torch.tensor([LARGEST, -1, 3, SMALLEST, 10**6]).repeat(8)[: torch.Size(shape).numel()].view(shape)
    ),
}
CASES = pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
POOL, TABLE = (6, 4, 12), (2, 3)


@pytest.fixture(autouse=True)
def watched(memory_watch):
    torch.manual_seed(0)


def sane(name):
    return {
        "page_table": torch.tensor([[3, 1, 0], [2, 4, 5]]),
        "past_lengths": torch.tensor([0, 6]),
        "sequence_lengths": torch.tensor([5, 2]),
    }[name].int()


def with_garbage(garbage, *wild):
    names = ("page_table", "past_lengths", "sequence_lengths")
    return [garbage(sane(name).shape).int() if name in wild else sane(name) for name in names]


WILD = pytest.mark.parametrize(
    "wild",
    [("page_table",), ("past_lengths",), ("sequence_lengths",), ("page_table", "past_lengths", "sequence_lengths")],
    ids="+".join,
)


@CASES
@WILD
def test_decode(garbage, wild):
    given = with_garbage(garbage, *wild)
    attended, present = KERNEL_OPS["MlaDecode"](
        torch.randn(2, 5, 3, 12), torch.randn(2, 5, 12), torch.randn(POOL), *given, 0.4, 8
    )
    assert attended.isfinite().all()
    assert present.isfinite().all()


@CASES
@WILD
def test_prefill(garbage, wild):
    attended, present = KERNEL_OPS["MlaPrefill"](
        torch.randn(2, 5, 3, 10),
        torch.randn(2, 5, 12),
        torch.randn(POOL),
        *with_garbage(garbage, *wild),
        torch.randn(3, 6, 8),
        torch.randn(3, 5, 8),
        0.4,
    )
    assert attended.isfinite().all()
    assert present.isfinite().all()


@CASES
def test_experts(garbage):
    ids = garbage((4, 2)).int()
    output = KERNEL_OPS["MoeExperts"](
        torch.randn(4, 12),
        torch.rand(4, 2),
        ids,
        torch.randn(6, 7, 12),
        torch.randn(6, 7, 12),
        torch.randn(6, 12, 7),
        "silu",
    )
    assert output.isfinite().all()


@CASES
def test_dispatch_loses_no_slot(garbage):
    plan = moe_dispatch.dispatch(garbage((5, 3)).int(), 4, 16)
    slots = plan.sorted_slots[plan.sorted_slots < 15]
    assert sorted(slots.tolist()) == list(range(15))


@pytest.mark.parametrize("logit", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_routers_ids_index_experts(logit):
    logits = torch.randn(3, 20)
    logits[:, 2] = logit
    _, ids = KERNEL_OPS["MoeRouter"](logits, 4, 5, 2, 0, 1.0)
    assert ids.min() >= 0
    assert ids.max() < 20


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_biased_routers_ids_index_experts(bad):
    for groups, kept in ((1, 1), (5, 2)):
        bias = torch.randn(20)
        bias[13] = bad
        _, ids = KERNEL_OPS["MoeBiasedRouter"](torch.randn(3, 20), bias, 4, groups, kept, 1, 1.0)
        assert ids.min() >= 0
        assert ids.max() < 20


def test_the_watch_sees_a_stray_load():
    """The pool is smaller than the kernel is told."""
    from deepseek_trt.plugins.kernels.latent_write import latent_write

    given = [torch.randn(2, 4, 12), torch.randn(1, 1, 12), torch.tensor([[5]]).int(), torch.tensor([0]).int()]
    given.append(torch.tensor([1]).int())
    with pytest.raises(Exception, match="out of bounds"):
        latent_write[(1, 1)](*given, 1, 1, 6, D=12, PAGE=4, BLOCK_S=1, BLOCK_D=16)
