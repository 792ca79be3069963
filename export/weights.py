"""Recipes: which checkpoint tensors make which graph tensor, and nothing left over unexplained."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_trt.export.checkpoint import DTYPE_NAMES, Checkpoint, StoredTensor
from deepseek_trt.export.config import ModelConfig
from deepseek_trt.export.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Piece:
    """Strips of rows of one checkpoint tensor, its leading dims flattened: `times` strips of `rows`, `step` apart."""

    source: str
    start: int
    rows: int
    step: int
    times: int

    def strips(self) -> Iterator[tuple[int, int]]:
        """(first row, rows) of each strip; strips that touch are one."""
        if self.step == self.rows:
            yield self.start, self.rows * self.times
            return
        for i in range(self.times):
            yield self.start + i * self.step, self.rows


@dataclass(frozen=True)
class Recipe:
    """One graph tensor: its name, its shape, and the pieces that lie one after the other in it."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Dropped:
    """A checkpoint tensor that no graph needs, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class WeightPlan:
    """All recipes of a model, and what is dropped. `dtype` is the one that the sources are stored in."""

    recipes: tuple[Recipe, ...]
    dropped: tuple[Dropped, ...]
    dtype: str


def config_of_tensors(config: ModelConfig, checkpoint: Checkpoint) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config as the tensors show it (q_proj or q_a/q_b decides about q_lora_rank), and what was changed."""
    if "model.layers.0.self_attn.q_proj.weight" in checkpoint.tensors and config.q_lora_rank is not None:
        note = f"q_lora_rank {config.q_lora_rank} is ignored: the checkpoint holds q_proj, not q_a_proj and q_b_proj"
        return dataclasses.replace(config, q_lora_rank=None), (note,)
    return config, ()


def plan_weights(config: ModelConfig, checkpoint: Checkpoint, checkpoint_layers: int) -> WeightPlan:
    """Recipes for `config`; `checkpoint_layers` is config.json's num_hidden_layers where fewer are exported.

    Raises CheckpointError naming the tensor that is missing, left over, of an unsupported dtype, or of another shape
    than the config says.
    """
    recipes = tuple(_Planner(config, checkpoint).plan())
    used = {piece.source for recipe in recipes for piece in recipe.pieces}
    dropped, unexplained = [], []
    for name in checkpoint.tensors.keys() - used:
        reason = _why_dropped(name, config, checkpoint_layers)
        if reason:
            dropped.append(Dropped(name, reason))
        else:
            unexplained.append(name)
    if unexplained:
        raise CheckpointError(
            f"{len(unexplained)} tensors are left over, e.g. {min(unexplained)}: "
            "config.json does not describe this model"
        )
    dtypes = {checkpoint.tensors[name].dtype for name in used}
    unsupported = dtypes - set(DTYPE_NAMES.values())
    if unsupported:
        raise CheckpointError(f"tensors of dtype {', '.join(sorted(unsupported))} are not supported; use bfloat16")
    main = checkpoint.tensors["model.embed_tokens.weight"].dtype
    return WeightPlan(recipes, tuple(sorted(dropped, key=lambda d: d.name)), main)


def _why_dropped(name: str, config: ModelConfig, checkpoint_layers: int) -> str | None:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= checkpoint_layers:
        return f"layer {layer[1]} is beyond num_hidden_layers {checkpoint_layers} (multi-token prediction)"
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f"only the first {config.num_hidden_layers} layers are exported"
    if name.endswith("rotary_emb.inv_freq"):
        return "rope frequencies are computed from config.json"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "tied to model.embed_tokens.weight"
    return None


