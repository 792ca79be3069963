"""Train the small DeepSeek-V2 of `cli/demo_model` on the standard library's docstrings; write it as DeepSeek would.

Example: python examples/train_demo_model.py --out cli/demo_model --steps 800
"""

import ast
import hashlib
import json
import math
import platform
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import safetensors
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
BOS_ID, EOS_ID = 0, 1

# One step in LONG_EVERY sees long windows, so that positions past 256 are trained too. Both shapes hold 2048 tokens.
SHORT_SHAPE, LONG_SHAPE, LONG_EVERY = (8, 256), (2, 1024), 8  # (windows, tokens in a window)
ADAM_RATE, MUON_RATE, WARMUP_STEPS, WEIGHT_DECAY = 5e-3, 0.02, 50, 0.1
HELD_OUT_ONE_IN = 20
PROMPTS = ("Return the", "The number of")

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.003,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "kv_lora_rank": 64,
    "max_position_embeddings": 2048,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 512,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": transformers.__version__,
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 4096,
}
GENERATION_CONFIG: dict[str, Any] = {"_from_model_config": True, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

ADDED = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
# As DeepSeek labels its tokenizers: byte-level BPE under the name of Llama's class.
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": ADDED | {"content": BOS},
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": ADDED | {"content": EOS},
    "legacy": True,
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": ADDED | {"content": EOS},
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizerFast",
    "unk_token": None,
}


@dataclass(frozen=True)
class Figures:
    """What one run measured; perplexities are per token on the held-out modules, in float32 of the saved weights."""

    train_tokens: int
    held_out_tokens: int
    seen_tokens: int
    seconds: float
    perplexity: float
    long_perplexity: float
    unigram_perplexity: float
    expert_shares: list[tuple[float, float]]  # (least, most) used expert of each MoE layer
    samples: list[str]


def walk_docstrings() -> Iterator[tuple[str, str]]:
    """Yield (top-level module name, docstring) in sorted file order, each text once; `test` is not on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and text not in seen:
                    seen.add(text)
                    yield parts[0], text


def is_held_out(module: str) -> bool:
    """Choose whole top-level modules by a hash of their name, so that the split is the same on every machine."""
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE over the full byte alphabet (any text round-trips); BOS comes first in every encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


def encode_stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Join the texts to one stream of ids [N], each as BOS, text, EOS."""
    return torch.tensor([token for text in texts for token in [*tokenizer.encode(text).ids, EOS_ID]])


def sample_windows(stream: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Draw windows [B, L + 1]: half begin with a docstring as generation does, half anywhere to reach long texts."""
    count, length = shape
    last = len(stream) - length - 1
    heads = (stream[:last] == BOS_ID).nonzero().squeeze(1)
    starts = torch.cat([heads[torch.randint(len(heads), (count // 2,))], torch.randint(last, (count - count // 2,))])
    return torch.stack([stream[start : start + length + 1] for start in starts.tolist()])


def next_token_loss(model: DeepseekV2ForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; BOS is never a target, for it follows EOS with certainty."""
    logits: torch.Tensor = model(input_ids=windows[:, :-1], use_cache=False).logits  # [B, L, V]
    loss: torch.Tensor = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), ignore_index=BOS_ID)
    return loss


