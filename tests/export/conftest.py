"""Random checkpoints of any configuration, under the published names, and the numpy model they are compared with."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

TESTS = Path(__file__).parents[1]


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[file.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """tests/reference/deepseek.py, the numpy float64 model."""
    return _load(TESTS / "reference" / "deepseek.py")


@pytest.fixture(scope="session")
def make_checkpoint() -> ModuleType:
    """benchmarks/make_checkpoint.py, which knows the published shapes and writes sparse checkpoints."""
    return _load(TESTS.parent / "benchmarks" / "make_checkpoint.py")


def shapes_of(c: dict[str, Any], stacked: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published names and shapes of a written-out config.json."""
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]

    def linear(at: str, rows: int, columns: int, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{at}.weight", (rows, columns)
        if bias:
            yield f"{at}.bias", (rows,)

    def mlp(at: str, width: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from linear(f"{at}.gate_proj", width, hidden, bias)
        yield from linear(f"{at}.up_proj", width, hidden, bias)
        yield from linear(f"{at}.down_proj", hidden, width, bias)

    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        at, bias, mlp_bias = f"model.layers.{layer}", c.get("attention_bias", False), c.get("mlp_bias", False)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        a = f"{at}.self_attn"
        if c["q_lora_rank"] is None:
            yield from linear(f"{a}.q_proj", heads * (nope + rope), hidden)
        else:
            yield from linear(f"{a}.q_a_proj", c["q_lora_rank"], hidden, bias)
            yield f"{a}.q_a_layernorm.weight", (c["q_lora_rank"],)
            yield from linear(f"{a}.q_b_proj", heads * (nope + rope), c["q_lora_rank"])
        yield from linear(f"{a}.kv_a_proj_with_mqa", rank + rope, hidden, bias)
        yield f"{a}.kv_a_layernorm.weight", (rank,)
        yield from linear(f"{a}.kv_b_proj", heads * (nope + value), rank)
        yield from linear(f"{a}.o_proj", hidden, heads * value, bias)
        experts, inner = c.get("n_routed_experts"), c.get("moe_intermediate_size")
        sparse = experts and c.get("num_experts_per_tok")
        if not (sparse and layer >= c["first_k_dense_replace"] and layer % c.get("moe_layer_freq", 1) == 0):
            yield from mlp(f"{at}.mlp", c["intermediate_size"], mlp_bias)
            continue
        yield f"{at}.mlp.gate.weight", (experts, hidden)
        if c.get("topk_method") == "noaux_tc":
            yield f"{at}.mlp.gate.e_score_correction_bias", (experts,)
        if stacked:
            yield f"{at}.mlp.experts.gate_up_proj", (experts, 2 * inner, hidden)
            yield f"{at}.mlp.experts.down_proj", (experts, hidden, inner)
        else:
            for expert in range(experts):
                yield from mlp(f"{at}.mlp.experts.{expert}", inner, False)
        if c.get("n_shared_experts"):
            yield from mlp(f"{at}.mlp.shared_experts", c["n_shared_experts"] * inner, mlp_bias)
    yield "model.norm.weight", (hidden,)
    if not c.get("tie_word_embeddings"):
        yield "lm_head.weight", (c["vocab_size"], hidden)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights in float32 that keep activations near one, so that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1 + 0.2 * noise
        return noise * 0.3 if len(shape) == 1 else noise / math.sqrt(shape[-1])

    return {name: draw(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def weights_of() -> Callable[..., dict[str, torch.Tensor]]:
    """weights_of(raw, seed=0, stacked=False): random float32 tensors under the published names."""

    def make(raw: dict[str, Any], seed: int = 0, stacked: bool = False) -> dict[str, torch.Tensor]:
        return random_weights(dict(shapes_of(raw, stacked)), seed)

    return make


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    """save(folder, config, shards): write config.json, the shards {file: tensors} and their index."""

    def write(
        folder: Path, raw: dict[str, Any], shards: dict[str, dict[str, torch.Tensor]], index: bool = True
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        for file, tensors in shards.items():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
        if index:
            weight_map = {name: file for file, tensors in shards.items() for name in tensors}
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def float64_of() -> Callable[[dict[str, torch.Tensor]], dict[str, np.ndarray]]:
    """The tensors as the numpy model wants them; fp8 ones multiplied by their block scales."""

    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        out = {}
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv"):
                continue
            out[name] = tensor.double().numpy()
            scales = tensors.get(f"{name}_scale_inv")
            if scales is not None:
                big = scales.double().numpy().repeat(128, axis=0).repeat(128, axis=1)
                out[name] = out[name] * big[: tensor.shape[0], : tensor.shape[1]]
        return out

    return convert