class _Planner:
    """Walks the model in the order of model.py and says where each parameter comes from."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self.c = config
        self.tensors = checkpoint.tensors

    def plan(self) -> Iterator[Recipe]:
        c = self.c
        yield self.whole("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
        for index in range(c.num_hidden_layers):
            layer = f"model.layers.{index}"
            yield self.whole(f"{layer}.input_layernorm.weight", c.hidden_size)
            yield from self.attention(f"{layer}.self_attn")
            yield self.whole(f"{layer}.post_attention_layernorm.weight", c.hidden_size)
            if c.is_moe_layer(index):
                yield from self.moe(f"{layer}.mlp")
            else:
                yield from self.mlp(f"{layer}.mlp", c.intermediate_size)
        yield self.whole("model.norm.weight", c.hidden_size)
        if not c.tie_word_embeddings:
            yield self.whole("lm_head.weight", c.vocab_size, c.hidden_size)

    def attention(self, at: str) -> Iterator[Recipe]:
        c = self.c
        queries = c.num_attention_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            yield self.whole(f"{at}.q_proj.weight", queries, c.hidden_size)
        else:
            yield from self.linear(f"{at}.q_a_proj", c.q_lora_rank, c.hidden_size, c.attention_bias)
            yield self.whole(f"{at}.q_a_layernorm.weight", c.q_lora_rank)
            yield self.whole(f"{at}.q_b_proj.weight", queries, c.q_lora_rank)
        yield from self.linear(f"{at}.kv_a_proj_with_mqa", c.latent_dim, c.hidden_size, c.attention_bias)
        yield self.whole(f"{at}.kv_a_layernorm.weight", c.kv_lora_rank)
        yield from self.halves_of_kv_b(at)
        values = c.num_attention_heads * c.v_head_dim
        yield from self.linear(f"{at}.o_proj", c.hidden_size, values, c.attention_bias)

    def halves_of_kv_b(self, at: str) -> Iterator[Recipe]:
        """kv_b_proj's rows are per head [nope | v]: W_UK and W_UV are strips of it."""
        c = self.c
        head = c.qk_nope_head_dim + c.v_head_dim
        source = self.source(f"{at}.kv_b_proj.weight", c.num_attention_heads * head, c.kv_lora_rank)
        for name, start, rows in (("w_uk", 0, c.qk_nope_head_dim), ("w_uv", c.qk_nope_head_dim, c.v_head_dim)):
            piece = Piece(source, start, rows, head, c.num_attention_heads)
            yield Recipe(f"{at}.{name}", (c.num_attention_heads, rows, c.kv_lora_rank), (piece,))

    def moe(self, at: str) -> Iterator[Recipe]:
        c = self.c
        yield self.whole(f"{at}.gate.weight", c.n_routed_experts, c.hidden_size)
        if f"{at}.experts.gate_up_proj" in self.tensors:
            yield from self.stacked_experts(f"{at}.experts")
        else:
            yield from self.separate_experts(f"{at}.experts")
        if c.n_shared_experts:
            yield from self.mlp(f"{at}.shared_experts", c.n_shared_experts * c.moe_intermediate_size)

    def separate_experts(self, at: str) -> Iterator[Recipe]:
        """As published: one tensor an expert and projection."""
        c = self.c
        for name, rows, columns in self.expert_shapes():
            sources = [self.source(f"{at}.{e}.{name}.weight", rows, columns) for e in range(c.n_routed_experts)]
            pieces = tuple(Piece(source, 0, rows, rows, 1) for source in sources)
            yield Recipe(f"{at}.{name}", (c.n_routed_experts, rows, columns), pieces)

    def stacked_experts(self, at: str) -> Iterator[Recipe]:
        """As newer transformers may write them: gate and up in one tensor [E, 2I, hidden]."""
        c = self.c
        E, inner = c.n_routed_experts, c.moe_intermediate_size
        both = self.source(f"{at}.gate_up_proj", E, 2 * inner, c.hidden_size)
        down = self.source(f"{at}.down_proj", E, c.hidden_size, inner)
        pieces = {
            "gate_proj": Piece(both, 0, inner, 2 * inner, E),
            "up_proj": Piece(both, inner, inner, 2 * inner, E),
            "down_proj": Piece(down, 0, c.hidden_size, c.hidden_size, E),
        }
        for name, rows, columns in self.expert_shapes():
            yield Recipe(f"{at}.{name}", (E, rows, columns), (pieces[name],))

    def expert_shapes(self) -> tuple[tuple[str, int, int], ...]:
        inner, hidden = self.c.moe_intermediate_size, self.c.hidden_size
        return ("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner)

    def mlp(self, at: str, width: int) -> Iterator[Recipe]:
        c = self.c
        yield from self.linear(f"{at}.gate_proj", width, c.hidden_size, c.mlp_bias)
        yield from self.linear(f"{at}.up_proj", width, c.hidden_size, c.mlp_bias)
        yield from self.linear(f"{at}.down_proj", c.hidden_size, width, c.mlp_bias)

    def linear(self, at: str, rows: int, columns: int, bias: bool) -> Iterator[Recipe]:
        yield self.whole(f"{at}.weight", rows, columns)
        if bias:
            yield self.whole(f"{at}.bias", rows)

    def whole(self, name: str, *shape: int) -> Recipe:
        rows = math.prod(shape[:-1]) if len(shape) > 1 else 1
        return Recipe(name, shape, (Piece(self.source(name, *shape), 0, rows, rows, 1),))

    def source(self, name: str, *shape: int) -> str:
        """`name`, after checking that the checkpoint holds it with this shape."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"tensor {name} is missing; config.json asks for shape {list(shape)}")
        if tensor.shape != shape:
            raise ConfigError(
                f"tensor {name}: config.json asks for {list(shape)}, the checkpoint has {list(tensor.shape)}"
            )
        return name


def byte_ranges(recipe: Recipe, tensors: dict[str, StoredTensor]) -> Iterator[tuple[StoredTensor, int, int]]:
    """(source, offset in its file, bytes) of each run that makes the tensor, in order."""
    for piece in recipe.pieces:
        source = tensors[piece.source]
        row = source.nbytes // (math.prod(source.shape[:-1]) if len(source.shape) > 1 else 1)
        for start, rows in piece.strips():
            yield source, source.offset + start * row, rows * row
