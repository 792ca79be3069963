"""MoeLayer's kernels against float64, and their order of slots against the counting sort's."""

import dataclasses

import pytest
import torch

from deepseek_trt.export.ops.moe_biased_router import moe_biased_router
from deepseek_trt.export.ops.moe_router import moe_router
from deepseek_trt.plugins.fused.moe_layer import MOE_LAYER, moe_layer
from deepseek_trt.plugins.kernels import chips, moe_dispatch
from deepseek_trt.plugins.kernels.moe import layer
from deepseek_trt.plugins.kernels.moe.constants import Choice, LayerSizes, one_launch_tokens

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Inner, each expert's output and the sum are rounded to the dtype once each: three halves of an ulp. In float32 the
# sums of `hidden` and of `inter` products round too, about the square root of their count, and so do the logits, whose
# error of a few ulps the softmax hands on to the weights.
ULPS = {F32: 8.0, F16: 1.5, BF16: 1.5}
RMS_ULPS = {F32: 12.0, F16: 0.6, BF16: 0.6}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and the tokens of one call; tiles are those of `sm`."""

    dtype: torch.dtype
    tokens: int
    sizes: LayerSizes
    scale: float = 1.0
    sm: int = chips.INTERPRETER

    @property
    def routing(self):
        """The op's attributes."""
        c = self.sizes.choice
        return (c.top_k, c.n_group, c.topk_group, c.normalise, self.scale, int(c.biased))


def sizes(experts, shared, hidden, inter, top_k, groups=1, kept=1, normalise=0, biased=False):
    return LayerSizes(experts, shared, hidden, inter, Choice(top_k, groups, kept, normalise, biased))


V2_KIND, V3_KIND = sizes(16, 2, 72, 40, 4, 4, 2), sizes(18, 1, 80, 24, 3, 3, 2, 1, True)
CASES = {
    "one token": Case(F32, 1, V2_KIND, 16.0),
    "one token of V3's kind": Case(BF16, 1, V3_KIND, 2.5),
    "few tokens": Case(F16, 7, sizes(64, 2, 128, 64, 6)),
    "as many as one program sorts": Case(BF16, 64, V2_KIND, 16.0),
    "more than one program sorts": Case(BF16, 65, V2_KIND, 16.0),
    "more of V3's kind": Case(F32, 70, V3_KIND, 2.5),
    "normalised": Case(F32, 9, sizes(12, 3, 48, 32, 2, normalise=1)),
    "tiles of SM 86": Case(BF16, 20, V3_KIND, 2.5, 86),
    "tiles of SM 90": Case(BF16, 5, V2_KIND, 16.0, 90),
    "float32 tiles": Case(F32, 5, V2_KIND, 16.0, 86),
    "wider than a split": Case(F32, 3, sizes(8, 1, 1100, 16, 2)),
}


def make_operands(case, device, seed=0):
    torch.manual_seed(seed)
    s = case.sizes
    width, shared = s.hidden, s.shared * s.inter
    shapes = [(s.experts, s.inter, width), (s.experts, s.inter, width), (s.experts, width, s.inter)]
    shapes += [(shared, width), (shared, width), (width, shared)]
    stacks = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    x, router = torch.randn(case.tokens, width), torch.randn(s.experts, width) / width**0.5
    x, router, *stacks = (t.to(case.dtype).to(device) for t in (x, router, *stacks))
    return x, router, torch.randn(s.experts).to(device), *stacks


