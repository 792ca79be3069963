"""Recipes: which checkpoint tensors make which graph tensor, and nothing left over unexplained."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_trt.export.bundle.interface import CLASSIFICATION, DEFAULT, GENERATION, Interface
from deepseek_trt.export.bundle.recipes import (
    CORRECTION_BIAS,
    EMBEDDINGS,
    FINAL_NORM,
    FP8,
    LM_HEAD,
    SCALE_SUFFIX,
    Dropped,
    Piece,
    Recipe,
)
from deepseek_trt.export.config.model_config import FP8_BLOCK, ModelConfig
from deepseek_trt.export.dtypes import WEIGHT_DTYPES
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.mtp.copies import original_of
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.classifier import SCORE
from deepseek_trt.export.reading.tensors import PACKED, StoredTensor
from deepseek_trt.export.text.wording import some

_UNINDEXED = "the index does not name it, and the model does not need it"
_SCALES = (*WEIGHT_DTYPES.values(), "F8_E8M0")  # what fp8 block scales may be


@dataclass(frozen=True)
class WeightPlan:
    """All recipes of a model, and what is dropped. `dtype` is the one that the sources are stored in."""

    recipes: tuple[Recipe, ...]
    dropped: tuple[Dropped, ...]
    dtype: str


def plan_weights(
    config: ModelConfig,
    checkpoint: Checkpoint,
    checkpoint_layers: int,
    interface: Interface = DEFAULT,
    num_labels: int = 0,
) -> WeightPlan:
    """Recipes for `config`; `checkpoint_layers` is config.json's num_hidden_layers where fewer are exported.

    Raises CheckpointError naming the tensor that is missing, left over, of an unsupported dtype, or of another shape
    than the config says.
    """
    recipes = tuple(_Planner(config, checkpoint).plan(interface, num_labels))
    pieces = [piece for recipe in recipes for piece in recipe.pieces]
    used = {piece.source for piece in pieces} | {piece.scale for piece in pieces if piece.scale}
    left = sorted(checkpoint.tensors.keys() - used)
    reasons = {
        name: _why_dropped(name, config, checkpoint_layers, interface)
        or (_UNINDEXED if name in checkpoint.unindexed else None)
        for name in left
    }
    unexplained = [name for name, reason in reasons.items() if reason is None]
    if unexplained:
        raise CheckpointError(
            f"{len(unexplained)} tensors are left over, e.g. {some(unexplained[:1])}: "
            "config.json does not describe this model"
        )
    for piece in pieces:
        _check_dtype(checkpoint.tensors[piece.source], piece)
    dropped = tuple(Dropped(name, reason) for name, reason in reasons.items() if reason)
    return WeightPlan(recipes, dropped, main_dtype(checkpoint))


def main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the embeddings, or of the last norm, of whichever is not quantized."""
    kinds = [checkpoint.tensors[name].dtype for name in (EMBEDDINGS, FINAL_NORM) if name in checkpoint.tensors]
    return next((kind for kind in kinds if kind in WEIGHT_DTYPES.values()), "bfloat16")


def _check_dtype(source: StoredTensor, piece: Piece) -> None:
    if source.dtype == FP8 and piece.scale is None:
        raise CheckpointError(
            f"tensor {some([source.name])} is fp8 without its *{SCALE_SUFFIX}; only block-scaled fp8 is supported"
        )
    if source.dtype not in (*WEIGHT_DTYPES.values(), FP8, PACKED):
        raise CheckpointError(f"tensor {some([source.name])} is {source.dtype}, which is not supported; use bfloat16")


