"""Write a float32 GGUF, as llama.cpp reads DeepSeek-V2 with latent attention, from a checkpoint of V2-Lite's kind.

    python benchmarks/gguf_file.py CHECKPOINT OUT.gguf      # needs the packages gguf and safetensors

What llama.cpp wants otherwise than the checkpoint has it: kv_b_proj in two, the key half transposed; the experts of a
layer stacked; one key head as wide as the latent; YaRN's mscale_all_dim times 0.1. It has no tokenizer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Read = Callable[[str], npt.NDArray[np.float32]]
Named = tuple[str, npt.NDArray[np.float32]]

_ATTENTION = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
}
_PARTS = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def tensors(config: dict[str, Any], read: Read) -> Iterator[Named]:
    """llama.cpp's names and arrays."""
    yield "token_embd.weight", read("model.embed_tokens.weight")
    yield "output_norm.weight", read("model.norm.weight")
    yield "output.weight", read("lm_head.weight")
    for index in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{index}", f"blk.{index}"
        for theirs, ours in _ATTENTION.items():
            yield f"{block}.{ours}.weight", read(f"{layer}.{theirs}.weight")
        yield from _key_and_value(config, block, read(f"{layer}.self_attn.kv_b_proj.weight"))
        if index < config["first_k_dense_replace"]:
            yield from ((f"{block}.{ours}.weight", read(f"{layer}.mlp.{p}.weight")) for p, ours in _PARTS.items())
        else:
            yield from _experts(config, block, f"{layer}.mlp", read)


def _key_and_value(config: dict[str, Any], block: str, kv_b: npt.NDArray[np.float32]) -> Iterator[Named]:
    split = kv_b.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])  # [H, nope + v, latent]
    nope = config["qk_nope_head_dim"]
    yield f"{block}.attn_k_b.weight", np.ascontiguousarray(split[:, :nope].transpose(0, 2, 1))
    yield f"{block}.attn_v_b.weight", np.ascontiguousarray(split[:, nope:])


def _experts(config: dict[str, Any], block: str, mlp: str, read: Read) -> Iterator[Named]:
    yield f"{block}.ffn_gate_inp.weight", read(f"{mlp}.gate.weight")
    for part, ours in _PARTS.items():
        yield f"{block}.{ours}_shexp.weight", read(f"{mlp}.shared_experts.{part}.weight")
        names = [f"{mlp}.experts.{e}.{part}.weight" for e in range(config["n_routed_experts"])]
        yield f"{block}.{ours}_exps.weight", np.stack([read(name) for name in names])


def add_facts(writer: Any, c: dict[str, Any]) -> None:
    latent, rope = c["kv_lora_rank"], c["qk_rope_head_dim"]
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(c["vocab_size"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(c.get("rms_norm_eps", 1e-6))
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(c["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_weights_scale(c["routed_scaling_factor"])
    _add_rope(writer, c, c["rope_scaling"])


def _add_rope(writer: Any, c: dict[str, Any], yarn: dict[str, Any]) -> None:
    writer.add_rope_dimension_count(c["qk_rope_head_dim"])
    writer.add_rope_freq_base(c.get("rope_theta", 10000.0))
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn["factor"])
    writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(yarn["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(yarn["beta_slow"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * yarn["mscale_all_dim"])


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Nothing is done where `out` is there already; it is named so once it is whole."""
    if out.exists():
        return
    config = json.loads((checkpoint / "config.json").read_text())
    places = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file: safe_open(checkpoint / file, "numpy") for file in set(places.values())}
    unfinished = out.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "deepseek2")
    add_facts(writer, config)
    for name, values in tensors(config, lambda name: shards[places[name]].get_tensor(name)):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write_gguf(args.checkpoint, args.out)


if __name__ == "__main__":
    main()