def expected(case, x, router, bias, gate, up, down, shared_gate, shared_up, shared_down):
    """In float64, and with all terms of the last two sums positive; routing from float64's logits in float32."""
    x, router, *stacks = (t.cpu().double() for t in (x, router, gate, up, down, shared_gate, shared_up, shared_down))
    gate, up, down, shared_gate, shared_up, shared_down = stacks
    *choice, biased = case.routing
    logits = x @ router.T
    weights, ids = moe_biased_router(logits, bias.cpu(), *choice) if biased else moe_router(logits, *choice)
    silu = torch.nn.functional.silu
    inner = silu(x @ shared_gate.T) * (x @ shared_up.T)
    total, magnitude = inner @ shared_down.T, inner.abs() @ shared_down.abs().T
    for token, chosen in enumerate(ids.tolist()):
        for rank, expert in enumerate(chosen):
            inner = silu(gate[expert] @ x[token]) * (up[expert] @ x[token])
            total[token] += weights[token, rank] * (down[expert] @ inner)
            magnitude[token] += weights[token, rank] * (down[expert].abs() @ inner.abs())
    return total, magnitude


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gives_the_layers_output(case, device, use_tiles, poison_new_memory, assert_within):
    use_tiles(case.sm, layer, moe_dispatch)
    operands = make_operands(case, device)
    output = layer.run(*operands, *case.routing)
    assert_within(output, *expected(case, *operands), ULPS[case.dtype], RMS_ULPS[case.dtype])


def test_is_what_the_exported_layer_computes(device):
    """The op's reference is the model's own arithmetic; in float32 both round like it."""
    case = CASES["one token"]
    operands = make_operands(case, device)
    torch.testing.assert_close(layer.run(*operands, *case.routing), moe_layer(*operands, *case.routing))
    assert [a.name for a in MOE_LAYER.attributes] == [
        "top_k",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "biased",
    ]


@pytest.mark.parametrize("model", [V2_KIND, V3_KIND], ids=["V2's kind", "V3's kind"])
@pytest.mark.parametrize("tokens", [1, 4, 5, 33, 64])
@pytest.mark.parametrize("block", [16, 64])
def test_one_program_sorts_as_the_counting_sort(model, tokens, block, device, monkeypatch, poison_new_memory):
    """Both give the same order, slot by slot, up to the blocks that nobody reads."""
    case = Case(F32, tokens, model)
    x, router, bias, *_ = make_operands(case, device)
    weights, order = layer.route(x, router, bias, 1.0, model, block)
    buckets = layer.routing_buckets(model, chips.chip_of(x))
    monkeypatch.setattr(layer, "routing_buckets", lambda *_: buckets[-1:])
    weights_apart, apart = layer.route(x, router, bias, 1.0, model, block)
    assert order.block_expert.tolist() == apart.block_expert.tolist()
    used = block * int((order.block_expert >= 0).sum())
    assert order.sorted_slots[:used].tolist() == apart.sorted_slots[:used].tolist()
    torch.testing.assert_close(weights, weights_apart)
    assert (weights[:, model.choice.top_k :] == 1).all()


def test_experts_nobody_chose_are_not_read(device, assert_within):
    case = CASES["one token"]
    x, router, bias, *stacks = make_operands(case, device)
    _, ids = moe_router((x.double() @ router.double().T).cpu(), *case.routing[:-1])
    for expert in set(range(16)) - set(ids[0].tolist()):
        for stack in stacks[:3]:
            stack[expert] = torch.nan
    output = layer.run(x, router, bias, *stacks, *case.routing)
    assert_within(output, *expected(case, x, router, bias, *stacks), ULPS[F32], RMS_ULPS[F32])


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's; a GPU's maximum of NaNs is NaN without a word
@pytest.mark.parametrize("tokens", [6, 70])
@pytest.mark.parametrize("model", [V2_KIND, V3_KIND], ids=["V2's kind", "V3's kind"])
def test_a_bad_token_spoils_itself_only(model, tokens, device, memory_watch):
    """And indexes no foreign memory: its ids stay in range."""
    case = Case(F32, tokens, model)
    x, *rest = make_operands(case, device)
    x[2, 5] = torch.nan
    output = layer.run(x, *rest, *case.routing)
    assert output.isnan().any(1).tolist() == [token == 2 for token in range(tokens)]


def test_no_tokens(device):
    case = Case(F32, 0, V2_KIND)
    assert layer.run(*make_operands(case, device), *case.routing).shape == (0, 72)


def test_how_many_tokens_one_program_sorts():
    """At most 64, and no more than 8192 logits with their padding."""
    assert one_launch_tokens(sizes(64, 2, 2048, 1408, 6)) == 64
    assert one_launch_tokens(sizes(160, 2, 5120, 1536, 6, 8, 3)) == 32
    assert one_launch_tokens(sizes(384, 1, 7168, 2048, 8)) == 16
