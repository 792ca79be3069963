"""Make a checkpoint with the published names, shapes and shards, as sparse files: it takes no disk and reads as zeros.

    python benchmarks/make_checkpoint.py v2-lite ./v2-lite
    python benchmarks/make_checkpoint.py v3 ./v3 --layers 5

`v3` and `kimi-k2` are made as published, in fp8 with block scales and, for v3, one layer of multi-token prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Config = dict[str, Any]
Tensor = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape

BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
BLOCK = 128

_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_COMMON: Config = {
    **_MLA,
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
V2_LITE: Config = {
    **_COMMON,
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
    "rope_scaling": _YARN,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
V2: Config = {
    **V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}
_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
V3: Config = {
    **_COMMON,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": _FP8,
}
MOONLIGHT: Config = {
    **{key: value for key, value in V3.items() if key not in ("quantization_config", "rope_scaling")},
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
}
KIMI_K2: Config = {
    **V3,
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "rope_theta": 50000,
    "rope_scaling": {**_YARN, "factor": 32, "beta_fast": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "bos_token_id": 163584,
    "eos_token_id": 163585,
}


@dataclass(frozen=True)
class Published:
    """A published model: its config.json, how many shards it comes in, and how they are named."""

    config: Config
    shards: int
    file_name: str = "model-{:05d}-of-{:06d}.safetensors"


PUBLISHED = {
    "v2-lite": Published(V2_LITE, 4),
    "v2": Published(V2, 55),
    "v3": Published(V3, 163),
    "moonlight": Published(MOONLIGHT, 27, "model-{:05d}-of-{:05d}.safetensors"),
    "kimi-k2": Published(KIMI_K2, 61, "model-{}-of-{}.safetensors"),
}


def tensors_of(config: Config) -> Iterator[Tensor]:
    """Names, dtypes and shapes as the published checkpoint holds them, layer by layer."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
    extra = config.get("num_nextn_predict_layers", 0)
    for index in range(config["num_hidden_layers"] + extra):
        layer = f"model.layers.{index}"
        yield from _attention(f"{layer}.self_attn", config)
        moe = index >= config["first_k_dense_replace"] and index % config["moe_layer_freq"] == 0
        yield from _moe(f"{layer}.mlp", config) if moe else _mlp(f"{layer}.mlp", config, config["intermediate_size"])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", "BF16", (hidden,)
        if index >= config["num_hidden_layers"]:
            yield f"{layer}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{layer}.{norm}.weight", "BF16", (hidden,)
            for copied in ("embed_tokens", "shared_head.head"):
                yield f"{layer}.{copied}.weight", "BF16", (vocab, hidden)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (vocab, hidden)


def _attention(at: str, c: Config) -> Iterator[Tensor]:
    heads, rank, rope = c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    queries = heads * (c["qk_nope_head_dim"] + rope)
    if c["q_lora_rank"] is None:
        yield from _linear(f"{at}.q_proj", c, queries, c["hidden_size"])
    else:
        yield from _linear(f"{at}.q_a_proj", c, c["q_lora_rank"], c["hidden_size"])
        yield f"{at}.q_a_layernorm.weight", "BF16", (c["q_lora_rank"],)
        yield from _linear(f"{at}.q_b_proj", c, queries, c["q_lora_rank"])
    yield from _linear(f"{at}.kv_a_proj_with_mqa", c, rank + rope, c["hidden_size"])
    yield f"{at}.kv_a_layernorm.weight", "BF16", (rank,)
    yield from _linear(f"{at}.kv_b_proj", c, heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank)
    yield from _linear(f"{at}.o_proj", c, c["hidden_size"], heads * c["v_head_dim"])


def _moe(at: str, c: Config) -> Iterator[Tensor]:
    yield f"{at}.gate.weight", "BF16", (c["n_routed_experts"], c["hidden_size"])
    if c["topk_method"] == "noaux_tc":
        yield f"{at}.gate.e_score_correction_bias", "F32", (c["n_routed_experts"],)
    for expert in range(c["n_routed_experts"]):
        yield from _mlp(f"{at}.experts.{expert}", c, c["moe_intermediate_size"])
    yield from _mlp(f"{at}.shared_experts", c, c["n_shared_experts"] * c["moe_intermediate_size"])


def _mlp(at: str, c: Config, width: int) -> Iterator[Tensor]:
    yield from _linear(f"{at}.gate_proj", c, width, c["hidden_size"])
    yield from _linear(f"{at}.up_proj", c, width, c["hidden_size"])
    yield from _linear(f"{at}.down_proj", c, c["hidden_size"], width)


def _linear(at: str, c: Config, rows: int, columns: int) -> Iterator[Tensor]:
    if "quantization_config" not in c:
        yield f"{at}.weight", "BF16", (rows, columns)
        return
    yield f"{at}.weight", "F8_E4M3", (rows, columns)
    yield f"{at}.weight_scale_inv", "F32", (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))


def nbytes(tensor: Tensor) -> int:
    _, dtype, shape = tensor
    return BYTES[dtype] * math.prod(shape)


def write_sparse(published: Published, out: Path) -> int:
    """Write config.json, index and shards of about equal size; returns the bytes that the tensors seem to hold."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = list(tensors_of(published.config))
    total, done = sum(map(nbytes, tensors)), 0
    shards: list[list[Tensor]] = [[] for _ in range(published.shards)]
    for tensor in tensors:
        shards[min(done * published.shards // total, published.shards - 1)].append(tensor)
        done += nbytes(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = published.file_name.format(number, published.shards)
        _write_shard(out / file, shard)
        weight_map.update({name: file for name, _, _ in shard})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(published.config, indent=2), encoding="utf-8")
    return total


def _write_shard(path: Path, tensors: list[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        name, dtype, shape = tensor
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes(tensor)]}
        offset += nbytes(tensor)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)


def fill_random(folder: Path, layers: Collection[int], seed: int = 0) -> None:
    """Put random numbers into the given layers and into all that is no layer; the other layers keep reading as zeros.

    bfloat16 only. Norms lie around one; rows of matrices have the length of one, so that states keep their size.
    """
    rng = np.random.default_rng(seed)
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("r+b") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
            for name, entry in header.items():
                layer = re.match(r"model\.layers\.(\d+)\.", name)
                if name != "__metadata__" and (layer is None or int(layer[1]) in layers):
                    assert entry["dtype"] == "BF16", name
                    stream.seek(8 + length + entry["data_offsets"][0])
                    stream.write(_random(rng, entry["shape"]))


def _random(rng: np.random.Generator, shape: list[int]) -> bytes:
    """Normal numbers in bfloat16: the upper halves of float32."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    values = 1 + 0.2 * noise if len(shape) == 1 else noise / np.float32(math.sqrt(shape[-1]))
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def reduced(published: Published, layers: int | None = None, experts: int | None = None) -> Published:
    """The same model with fewer layers or routed experts."""
    changes: Config = {}
    if layers is not None:
        changes["num_hidden_layers"] = layers
    if experts is not None:
        changes["n_routed_experts"] = experts
    return Published({**published.config, **changes}, published.shards, published.file_name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=PUBLISHED)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="only so many decoder layers")
    parser.add_argument("--experts", type=int, help="only so many routed experts per layer")
    args = parser.parse_args()
    total = write_sparse(reduced(PUBLISHED[args.model], args.layers, args.experts), args.out)
    print(f"{args.out}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
