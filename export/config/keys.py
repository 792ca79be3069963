"""Every key that config.json of this family may hold, and what becomes of it: used, checked, harmless or refused.

The family: DeepSeek-V2, V3 and V3.1, Kimi-K2, Moonlight, GLM-4.7-Flash under these names, and whatever transformers
writes into any config.json. docs/checkpoints.md prints this table. A key that is not in it is named in a note, unless
it is null, false, zero or empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from deepseek_trt.export.config.values import Anything, Flag, Integer, Kind, ListOf, Number, Object, Text

Use = Literal["used", "checked", "harmless", "refused"]

NONE_OF_IT: tuple[Any, ...] = (None, False, 0, "", [], {})  # what says that a feature is absent
UNCHANGED: tuple[Any, ...] = (None, 1)  # the factors that change nothing


@dataclass(frozen=True)
class Key:
    """One key. `why` says what it is used for, what it must agree with, or why it is harmless or refused.

    A key is checked where it must agree with others, from which the model is made. `kind` is that of a used or checked
    key's values. `null` says what null means; where it is empty, null is refused as any
    other wrong value. A refused key's `neutral` values are accepted: they say that the feature is absent.
    """

    name: str
    use: Use
    why: str
    kind: Kind = Anything()  # noqa: RUF009 - frozen
    null: str = ""
    neutral: tuple[Any, ...] = NONE_OF_IT


def _used(name: str, kind: Kind, why: str, null: str = "") -> Key:
    return Key(name, "used", why, kind, null)


def _checked(name: str, kind: Kind, why: str, null: str = "absent") -> Key:
    return Key(name, "checked", why, kind, null)


def _harmless(why: str, *names: str) -> tuple[Key, ...]:
    return tuple(Key(name, "harmless", why) for name in names)


def _refused(why: str, *names: str, neutral: tuple[Any, ...] = NONE_OF_IT) -> tuple[Key, ...]:
    return tuple(Key(name, "refused", why, neutral=neutral) for name in names)


_SIZE = Integer()
_LATENT = Integer(low=0)  # 0 and null have a sentence of their own: there is no latent attention
_ID = Integer(low=0)
_LAYERS, _EXPERTS, _HEADS = Integer(high=10_000), Integer(low=0, high=2**16), Integer(high=2**16)

_MODEL = (
    _used("model_type", Text(), "which family's defaults and router: deepseek_v2, deepseek_v3 or kimi_k2"),
    _used("architectures", ListOf(Text()), "the task, and the family where model_type is absent", "absent"),
    _used("vocab_size", _SIZE, "rows of the embeddings"),
    _used("hidden_size", _SIZE, "width of the residual stream"),
    _used("intermediate_size", _SIZE, "width of dense layers"),
    _used("num_hidden_layers", _LAYERS, "layers; what is behind the last is dropped, but for one that --mtp exports"),
    _used("hidden_act", Text(), "silu, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, swish or relu"),
    _used("max_position_embeddings", _SIZE, "the context that is promised; dynamic RoPE's threshold"),
    _used("rms_norm_eps", Number(0.0, high=1.0), "of the layers' norms; the latents' norms have 1e-6"),
    _used("tie_word_embeddings", Flag(), "whether the embeddings are the head"),
    _used("attention_bias", Flag(), "biases of q_a, kv_a and o projections"),
    _used("mlp_bias", Flag(), "biases of the feed-forward layers"),
    _used("torch_dtype", Text(), "where dtype is absent", "float32"),
    _used("transformers_weights", Anything(), "the file or index of the weights, in place of the usual ones", "absent"),
    _used("dtype", Text(), "float32, float16 or bfloat16; the tensors decide", "float32"),
)
_ATTENTION = (
    _used("num_attention_heads", _HEADS, "heads"),
    _used("q_lora_rank", _SIZE, "rank of the queries", "full-rank queries"),
    _used("kv_lora_rank", _LATENT, "width of the cached latent"),
    _used("qk_nope_head_dim", _LATENT, "width of a head's part without rotation"),
    _used("qk_rope_head_dim", _LATENT, "width of a head's rotated part"),
    _used("v_head_dim", _LATENT, "width of a head's value"),
    _used("rope_theta", Number(1.0, above=True), "where the rope settings do not hold their own"),
    _used("rope_scaling", Object(), "the rope settings; comes before rope_parameters, as in transformers", "none"),
    _used("rope_parameters", Object(), "the rope settings where rope_scaling is absent or empty", "none"),
    _used(
        "rope_interleave",
        Flag(),
        "false: halves are rotated, not adjacent pairs; deepseek_v3 and kimi_k2 only (deepseek_v2: refused)",
    ),
    _checked(
        "num_key_value_heads", _HEADS, "a note names another number than num_attention_heads: each head has its key"
    ),
    _checked("head_dim", _SIZE, "must be one of the widths above, or of their sums"),
    _checked("qk_head_dim", _SIZE, "must be qk_nope_head_dim + qk_rope_head_dim"),
    _checked("original_max_position_embeddings", _SIZE, "must be what YaRN's settings say"),
    *_refused(
        "only a part of the rope dimensions would be rotated", "partial_rotary_factor", "rotary_pct", neutral=UNCHANGED
    ),
    *_refused("the rope speeds would be others", "rope_ratio", neutral=UNCHANGED),
    *_refused(
        "queries and keys would be normalised once more",
        *("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm"),
    ),
    *_refused(
        "attention scores would be scaled or cut",
        *("attn_logit_softcapping", "attn_logit_soft_cap", "use_sink", "query_pre_attn_scalar"),
        *("attention_multiplier", "mla_scale_q_lora", "mla_scale_kv_lora"),
    ),
    *_refused("attention would see only some tokens", "index_topk", "index_n_heads", "index_head_dim"),
    *_refused("attention would see only some tokens", "attention_chunk_size", "no_rope_layers", "use_sliding_window"),
    _checked("sliding_window", Anything(), "must be null, 0, or beside a use_sliding_window of false"),
    _checked("layer_types", Anything(), "every layer must be full_attention"),
    _checked("use_mla", Flag(), "must be true"),
)
_ROUTER = (
    _used("n_routed_experts", _EXPERTS, "experts per layer; 0: every layer is dense", "0"),
    _used("num_experts", _EXPERTS, "another name of n_routed_experts (V2 of transformers)", "absent"),
    _used("num_local_experts", _EXPERTS, "another name of n_routed_experts (V3 of transformers)", "absent"),
    _used("n_shared_experts", _EXPERTS, "shared experts, as one of their joint width", "0"),
    _used("num_experts_per_tok", _EXPERTS, "experts per token; 0: every layer is dense", "0"),
    _used("moe_intermediate_size", _SIZE, "width of an expert"),
    _used("first_k_dense_replace", Integer(low=0), "dense layers at the start"),
    _used("moe_layer_freq", _SIZE, "every n-th layer has experts"),
    _used("topk_method", Text(), "greedy, group_limited_greedy (V2) or noaux_tc (V3)", "the family's own"),
    _used("scoring_func", Text(), "softmax (V2) or sigmoid (V3)", "the family's own"),
    _used("n_group", _SIZE, "groups of experts", "1"),
    _used("topk_group", _SIZE, "groups that a token may choose from", "1"),
    _used("norm_topk_prob", Flag(), "whether the chosen weights are normalised", "false, as in transformers"),
    _used("routed_scaling_factor", Number(0.0, above=True), "factor on the routed experts"),
    _checked("mlp_layer_types", Anything(), "must agree with first_k_dense_replace and moe_layer_freq"),
    *_refused("experts' activations would be cut", "swiglu_limit", "swiglu_alpha"),
    *_refused("there would be experts that compute nothing", "zero_expert_num", "zero_expert_type"),
)
_SCALES = (
    *_refused(
        "activations would be multiplied by it",
        *("embedding_multiplier", "residual_multiplier", "logits_scaling", "scale_emb", "scale_depth"),
        *("mup_width_multiplier", "lm_head_multiplier", "logit_scale", "dim_model_base"),
        neutral=UNCHANGED,
    ),
    *_refused("logits would be cut", "final_logit_softcapping", "final_logit_soft_cap"),
)
_OTHER_MODELS = (
    *_refused(
        "this is a vision-language model; only text models are supported",
        *("language_config", "vision_config", "text_config", "audio_config", "projector_config"),
        neutral=(None,),
    ),
    *_refused("layers would differ from each other", "per_layer_config", "block_configs", "pruned_heads"),
    *_refused("this is an encoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size"),
    *_refused("residual streams would be several", "hc_mult", "compress_ratios", "num_hash_layers", "hc_eps"),
)
_TEXT = (
    _used("bos_token_id", _ID, "the first token of a text", "none"),
    _used("eos_token_id", ListOf(_ID, or_one=True), "the tokens that end an answer", "none"),
    _used("pad_token_id", _ID, "padding of classifiers", "none"),
    _used("id2label", Object(Text()), "names of the classes", "absent"),
    _used("num_labels", Integer(), "classes, where id2label is absent", "absent"),
    _used("problem_type", Text(), "how logits become scores", "absent"),
)
_QUANTIZATION = (
    _used(
        "quantization_config",
        Object(),
        "fp8 in blocks, compressed-tensors, GPTQ and AWQ are read, others refused by name",
        "none",
    ),
    *_refused("a former name of quantization_config: call it so", "compression_config"),
    *_refused("MLX's quantisation is not supported; use the bfloat16 checkpoint", "quantization"),
)
_HARMLESS = (
    *_harmless(
        "only of use in training",
        *("aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef"),
        *("moe_aux_loss_coef", "initializer_range", "attention_dropout", "hidden_dropout", "hidden_dropout_prob"),
        *("attention_probs_dropout_prob", "embd_pdrop", "resid_pdrop", "classifier_dropout", "gradient_checkpointing"),
        *("use_bfloat16", "mtp_loss_weight", "embedding_dropout"),
    ),
    *_harmless(
        "whether there are layers of multi-token prediction is seen in the tensors; --mtp exports the first",
        *("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_layer_types", "use_mtp"),
    ),
    *_harmless(
        "how the work is spread, not what is computed",
        *("ep_size", "pretraining_tp", "chunk_size_feed_forward", "attn_implementation", "experts_implementation"),
        *("_attn_implementation", "_attn_implementation_autoset", "_experts_implementation", "use_cache"),
        *("_attn_implementation_internal", "_experts_implementation_internal"),
        *("tp_plan", "base_model_tp_plan", "torchscript", "use_flash_attn", "max_window_layers"),
    ),
    *_harmless(
        "what the library gives back, not what is computed",
        *("output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "return_dict"),
        *("return_dict_in_generate", "tie_last_hidden_states"),
    ),
    *_harmless(
        "where it comes from",
        *(
            "_name_or_path",
            "name_or_path",
            "_commit_hash",
            "transformers_version",
            "finetuning_task",
            "tokenizer_class",
        ),
        *("task_specific_params", "unsloth_version", "unsloth_fixed", "model_name", "torch_version", "revision"),
        *("model_max_length", "seq_length"),
    ),
    *_harmless("remote code is never imported", "auto_map", "custom_pipelines"),
    *_harmless("id2label says it", "label2id"),
    *_harmless("a decoder is what this is", "is_decoder"),
    *_harmless("nothing of an encoder is here", "tie_encoder_decoder", "decoder_start_token_id", "decoder"),
    *_harmless(
        "the tokenizer's files say it", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "prefix"
    ),
    *_harmless(
        "belongs to generation_config.json; transformers does not read it here either",
        *("assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens"),
        *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "epsilon_cutoff"),
        *("encoder_repetition_penalty", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *("forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length", "min_p", "top_k"),
        *("no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups"),
        *("num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty", "suppress_tokens"),
        *("target_lookbehind", "temperature", "top_p", "typical_p"),
    ),
)

SECTIONS: dict[str, tuple[Key, ...]] = {
    "The model": _MODEL,
    "Attention": _ATTENTION,
    "Experts": _ROUTER,
    "Text and classes": _TEXT,
    "Quantisation": _QUANTIZATION,
    "Signs of another model": (*_SCALES, *_OTHER_MODELS),
    "Harmless": _HARMLESS,
}
KEYS: dict[str, Key] = {key.name: key for keys in SECTIONS.values() for key in keys}
ALIASES = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
