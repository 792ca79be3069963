"""A DeepSeek-V2-Lite of random weights, small enough to be measured against others on a CPU: 430 million parameters.

    python benchmarks/mid_model.py CHECKPOINT

It keeps the 27 layers, the latent cache and the router of V2-Lite; hidden size, heads, experts and vocabulary are
smaller. Weights are float32, drawn from a seed, and scaled so that every layer's output and the logits are of order 1:
a wrong expert or position then shows in the logits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from make_checkpoint import V2_LITE, tensors_of
from safetensors.numpy import save_file

CONFIG = {
    **V2_LITE,
    "torch_dtype": "float32",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SEED, SHARDS = 20, 4


def random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Norms near 1, embeddings of variance 1, matrices of variance 1 / inputs."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.asarray(1 + 0.1 * values, np.float32)
    return values if "embed_tokens" in name else np.asarray(values * shape[1] ** -0.5, np.float32)


def write_checkpoint(out: Path) -> None:
    """Write config.json, index and safetensors; a checkpoint that is there already is left as it is."""
    if (out / "config.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    tensors = list(tensors_of(CONFIG))
    weight_map, size, total = {}, -(-len(tensors) // SHARDS), 0
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        shard = {name: random_tensor(rng, name, shape) for name, _, shape in tensors[number * size :][:size]}
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        total += sum(values.nbytes for values in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    # the last file: it says that the others are whole
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    write_checkpoint(parser.parse_args().checkpoint)


if __name__ == "__main__":
    main()
