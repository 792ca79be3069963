"""ModelShape: everything about a model that shapes its graphs, in one spelling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from deepseek_trt.export.config.rope import DEFAULT_MAX_POSITIONS, RopeConfig
from deepseek_trt.export.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Everything about a DeepSeek-V2 model that shapes its graphs. Defaults are those of an absent key."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = DEFAULT_MAX_POSITIONS
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # MLA
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True  # of the checkpoint's rows; the graphs' are adjacent pairs always
    rope: RopeConfig = field(default_factory=RopeConfig)
    # MoE; n_routed_experts == 0 means that every layer is dense
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 1407
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    topk_method: str = "greedy"  # its scoring function: family.TOPK_METHODS
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    # text
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    dtype: str = "float32"

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or expanded key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: the normalised latent, then the rotated rope part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores, YaRN's amplitude included."""
        return self.rope.softmax_amplitude / math.sqrt(self.qk_head_dim)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` routes to experts."""
        sparse = self.n_routed_experts > 0 and self.num_experts_per_tok > 0
        return sparse and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def biased_routing(self) -> bool:
        """Whether a learned bias takes part in the choice of experts (V3 family)."""
        return self.topk_method == "noaux_tc"

    @property
    def routing_groups(self) -> tuple[int, int]:
        """Groups of experts, and how many of them a token may choose from; (1, 1) where routing is not limited."""
        return (1, 1) if self.topk_method == "greedy" else (self.n_group, self.topk_group)

    def check(self) -> None:
        """Refuse values that contradict each other, with a ConfigError."""
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim is {self.qk_rope_head_dim}: pairs are rotated, so it must be even")
        if self.rope.kind == "dynamic" and self.qk_rope_head_dim == 2:
            raise ConfigError("rope scaling 'dynamic' is not defined for qk_rope_head_dim 2")
        if not self.n_routed_experts or not self.num_experts_per_tok:
            return
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} > n_routed_experts {self.n_routed_experts}"
            )
        if self.topk_method != "greedy":
            self._check_groups()

    def _check_groups(self) -> None:
        experts = self.n_routed_experts
        if experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(
                f"n_group {self.n_group} must divide n_routed_experts {experts}, "
                f"and topk_group {self.topk_group} must lie between 1 and n_group"
            )
        size = experts // self.n_group
        if self.topk_group * size < self.num_experts_per_tok:
            raise ConfigError(
                f"topk_group {self.topk_group} groups hold fewer experts than num_experts_per_tok "
                f"{self.num_experts_per_tok}"
            )
        if self.topk_method == "noaux_tc" and self.topk_group < self.n_group and size < 2:
            raise ConfigError(f"n_group {self.n_group}: noaux_tc scores a group by its two best experts, it has {size}")