def _why_dropped(name: str, config: ModelConfig, checkpoint_layers: int, interface: Interface) -> str | None:
    """Why the graphs of this interface do without a tensor; None where nothing explains it."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= checkpoint_layers:
        beyond = f"layer {layer[1]} is beyond num_hidden_layers {checkpoint_layers} (multi-token prediction)"
        if not interface.mtp or int(layer[1]) > checkpoint_layers:
            return f"{beyond}; --mtp exports the first such layer"
        original = original_of(name, config)
        return original and f"a copy of {original}, which the graph takes"
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f"only the first {config.num_hidden_layers} layers are exported"
    if name.endswith("rotary_emb.inv_freq"):
        return "rope frequencies are computed from config.json"
    if name == LM_HEAD and config.tie_word_embeddings:
        return "tied to model.embed_tokens.weight"
    if name in (LM_HEAD, SCORE):
        return f"the task {interface.task} does not need it"
    if name == EMBEDDINGS and interface.inputs_embeds:
        return "the graphs take inputs_embeds"
    return None


class _Planner:
    """Walks the model in the order of model.py and says where each parameter comes from."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self.c = config
        self.tensors = checkpoint.tensors

    def plan(self, interface: Interface, num_labels: int) -> Iterator[Recipe]:
        c = self.c
        generates = interface.task == GENERATION
        if not interface.inputs_embeds or (generates and c.tie_word_embeddings):
            yield self.whole(EMBEDDINGS, c.vocab_size, c.hidden_size)
        for index in range(c.num_hidden_layers):
            yield from self.layer(index)
        yield self.whole(FINAL_NORM, c.hidden_size)
        if generates and not c.tie_word_embeddings:
            yield self.whole(LM_HEAD, c.vocab_size, c.hidden_size)
        if interface.task == CLASSIFICATION:
            yield self.whole(SCORE, num_labels, c.hidden_size)
        if interface.mtp:
            yield from self.mtp(c.num_hidden_layers)

    def layer(self, index: int) -> Iterator[Recipe]:
        c, layer = self.c, f"model.layers.{index}"
        yield self.whole(f"{layer}.input_layernorm.weight", c.hidden_size)
        yield from self.attention(f"{layer}.self_attn")
        yield self.whole(f"{layer}.post_attention_layernorm.weight", c.hidden_size)
        if c.is_moe_layer(index):
            yield from self.moe(f"{layer}.mlp")
        else:
            yield from self.mlp(f"{layer}.mlp", c.intermediate_size)

    def mtp(self, index: int) -> Iterator[Recipe]:
        """The layer of multi-token prediction; its embeddings and output matrix are the model's."""
        layer, hidden = f"model.layers.{index}", self.c.hidden_size
        yield from self.layer(index)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield self.whole(f"{layer}.{norm}.weight", hidden)
        yield self.whole(f"{layer}.eh_proj.weight", hidden, 2 * hidden)

    def attention(self, at: str) -> Iterator[Recipe]:
        c = self.c
        queries = c.num_attention_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            yield self.rotated(f"{at}.q_proj.weight", c.num_attention_heads, queries, c.hidden_size)
        else:
            yield from self.linear(f"{at}.q_a_proj", c.q_lora_rank, c.hidden_size, c.attention_bias)
            yield self.whole(f"{at}.q_a_layernorm.weight", c.q_lora_rank)
            yield self.rotated(f"{at}.q_b_proj.weight", c.num_attention_heads, queries, c.q_lora_rank)
        yield self.rotated(f"{at}.kv_a_proj_with_mqa.weight", 1, c.latent_dim, c.hidden_size)
        if c.attention_bias:
            yield self.rotated(f"{at}.kv_a_proj_with_mqa.bias", 1, c.latent_dim)
        yield self.whole(f"{at}.kv_a_layernorm.weight", c.kv_lora_rank)
        yield from self.halves_of_kv_b(at)
        values = c.num_attention_heads * c.v_head_dim
        yield from self.linear(f"{at}.o_proj", c.hidden_size, values, c.attention_bias)

    def rotated(self, name: str, heads: int, *shape: int) -> Recipe:
        """Rows of which each head's last are rotated: adjacent pairs, or halves where rope_interleave is false."""
        if self.c.rope_interleave:
            return self.whole(name, *shape)
        head = shape[0] // heads
        piece = Piece(self.source(name, *shape), 0, head, head, heads, self.scale(name), halves=self.c.qk_rope_head_dim)
        return Recipe(name, shape, (piece,))

    def halves_of_kv_b(self, at: str) -> Iterator[Recipe]:
        """kv_b_proj's rows are per head [nope | v]: W_UK and W_UV are strips of it."""
        c = self.c
        head = c.qk_nope_head_dim + c.v_head_dim
        source = self.source(f"{at}.kv_b_proj.weight", c.num_attention_heads * head, c.kv_lora_rank)
        for name, start, rows in (("w_uk", 0, c.qk_nope_head_dim), ("w_uv", c.qk_nope_head_dim, c.v_head_dim)):
            piece = Piece(source, start, rows, head, c.num_attention_heads, self.scale(source))
            yield Recipe(f"{at}.{name}", (c.num_attention_heads, rows, c.kv_lora_rank), (piece,))

    def moe(self, at: str) -> Iterator[Recipe]:
        c = self.c
        yield self.whole(f"{at}.gate.weight", c.n_routed_experts, c.hidden_size)
        if c.biased_routing:
            yield self.whole(f"{at}.gate.{CORRECTION_BIAS}", c.n_routed_experts)
        if f"{at}.experts.gate_up_proj" in self.tensors:
            yield from self.stacked_experts(f"{at}.experts")
        else:
            yield from self.separate_experts(f"{at}.experts")
        if c.n_shared_experts:
            yield from self.mlp(f"{at}.shared_experts", c.n_shared_experts * c.moe_intermediate_size)

    def separate_experts(self, at: str) -> Iterator[Recipe]:
        """Stack experts as DeepSeek publishes them: one tensor an expert and projection."""
        c = self.c
        for name, rows, columns in self.projections(c.moe_intermediate_size):
            sources = [self.source(f"{at}.{e}.{name}.weight", rows, columns) for e in range(c.n_routed_experts)]
            pieces = tuple(Piece(source, 0, rows, rows, 1, self.scale(source)) for source in sources)
            yield Recipe(f"{at}.{name}", (c.n_routed_experts, rows, columns), pieces)

    def stacked_experts(self, at: str) -> Iterator[Recipe]:
        """Split experts as newer transformers may write them: gate and up in one tensor [E, 2I, hidden]."""
        c = self.c
        E, inner = c.n_routed_experts, c.moe_intermediate_size
        both = self.source(f"{at}.gate_up_proj", E, 2 * inner, c.hidden_size)
        down = self.source(f"{at}.down_proj", E, c.hidden_size, inner)
        pieces = {
            "gate_proj": Piece(both, 0, inner, 2 * inner, E),
            "up_proj": Piece(both, inner, inner, 2 * inner, E),
            "down_proj": Piece(down, 0, c.hidden_size, c.hidden_size, E),
        }
        for name, rows, columns in self.projections(inner):
            yield Recipe(f"{at}.{name}", (E, rows, columns), (pieces[name],))

    def projections(self, width: int) -> tuple[tuple[str, int, int], ...]:
        """Names, rows and columns of the weights of one expert, or of a dense layer, of this width."""
        hidden = self.c.hidden_size
        return ("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)

    def mlp(self, at: str, width: int) -> Iterator[Recipe]:
        for name, rows, columns in self.projections(width):
            yield from self.linear(f"{at}.{name}", rows, columns, self.c.mlp_bias)

    def linear(self, at: str, rows: int, columns: int, bias: bool) -> Iterator[Recipe]:
        yield self.whole(f"{at}.weight", rows, columns)
        if bias:
            yield self.whole(f"{at}.bias", rows)

    def whole(self, name: str, *shape: int) -> Recipe:
        rows = math.prod(shape[:-1])
        return Recipe(name, shape, (Piece(self.source(name, *shape), 0, rows, rows, 1, self.scale(name)),))

    def scale(self, name: str) -> str | None:
        """The tensor of `name`'s block scales where it is fp8 and has them."""
        scale = f"{name}{SCALE_SUFFIX}"
        if self.tensors[name].dtype != FP8 or scale not in self.tensors:
            return None
        if self.tensors[scale].dtype not in _SCALES:
            raise CheckpointError(f"tensor {scale} is {self.tensors[scale].dtype}; scales may be: {', '.join(_SCALES)}")
        blocks = tuple(-(-size // FP8_BLOCK) for size in self.tensors[name].shape)
        return self.source(scale, *blocks)

    def source(self, name: str, *shape: int) -> str:
        """`name`, after checking that the checkpoint holds it with this shape."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"tensor {name} is missing; config.json asks for shape {list(shape)}")
        if tensor.shape != shape:
            raise ConfigError(
                f"tensor {name}: config.json asks for {list(shape)}, the checkpoint has {list(tensor.shape)}; "
                "download both again from the same place"
            )
        return name