def record_routing(model: DeepseekV2ForCausalLM) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Collect (logits [B*L, E], chosen experts [B*L, K]) of each MoE layer into the list returned, at every forward."""
    routing: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers[CONFIG["first_k_dense_replace"] :]:
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, out: routing.append((out[0], out[2])))
    return routing


def balance_loss(logits: torch.Tensor, chosen: torch.Tensor, windows: int) -> torch.Tensor:
    """Expert-level balance loss of the DeepSeek-V2 paper (equation 23), a sequence at a time as `seq_aux` says."""
    experts = CONFIG["n_routed_experts"]
    share = F.one_hot(chosen, experts).float().mean(1).view(windows, -1, experts).mean(1) * experts  # f_i, [B, E]
    probability = logits.softmax(-1).view(windows, -1, experts).mean(1)  # P_i, [B, E]
    loss: torch.Tensor = (share * probability).sum(-1).mean()
    return loss


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """Push the singular values of each matrix [..., R, C] towards 1 by five Newton-Schulz steps, as Muon does."""
    tall = update.shape[-2] > update.shape[-1]
    matrix: torch.Tensor = update.mT if tall else update
    matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = matrix @ matrix.mT
        matrix = 3.4445 * matrix + (2.0315 * gram @ gram - 4.7750 * gram) @ matrix
    result: torch.Tensor = matrix.mT if tall else matrix
    return result


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates; unlike torch's own it takes stacked experts [E, R, C] too."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(average, group["momentum"]))
                scale = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.mul_(1 - group["lr"] * WEIGHT_DECAY).add_(update, alpha=-group["lr"] * scale)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to nearly zero."""
    return min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def train_model(stream: torch.Tensor, held_out: torch.Tensor, steps: int) -> DeepseekV2ForCausalLM:
    """Train in float32 with Muon for the layers' matrices and AdamW for all else, from the global seed."""
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**CONFIG | {"torch_dtype": "float32"}))
    model.set_experts_implementation("grouped_mm")  # the fastest on a CPU, measured
    routing = record_routing(model)
    named = list(model.model.layers.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim > 1 and not name.endswith("gate.weight")]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    optimizers: tuple[torch.optim.Optimizer, ...] = (Muon(matrices, lr=MUON_RATE), adam)
    schedules = [LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps)) for optimizer in optimizers]
    for step in range(1, steps + 1):
        windows = sample_windows(stream, LONG_SHAPE if step % LONG_EVERY == 0 else SHORT_SHAPE)
        loss = next_token_loss(model, windows)
        balance = torch.stack([balance_loss(*layer, len(windows)) for layer in routing]).sum()
        routing.clear()
        model.zero_grad()
        (loss + CONFIG["aux_loss_alpha"] * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 100 == 0 or step == steps:
            measured = held_out_perplexity(model, held_out, SHORT_SHAPE[1])
            routing.clear()
            click.echo(f"step {step}/{steps} loss {loss:.3f} balance {balance:.2f} held out {measured:.1f}", err=True)
    return model


def cut_windows(stream: torch.Tensor, length: int) -> torch.Tensor:
    """All windows [W, length + 1] of the stream, none sharing a target; the rest is left out."""
    return stream[: (len(stream) - 1) // length * length + 1].unfold(0, length + 1, length)


@torch.no_grad()
def held_out_perplexity(model: DeepseekV2ForCausalLM, stream: torch.Tensor, length: int) -> float:
    """Perplexity per token over windows of `length` tokens, each seen without what came before it."""
    total, count = 0.0, 0
    for windows in torch.split(cut_windows(stream, length), 8):
        targets = int((windows[:, 1:] != BOS_ID).sum())
        total += float(next_token_loss(model, windows)) * targets
        count += targets
    return math.exp(total / count)


def unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Perplexity of the training split's token counts (plus one each) on the targets of `held_out_perplexity`."""
    counts = torch.bincount(train[train != BOS_ID], minlength=CONFIG["vocab_size"]).double() + 1
    counts[BOS_ID] = 0
    targets = cut_windows(held_out, SHORT_SHAPE[1])[:, 1:].flatten()
    return math.exp(-(counts / counts.sum())[targets[targets != BOS_ID]].log().mean())


def generate_samples(model: DeepseekV2ForCausalLM, tokenizer: Tokenizer) -> list[str]:
    """Continue each prompt greedily by up to 40 tokens."""
    samples = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        samples.append(tokenizer.decode(output[0].tolist()))
    return samples


def published_tensors(model: DeepseekV2ForCausalLM) -> dict[str, torch.Tensor]:
    """Return the weights in bfloat16 under DeepSeek's names: transformers' stacked experts become one tensor each."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        stem, _, kind = name.rpartition(".experts.")
        for expert, weight in enumerate(value.bfloat16() if stem else []):  # [2I, H] or [H, I]
            halves = weight.chunk(2) if kind == "gate_up_proj" else [weight]
            for part, half in zip(kind.removesuffix("_proj").split("_"), halves, strict=True):
                tensors[f"{stem}.experts.{expert}.{part}_proj.weight"] = half.contiguous()
        if not stem:
            tensors[name] = value.bfloat16()
    return tensors


def save_checkpoint(model: DeepseekV2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, tokenizer, two bfloat16 shards and their index."""
    tensors = published_tensors(model)
    total = sum(t.nbytes for t in tensors.values())
    shards: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    written = 0
    for name, tensor in tensors.items():
        shards[written >= total / 2][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_checkpoint(folder: Path) -> DeepseekV2ForCausalLM:
    """Load the saved files as any user would, in float32; a missing or unexpected tensor is an error."""
    loaded: Any = DeepseekV2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model: DeepseekV2ForCausalLM = loaded[0]
    wrong = {key: sorted(names) for key, names in loaded[1].items() if names}
    if wrong:
        raise RuntimeError(f"the saved checkpoint does not load cleanly: {wrong}")
    return model


@torch.no_grad()
def measure_expert_shares(model: DeepseekV2ForCausalLM, stream: torch.Tensor) -> list[tuple[float, float]]:
    """Measure the least and most used expert of each MoE layer, as shares of all choices on the held-out text."""
    routing = record_routing(model)
    for windows in torch.split(cut_windows(stream, SHORT_SHAPE[1]), 8):
        model(input_ids=windows[:, :-1], use_cache=False)
    layers, experts = CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"], CONFIG["n_routed_experts"]
    chosen = [torch.cat([ids.flatten() for _, ids in routing[layer::layers]]) for layer in range(layers)]
    shares = [(ids.bincount(minlength=experts) / len(ids)).tolist() for ids in chosen]
    return [(min(share), max(share)) for share in shares]


def processor_name() -> str:
    """Return the processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def render_readme(figures: Figures, steps: int, seed: int, threads: int) -> str:
    """Compose the text beside the model: what it is and what this run measured."""
    experts, shared, first = (CONFIG[key] for key in ("n_routed_experts", "n_shared_experts", "first_k_dense_replace"))
    short, long = SHORT_SHAPE[1], LONG_SHAPE[1]
    options = f"--steps {steps} --seed {seed} --threads {threads}"
    rows = enumerate(figures.expert_shares, first)
    shares = "\n".join(f"| {layer} | {low:.1%} | {high:.1%} |" for layer, (low, high) in rows)
    samples = "\n\n".join(f"```text\n{sample}\n```" for sample in figures.samples)
    return f"""# Demo model

A small DeepSeek-V2 in the form DeepSeek publishes: bfloat16 shards, one tensor an expert, `tokenizer.json`. It has
multi-head latent attention with YaRN and group-limited routing over {experts} experts beside {shared} shared ones.
It was trained on the docstrings of Python's standard library, and serves to try the tool without a download. It writes
text that looks like docstrings and knows nothing; the chat template is there to be tried, the model was not trained to
chat.

| Measured on modules held out from training | Perplexity per token |
|---|---|
| this model, windows of {short} tokens | {figures.perplexity:.2f} |
| this model, windows of {long} tokens | {figures.long_perplexity:.2f} |
| token frequencies of the training split (unigram, add one) | {figures.unigram_perplexity:.2f} |

Perplexities are those of the saved bfloat16 weights, loaded again and run in float32. The first token of a window and
every beginning-of-sentence token are context only.

Use of the routed experts on the same text, as shares of a layer's choices (even: {1 / experts:.2%}):

| Layer | Least used expert | Most used expert |
|---|---|---|
{shares}

Greedy continuations of {" and ".join(f"`{prompt}`" for prompt in PROMPTS)}:

{samples}

## How it was made

    python examples/train_demo_model.py --out cli/demo_model {options}

- {steps} steps over {figures.seen_tokens:,} tokens (drawn with repetition) in {figures.seconds / 60:.1f} minutes
- {threads} CPU thread{"s" * (threads > 1)}, {processor_name()} ({platform.machine()})
- {figures.train_tokens:,} tokens in the training split, {figures.held_out_tokens:,} in the held-out modules
- Python {platform.python_version()} (its standard library is the text), torch {torch.__version__},
  transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, safetensors {safetensors.__version__}

Another Python version has other docstrings, and another processor rounds otherwise: expect close figures, not equal
bytes.

Licensed as the project. The text source, the docstrings of Python's standard library, is under the PSF licence.
"""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint.")
@click.option("--steps", default=800, show_default=True, help="Optimizer steps of 2048 tokens.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and batches.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(out: Path, steps: int, seed: int, threads: int) -> None:
    """Train the demo model and write its checkpoint; each file is replaced whole once all are written.

    Example: python examples/train_demo_model.py --out cli/demo_model --steps 800
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    texts = list(walk_docstrings())
    train_texts = [text for module, text in texts if not is_held_out(module)]
    tokenizer = train_tokenizer(train_texts)
    train = encode_stream(tokenizer, train_texts)
    held_out = encode_stream(tokenizer, [text for module, text in texts if is_held_out(module)])
    click.echo(f"{len(train):,} tokens to train on, {len(held_out):,} held out", err=True)
    started = time.perf_counter()
    trained = train_model(train, held_out, steps)
    seconds = time.perf_counter() - started
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch)
        save_checkpoint(trained, tokenizer, folder)
        model = load_checkpoint(folder)
        figures = Figures(
            train_tokens=len(train),
            held_out_tokens=len(held_out),
            seen_tokens=steps * math.prod(SHORT_SHAPE),
            seconds=seconds,
            perplexity=held_out_perplexity(model, held_out, SHORT_SHAPE[1]),
            long_perplexity=held_out_perplexity(model, held_out, LONG_SHAPE[1]),
            unigram_perplexity=unigram_perplexity(train, held_out),
            expert_shares=measure_expert_shares(model, held_out),
            samples=generate_samples(model, tokenizer),
        )
        (folder / "README.md").write_text(render_readme(figures, steps, seed, threads), encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)
            file.replace(out / file.name)
    click.echo(f"wrote {out}: perplexity {figures.perplexity:.2f} against {figures.unigram_perplexity:.2f}", err=True)


if __name__ == "__main__":
    main()
