"""Packed checkpoints in small, and the numbers that they hold; each packer by the writers' own sources.

compressed-tensors 0.20 (compressors/pack_quantized), AutoGPTQ and GPTQModel (QuantLinear.pack), AutoAWQ 0.2.9
(modules/linear/gemm.py). Dequantised is (code - zero point) * scale in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE

SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32, "v_head_dim": 16}
SIZES |= {"kv_lora_rank": 32}
LAYER = "model.layers.1.mlp.experts"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Packing:
    """How modules are packed: `kind` is one of _PACKERS (plain: a code a byte); group None is a row."""

    kind: str
    bits: int = 4
    group: int | None = 32
    symmetric: bool = True
    scales: torch.dtype = torch.float16
    seed: int = 0

    def config(self, **changes: Any) -> dict[str, Any]:
        """The quantization_config that the writers put into config.json."""
        size = -1 if self.group is None else self.group
        if self.kind in ("gptq", "gptq_v2"):
            settings: dict[str, Any] = {"quant_method": "gptq", "bits": self.bits, "group_size": size}
            settings |= {"sym": self.symmetric, "desc_act": False, "checkpoint_format": self.kind}
            settings |= {"damp_percent": 0.01, "true_sequential": True, "lm_head": False, "pack_dtype": "int32"}
        elif self.kind == "awq":
            settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
            settings |= {"modules_to_not_convert": ["kv_b_proj", "lm_head"]}
        else:
            weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False}
            weights |= {"strategy": "channel" if self.group is None else "group", "group_size": self.group}
            weights |= {"observer": "minmax", "actorder": None, "block_structure": None, "observer_kwargs": {}}
            form = "pack-quantized" if self.kind == "compressed" else "int-quantized"
            group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
            settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
            settings |= {"ignore": ["lm_head", "re:.*kv_b_proj"], "quantization_status": "compressed"}
            settings |= {"kv_cache_scheme": None, "global_compression_ratio": 1.5, "version": "0.12.3"}
        return settings | changes


KINDS: dict[str, dict[str, Any]] = {  # by names that begin with the method's
    "compressed-tensors": {"kind": "compressed"},
    "compressed-tensors, groups of 64": {"kind": "compressed", "group": 64, "scales": torch.bfloat16},
    "compressed-tensors, rows": {"kind": "compressed", "group": None},
    "compressed-tensors, zero points": {"kind": "compressed", "symmetric": False},
    "compressed-tensors, 8 bits": {"kind": "compressed", "bits": 8, "group": 128},
    "compressed-tensors, a code a byte": {"kind": "plain", "bits": 8, "group": None, "scales": torch.bfloat16},
    "compressed-tensors, a code a byte, zero points": {"kind": "plain", "bits": 8, "symmetric": False},
    "GPTQ": {"kind": "gptq", "group": 32},
    "GPTQ, zero points": {"kind": "gptq", "group": 64, "symmetric": False},
    "GPTQ, 8 bits": {"kind": "gptq", "bits": 8, "group": 128},
    "GPTQ, second format": {"kind": "gptq_v2", "symmetric": False},
    "GPTQ, rows": {"kind": "gptq", "group": None},
    "AWQ": {"kind": "awq", "group": 32, "symmetric": False},
    "AWQ, groups of 64": {"kind": "awq", "group": 64, "symmetric": False, "scales": torch.bfloat16},
}


def linear(module: str) -> bool:
    """What the published ones pack: linear layers but kv_b_proj and the head."""
    return "_proj" in module and "kv_b_proj" not in module


@dataclass
class Packed:
    """Tensors as they are saved, and the numbers of each packed module in float32."""

    tensors: Tensors
    numbers: Tensors = field(default_factory=dict)


def pack(weights: Tensors, packing: Packing, wanted: Callable[[str], bool]) -> Packed:
    """Pack the modules that are wanted: codes are random, as are zero points and scales."""
    made = Packed({name: tensor for name, tensor in weights.items() if not _is_wanted(name, wanted)})
    generator = torch.Generator().manual_seed(packing.seed)
    for name in weights:
        if _is_wanted(name, wanted):
            module = name.removesuffix(".weight")
            parts, numbers = packed(tuple(weights[name].shape), packing, generator)
            made.tensors |= {f"{module}.{ending}": tensor for ending, tensor in parts.items()}
            made.numbers[name] = numbers
    return made


def _is_wanted(name: str, wanted: Callable[[str], bool]) -> bool:
    return name.endswith(".weight") and wanted(name.removesuffix(".weight"))


def packed(shape: tuple[int, int], packing: Packing, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a weight [N, K], and its numbers."""
    rows, columns = shape
    group = packing.group or columns
    groups, most = -(-columns // group), 2**packing.bits
    codes = torch.randint(0, most, shape, generator=generator)
    zeros = torch.full((rows, groups), most // 2)
    if not packing.symmetric:
        # those of 8 bits leave the middle by so much as int8 can hold; GPTQ's first format has no zero point of 0
        low, high = (0, 0) if packing.bits == 8 else (-most // 2 + 1, most // 2 - 1)
        zeros += torch.randint(low, high + 1, zeros.shape, generator=generator)
    scales = (torch.rand(zeros.shape, generator=generator) + 0.5) / most / columns**0.5
    scales = scales.to(packing.scales)
    spread = [t.repeat_interleave(group, 1)[:, :columns] for t in (zeros, scales.float())]
    numbers = (codes - spread[0]).float() * spread[1]
    return _PACKERS[packing.kind](codes, zeros, scales, packing), numbers


def _compressed(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, packing: Packing) -> Tensors:
    made = {
        "weight_packed": words(codes, packing.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not packing.symmetric:
        made["weight_zero_point"] = words(zeros.T, packing.bits).T.contiguous()
    return made


def _plain(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, packing: Packing) -> Tensors:
    made = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
    return made if packing.symmetric else made | {"weight_zero_point": (zeros - 128).to(torch.int8)}


def _gptq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, packing: Packing) -> Tensors:
    group = packing.group or codes.shape[1]
    less = 1 if packing.kind == "gptq" else 0
    return {
        "qweight": words(codes, packing.bits).T.contiguous(),
        "qzeros": words(zeros.T - less, packing.bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // group,
    }


def _awq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, packing: Packing) -> Tensors:
    return {
        "qweight": words(codes.T, 4, AWQ_ORDER),
        "qzeros": words(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }


_PACKERS = {"compressed": _compressed, "plain": _plain, "gptq": _gptq, "gptq_v2": _gptq, "awq": _awq}


def words(numbers: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Integers of 32 bits along the last dim: of each the lowest bits are the number that `order` names first."""
    each = 32 // bits
    order = order or tuple(range(each))
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % each)).reshape(len(numbers), -1, each)
    made = sum(padded[:, :, number] << (bits * place) for place, number in enumerate(order))
    return torch.where(made >= 2**31, made - 2**32, made).to(torch.int32).contiguous()


def widened(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The numbers of a graph tensor in float32, unpacked by code of this file alone."""
    if f"{name}_scale" not in tensors:
        return tensors[name].float()
    codes, scales = tensors[name], tensors[f"{name}_scale"].float()
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes % 16, codes.div(16, rounding_mode="floor")], -1).flatten(-2).float() - 8
    return codes.float() * scales.repeat_interleave(32, -1)


def expected(weights: dict[str, torch.Tensor], name: str, raw: dict[str, Any]) -> torch.Tensor:
    """A graph tensor's numbers by those of published names."""
    if name.startswith(LAYER):
        stack = name.rpartition(".")[2]
        return torch.stack([weights[f"{LAYER}.{e}.{stack}.weight"] for e in range(raw["n_routed_experts"])])
    if name.endswith(("w_uk", "w_uv")):
        both = weights[f"{name.rpartition('.')[0]}.kv_b_proj.weight"].unflatten(0, (raw["num_attention_heads"], -1))
        nope = raw["qk_nope_head_dim"]
        return both[:, :nope] if name.endswith("w_uk") else both[:, nope:]
    return weights[name]


def check_equal(bundle: Path, checkpoint: Path, result: Any) -> dict[str, torch.Tensor]:
    """Every number of the bundle's file is the checkpoint's, bit by bit."""
    raw, tensors = json.loads((checkpoint / "config.json").read_text()), load_file(bundle / WEIGHTS_FILE)
    weights = result.tensors | result.numbers
    for name in tensors:
        if not name.endswith("_scale"):
            found, wanted = widened(tensors, name), expected(weights, name, raw)
            assert torch.equal(found.view(torch.int32), wanted.float().view(torch.int32)), name
    return tensors
