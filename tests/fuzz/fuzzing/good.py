"""The good files that are damaged: a small checkpoint in three shards, its tokenizer, an adapter."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

TESTS = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 288,
    "hidden_size": 16,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "topk_method": "group_limited_greedy",
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
    "scoring_func": "softmax",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
V3: dict[str, Any] = {
    **CONFIG,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
del V3["rope_scaling"]
CLASSIFIER: dict[str, Any] = {
    **CONFIG,
    "architectures": ["DeepseekV2ForSequenceClassification"],
    "id2label": {"0": "bad", "1": "so so", "2": "good"},
    "label2id": {"bad": 0, "so so": 1, "good": 2},
    "problem_type": "single_label_classification",
    "pad_token_id": 3,
}
TEXTS = ("hello world", "Wie geht's? 12,345", "<bos>depth é\n\n\t<user>x", "  def f(x):\n    return x")
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "eos_token_id": [1, 2]}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<user>' + message['content'] | trim }}{% else %}{{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "1"},
]


@cache
def _weights() -> Any:
    spec = importlib.util.spec_from_file_location("weights_of_tests", TESTS / "export" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["weights_of_tests"] = module
    spec.loader.exec_module(module)
    return module


def tensors_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random float32 weights under the published names."""
    return dict(_weights().random_weights(dict(_weights().shapes_of(config))))


def sharded(tensors: dict[str, torch.Tensor], count: int = 3) -> dict[str, bytes]:
    """The shards and their index, by file name."""
    names, files = list(tensors), [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    parts = {file: {name: tensors[name] for name in names[i::count]} for i, file in enumerate(files)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    where = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": size}, "weight_map": where}
    return {
        **{file: save(part, metadata={"format": "pt"}) for file, part in parts.items()},
        "model.safetensors.index.json": dumped(index),
    }


def one_file(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {"model.safetensors": save(tensors, metadata={"format": "pt"})}


def dumped(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


@cache
def tokenizer() -> bytes:
    """A byte-level BPE of 288 tokens, four of them special, as DeepSeek's are built."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = ("<bos>", "<eos>", "<user>", "<assistant>")
    special = [AddedToken(text, normalized=False, special=True) for text in names]
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*TEXTS, "the number of the words in the world"], trainer)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return made.to_str().encode()


def text_files() -> dict[str, bytes]:
    token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {str(i): {"content": text, **token} for i, text in enumerate(("<bos>", "<eos>", "<user>", "<assistant>"))}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": {},
    }
    return {
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": dumped(config),
        "special_tokens_map.json": dumped({"bos_token": "<bos>", "eos_token": {"content": "<eos>", **token}}),
        "generation_config.json": dumped(GENERATION),
        "chat_template.jinja": TEMPLATE.encode(),
    }


def adapter_files() -> dict[str, bytes]:
    """LoRA on two modules of both layers, one of its own rank, and a norm that was trained whole."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 2,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": ["q_b_proj", "o_proj"],
        "exclude_modules": None,
        "modules_to_save": ["norm"],
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {"layers.1.self_attn.o_proj": 3},
        "alpha_pattern": {"q_b_proj": 5},
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    generator, base, found = torch.Generator().manual_seed(1), tensors_of(CONFIG), {}
    for layer in range(2):
        for module in ("q_b_proj", "o_proj"):
            at = f"model.layers.{layer}.self_attn.{module}"
            rows, columns = base[f"{at}.weight"].shape
            rank = 3 if (layer, module) == (1, "o_proj") else 2
            found[f"base_model.model.{at}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            found[f"base_model.model.{at}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    found["base_model.model.model.norm.weight"] = torch.ones(16)
    return {"adapter_config.json": dumped(config), "adapter_model.safetensors": save(found, metadata={"format": "pt"})}


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write these files, and take away all others."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for name, data in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)
