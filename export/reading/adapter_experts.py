"""LoRA on stacked experts, as peft writes it for newer transformers: one pair of factors for all experts of a layer.

A is [experts * r, in], expert by expert; B is [out, r * experts], the expert being the faster index (peft's
ParamWrapper). They belong to gate_up_proj [experts, 2 * inner, hidden] or down_proj [experts, hidden, inner].
"""

from __future__ import annotations

from collections.abc import Mapping

from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.reading.adapter_config import LoraConfig
from deepseek_trt.export.reading.tensors import Factor, LowRank, StoredTensor
from deepseek_trt.export.text.wording import shown

Updates = dict[str, tuple[LowRank, ...]]


def updates_of_experts(
    at: str, b: StoredTensor, a: StoredTensor, tensors: Mapping[str, StoredTensor], config: LoraConfig
) -> Updates:
    """The updates of every weight that the pair changes, whether the checkpoint stacks its experts or not.

    `at` is the published name of the experts. Raises CheckpointError where the pair fits none of their weights.
    """
    experts, inner, hidden = _sizes(at, b, tensors)
    sizes = a.shape[1], b.shape[0]
    if sizes == (hidden, 2 * inner):
        name, projections = "gate_up_proj", {"gate_proj": range(inner), "up_proj": range(inner, 2 * inner)}
    elif sizes == (inner, hidden):
        name, projections = "down_proj", {"down_proj": range(hidden)}
    else:
        raise _misfit(b, f"takes {sizes[0]} and gives {sizes[1]}, the experts are of {hidden} and {inner}")
    key = f"{at}.{name}"
    rank = config.rank_of(key)
    if not config.has_parameter(key) or a.shape[0] != experts * rank or b.shape[1] != experts * rank:
        raise _misfit(b, f"is not of {experts} experts of rank {rank}, as adapter_config.json says of {key}")

    def update(expert: int, rows: range | None) -> LowRank:
        left = Factor(b, rows, range(expert, experts * rank, experts))
        return LowRank(left, Factor(a, range(expert * rank, (expert + 1) * rank)), config.scale_of(key))

    if key in tensors:
        return {key: tuple(update(expert, None) for expert in range(experts))}
    return {
        f"{at}.{expert}.{projection}.weight": (update(expert, rows),)
        for projection, rows in projections.items()
        for expert in range(experts)
    }


def _sizes(at: str, b: StoredTensor, tensors: Mapping[str, StoredTensor]) -> tuple[int, int, int]:
    """Experts, their inner width, and the hidden one."""
    stacked, first = tensors.get(f"{at}.down_proj"), tensors.get(f"{at}.0.down_proj.weight")
    if stacked is not None and len(stacked.shape) == 3:
        return stacked.shape[0], stacked.shape[2], stacked.shape[1]
    if first is None or len(first.shape) != 2:
        raise _misfit(b, f"is for {at}, which the checkpoint does not hold")
    count = sum(name.startswith(f"{at}.") and name.endswith(".down_proj.weight") for name in tensors)
    return count, first.shape[1], first.shape[0]


def _misfit(tensor: StoredTensor, what: str) -> CheckpointError:
    mend = "give the checkpoint that the adapter was trained on"
    return CheckpointError(f"adapter tensor {shown(tensor.name)} {what}: {mend}")
