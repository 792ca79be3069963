"""The model's other classes and interfaces in plain torch, each over the layers of model.py.

transformers' DeepseekV2Model is Features, its DeepseekV2ForSequenceClassification is Scores. A graph's root is one of
these methods: prefill and decode over the paged cache, `whole` without a cache, `masked` with transformers' inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_trt.export.bundle.graph import DEFAULT_PAGE_SIZE, GraphSpec
from deepseek_trt.export.bundle.interface import CLASSIFICATION, FEATURES, GENERATION, TRANSFORMERS, Interface
from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.contiguous import positions_of, run_masked
from deepseek_trt.export.model import Backbone, DeepseekV2, Linear, last_tokens


class Logits(DeepseekV2):
    """The causal language model, with logits at the last `keep` tokens of a row; 0 is all, None the last as one row."""

    def __init__(self, config: ModelConfig, interface: Interface, num_labels: int = 0) -> None:
        embeddings = not interface.inputs_embeds or config.tie_word_embeddings
        super().__init__(config, interface.all_logits, embeddings)
        self.keep = interface.logits_to_keep
        self.model.cache_as(NarrowCache.of(config, interface.cache_dtype))

    def kept(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[B, hidden], [B, S, hidden] or [B, keep, hidden]; rows shorter than `keep` begin with repeated ones."""
        return last_tokens(x, lengths, self.keep) if self.keep else super().kept(x, lengths)

    def prefill_with_hidden(
        self,
        input_ids: Tensor,
        sequence_lengths: Tensor,
        past_lengths: Tensor,
        page_table: Tensor,
        latents: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As prefill; between logits and pools it gives last_hidden_state [B, S, hidden], float32, after the norm."""
        x, present = self.model.prefill(input_ids, sequence_lengths, past_lengths, page_table, latents)
        return self.logits(self.kept(x, sequence_lengths)), self.model.norm(x).float(), present

    def decode_with_hidden(
        self,
        input_ids: Tensor,
        sequence_lengths: Tensor,
        past_lengths: Tensor,
        page_table: Tensor,
        latents: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As decode, with the hidden states as prefill_with_hidden gives them."""
        x, present = self.model.decode(input_ids, sequence_lengths, past_lengths, page_table, latents)
        logits = self.logits(x.flatten(0, 1)).view(*x.shape[:2], -1)
        return logits, self.model.norm(x.flatten(0, 1)).float().view(x.shape), present

    def masked(
        self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, S, vocab], or of the last `keep` slots where there are so many, as transformers slices them."""
        x, present = run_masked(self.model, tokens, attention_mask, position_ids, past)
        return self.logits(x[:, -self.keep :] if self.keep else x), present


class Features(nn.Module):
    """The model without a head: float32 hidden states after the last norm, [B, S, hidden]."""

    def __init__(self, config: ModelConfig, interface: Interface, num_labels: int = 0) -> None:
        super().__init__()
        self.config, self.model = config, Backbone(config, not interface.inputs_embeds)

    def prefill(
        self,
        input_ids: Tensor,
        sequence_lengths: Tensor,
        past_lengths: Tensor,
        page_table: Tensor,
        latents: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """last_hidden_state [B, S, hidden]; padding's rows mean nothing."""
        x, present = self.model.prefill(input_ids, sequence_lengths, past_lengths, page_table, latents)
        return self.features(x), present

    def decode(
        self,
        input_ids: Tensor,
        sequence_lengths: Tensor,
        past_lengths: Tensor,
        page_table: Tensor,
        latents: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """last_hidden_state [B, S, hidden]; padding's rows mean nothing."""
        x, present = self.model.decode(input_ids, sequence_lengths, past_lengths, page_table, latents)
        return self.features(x), present

    def whole(self, tokens: Tensor, sequence_lengths: Tensor) -> Tensor:
        """Without a cache: last_hidden_state of right-padded rows."""
        return self.features(without_cache(self.model, tokens, sequence_lengths))

    def features(self, x: Tensor) -> Tensor:
        """Make the graph's outputs of the last layer's output."""
        normed: Tensor = self.model.norm(x)
        return normed.float()

    def masked(
        self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """last_hidden_state of every slot, and the contiguous cache."""
        x, present = run_masked(self.model, tokens, attention_mask, position_ids, past)
        return self.features(x), present

    def masked_whole(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Without a cache: positions count the real tokens."""
        x, _ = run_masked(self.model, tokens, attention_mask, positions_of(attention_mask), ())
        return self.features(x)


class Scores(nn.Module):
    """Sequence classification: float32 logits [B, num_labels] at each row's last real token.

    A row without any counts as one padding token, so that its logits are defined.
    """

    def __init__(self, config: ModelConfig, interface: Interface, num_labels: int) -> None:
        super().__init__()
        self.config, self.model = config, Backbone(config, not interface.inputs_embeds)
        self.score = Linear(config.hidden_size, num_labels)

    def whole(self, tokens: Tensor, sequence_lengths: Tensor) -> Tensor:
        """Classify right-padded rows."""
        lengths = sequence_lengths.clamp(min=1)
        return self.pooled(last_tokens(without_cache(self.model, tokens, lengths), lengths)[:, 0])

    def masked_whole(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Classify rows padded on either side; padding at the end of a row is not pooled, as in transformers."""
        x, _ = run_masked(self.model, tokens, attention_mask, positions_of(attention_mask), ())
        real = attention_mask != 0
        if self.config.pad_token_id is not None and not tokens.is_floating_point():
            real = real & (tokens != self.config.pad_token_id)
        slots = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return self.pooled(last_tokens(x, (slots * real).amax(1))[:, 0])

    def pooled(self, x: Tensor) -> Tensor:
        """Logits of hidden states [B, hidden]."""
        return F.linear(self.model.norm(x), self.score.weight).float()


def without_cache(backbone: Backbone, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The last layer's output [B, S, hidden] in one pass that keeps no cache: each row has pages of its own."""
    pages = (tokens.shape[1] + DEFAULT_PAGE_SIZE - 1) // DEFAULT_PAGE_SIZE
    past_lengths = torch.zeros_like(lengths)
    first = torch.arange(tokens.shape[0], dtype=torch.int32, device=tokens.device)[:, None] * pages + 1  # [B, 1]
    table = first + torch.arange(pages, dtype=torch.int32, device=tokens.device)
    return backbone.prefill(tokens, lengths, past_lengths, table, [None] * len(backbone.layers))[0]


MODELS: dict[str, type[Logits | Features | Scores]] = {
    GENERATION: Logits,
    FEATURES: Features,
    CLASSIFICATION: Scores,
}


def method_of(interface: Interface, graph: str) -> str:
    """The method that is the graph's root."""
    if interface.mtp and graph in ("prefill", "decode"):
        return f"{graph}_with_hidden"
    if graph != "model":
        return graph
    if interface.io == TRANSFORMERS:
        return "masked" if interface.cache else "masked_whole"
    return "whole"


def run_graph(model: Any, interface: Interface, spec: GraphSpec, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One of a model's graphs in eager torch, by the graph's names; each layer's hidden states are watched, as no
    method gives them.

    `feeds` are in the spec's order.
    """
    plain = [tensor for name, tensor in feeds.items() if not name.startswith("past_key_values.")]
    past = [tensor for name, tensor in feeds.items() if name.startswith("past_key_values.")]
    streams: list[Tensor] = []
    norms = [layer.input_layernorm for layer in model.model.blocks()] if interface.hidden_states else []
    hooks = [norm.register_forward_pre_hook(lambda _, given: streams.append(given[0])) for norm in norms]
    try:
        made = getattr(model, method_of(interface, spec.name))(*plain, *([past] if past else []))
    finally:
        for hook in hooks:
            hook.remove()
    first, *states, present = made if isinstance(made, tuple) else (made, [])
    hidden = [stream.view(first.shape).float() for stream in streams] + ([first] if streams else [])
    return dict(zip((tensor.name for tensor in spec.outputs), [first, *states, *hidden, *present], strict=True))
