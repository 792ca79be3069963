"""The layer of multi-token prediction in plain torch (DeepSeek-V3, arXiv:2412.19437, section 2.2).

For the token at position i it takes the model's hidden state there, after the last norm, and the embedding of the token
at i + 1: the two, each normed, go side by side through a projection and one decoder layer, whose cache has slot i for
it. The head then gives the logits of the token at i + 2. What leaves the head's norm is a hidden state of position
i + 1, of which the layer drafts once more. Embeddings and output matrix are the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.model import Layer, Linear, RmsNorm, Rope, last_tokens, side_by_side


class SharedHead(nn.Module):
    """The layer's own norm before the output matrix that it shares."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.norm = RmsNorm(c.hidden_size, c.rms_norm_eps)


class MtpLayer(Layer):
    """A decoder layer, and what makes its input of hidden states and embeddings."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__(c, c.num_hidden_layers)
        self.enorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = Linear(2 * c.hidden_size, c.hidden_size)
        self.shared_head = SharedHead(c)

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The layer's input [T, hidden] of embeddings and hidden states [T, hidden]."""
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))


class _Shared(nn.Module):
    """What has the names of the model: its embeddings, rope, and the one layer that is behind its last."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.embed_tokens.weight.requires_grad_(False)
        self.rope = Rope(c)
        self.layers = nn.ModuleDict({str(c.num_hidden_layers): MtpLayer(c)})


class Mtp(nn.Module):
    """The graph "mtp". Its parameters carry the published names, embeddings and output matrix those of the model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Shared(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    @property
    def layer(self) -> MtpLayer:
        """The one layer."""
        return cast(MtpLayer, self.model.layers[str(self.config.num_hidden_layers)])

    def mtp(
        self,
        input_ids: Tensor,
        previous_hidden_state: Tensor,
        sequence_lengths: Tensor,
        past_lengths: Tensor,
        page_table: Tensor,
        latents: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Of tokens [B, S], right-padded, and the hidden states [B, S, hidden] at the positions before them.

        Positions count the hidden states: past_lengths [B] of them have a slot in the layer's pool, the one of
        `latents`. Gives float32 logits [B, vocab] and hidden states [B, hidden] at each row's last real token, and the
        pool with the new slots.
        """
        x = self.layer.join(
            self.model.embed_tokens(input_ids).flatten(0, 1),
            previous_hidden_state.flatten(0, 1).to(self.layer.eh_proj.weight.dtype),
        )  # [T, hidden]
        positions = past_lengths.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)  # [B, S]
        cos, sin = self.model.rope(positions, (past_lengths + sequence_lengths).unsqueeze(1))
        attended, present = self.layer.self_attn.prefill(
            self.layer.input_layernorm(x), cos, sin, latents[0], page_table, past_lengths, sequence_lengths
        )
        x = x + attended
        x = x + self.layer.mlp(self.layer.post_attention_layernorm(x))
        x = last_tokens(x.view(*input_ids.shape, -1), sequence_lengths)[:, 0]  # [B, hidden]
        hidden = self.layer.shared_head.norm(x)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight).float(), hidden.float(), side_by_side([present])
