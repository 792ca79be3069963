"""Names of other servers: each is another name of an own input, or taken where it changes nothing, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_trt.engines.serving.tensors import INPUTS, Field

Ids = Literal["end", "pad"]


@dataclass(frozen=True)
class Name:
    """One name. `same_as` is the own input that it means; a name without it is taken where its value is `neutral`.

    `of_model`: neutral are the model's own ids. `why` says why another value is refused. Without `declared` it is no
    tensor, but a request parameter or a key of sampling_parameters.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    same_as: str = ""
    neutral: tuple[object, ...] = ()
    of_model: Ids | None = None
    why: str = ""
    declared: bool = True

    @property
    def field(self) -> Field:
        return Field(self.name, self.data_type, self.dims)


_BEAMS = "there is no beam search"
_ONE = "a request has one answer: send several requests"
_LORA = "there are no LoRA adapters"
_IMAGES = "the model reads text alone"
_DRAFTS = "there are no draft models"
_LOGITS = "logits are not sent: see return_log_probs"
_PROMPT_TABLES = "there is no prompt tuning"
_TIMES = "times are in /metrics"
_SPECIAL = "special tokens are never shown"
_PIECES = "a part of the text cannot be left as tokens"


def _same(name: str, of: str, declared: bool = True) -> Name:
    field = next(field for field in INPUTS if field.name == of)
    return Name(name, field.data_type, field.dims, same_as=of, declared=declared)


def _key(name: str, data_type: str, neutral: tuple[object, ...] = (), why: str = "") -> Name:
    return Name(name, data_type, neutral=neutral, why=why, declared=False)


NAMES: dict[str, tuple[Name, ...]] = {
    "vllm_backend": (
        _same("stop", "stop_words"),
        Name("return_logprobs", "TYPE_BOOL", neutral=(False,), why="ask for return_log_probs"),
        Name("image", "TYPE_STRING", (-1,), neutral=("",), why=_IMAGES),
        Name("embedding_request", "TYPE_STRING", neutral=("",), why="the model generates text"),
        _key("guided_decoding", "TYPE_STRING"),
        _key("structured_outputs", "TYPE_STRING"),
        _key("n", "TYPE_INT32", (1,), _ONE),
        _key("best_of", "TYPE_INT32", (1,), _ONE),
        _key("use_beam_search", "TYPE_BOOL", (False,), _BEAMS),
        _key("early_stopping", "TYPE_BOOL", (False,), _BEAMS),
        _key("logprobs", "TYPE_INT32", why="ask for return_log_probs"),
        _key("prompt_logprobs", "TYPE_INT32", why="those of the prompt are not computed"),
        _key("detokenize", "TYPE_BOOL", (True,), _PIECES),
        _key("skip_special_tokens", "TYPE_BOOL", (True,), _SPECIAL),
        _key("spaces_between_special_tokens", "TYPE_BOOL", (True, False), _SPECIAL),
        _key("include_stop_str_in_output", "TYPE_BOOL", (False,), "the answer ends before a stop word"),
        _key("truncate_prompt_tokens", "TYPE_INT32", why="a prompt is taken whole or refused"),
        _key("allowed_token_ids", "TYPE_STRING", why="use logit_bias or a guide"),
    ),
    "TensorRT-LLM's inflight batcher": (
        _same("runtime_top_k", "top_k"),
        _same("runtime_top_p", "top_p"),
        _same("random_seed", "seed"),
        _same("min_length", "min_tokens"),
        _same("request_output_len", "max_tokens"),
        Name(
            "end_id",
            "TYPE_INT32",
            of_model="end",
            why="the model's own ids end an answer: see stop_token_ids, ignore_eos",
        ),
        Name("pad_id", "TYPE_INT32", of_model="pad", why="the model's own id is used"),
        Name("beam_width", "TYPE_INT32", neutral=(1,), why=_BEAMS),
        Name("length_penalty", "TYPE_FP32", neutral=(1.0,), why=_BEAMS),
        Name("len_penalty", "TYPE_FP32", neutral=(1.0,), why=_BEAMS),
        Name("beam_search_diversity_rate", "TYPE_FP32", neutral=(0.0,), why=_BEAMS),
        Name("num_return_sequences", "TYPE_INT32", neutral=(1,), why=_ONE),
        Name("return_context_logits", "TYPE_BOOL", neutral=(False,), why=_LOGITS),
        Name("return_generation_logits", "TYPE_BOOL", neutral=(False,), why=_LOGITS),
        Name("return_perf_metrics", "TYPE_BOOL", neutral=(False,), why=_TIMES),
        Name("decoder_text_input", "TYPE_STRING", neutral=("",), why="the model has no encoder"),
        Name("embedding_bias_words", "TYPE_STRING", (-1,), neutral=("",), why="use logit_bias, which has token ids"),
        Name("embedding_bias_weights", "TYPE_FP32", (-1,), neutral=(0.0,), why="use logit_bias, which has token ids"),
        Name("num_draft_tokens", "TYPE_INT32", neutral=(0,), why=_DRAFTS),
        Name("use_draft_logits", "TYPE_BOOL", neutral=(False,), why=_DRAFTS),
        Name("prompt_embedding_table", "TYPE_FP16", (-1, -1), why=_PROMPT_TABLES),
        Name("prompt_vocab_size", "TYPE_INT32", neutral=(0,), why=_PROMPT_TABLES),
        Name("prompt_table_extra_id", "TYPE_UINT64", why=_PROMPT_TABLES),
        Name("lora_task_id", "TYPE_UINT64", why=_LORA),
        Name("lora_weights", "TYPE_FP16", (-1, -1), why=_LORA),
        Name("lora_config", "TYPE_INT32", (-1, 3), why=_LORA),
        Name("image_input", "TYPE_FP16", (-1, 3, -1, -1), why=_IMAGES),
        Name("image_bytes_input", "TYPE_UINT8", (-1, -1, -1, -1), why=_IMAGES),
        Name("image_url_input", "TYPE_STRING", neutral=("",), why=_IMAGES),
        Name("video_bytes_input", "TYPE_UINT8", (-1, -1, -1, -1), why=_IMAGES),
    ),
    "TensorRT-LLM's llmapi": (
        _same("streaming", "stream"),
        _same("sampling_param_max_tokens", "max_tokens"),
        _same("sampling_param_temperature", "temperature"),
        _same("sampling_param_top_k", "top_k"),
        _same("sampling_param_top_p", "top_p"),
        _same("sampling_param_frequency_penalty", "frequency_penalty"),
        _same("sampling_param_presence_penalty", "presence_penalty"),
        _same("sampling_param_stop", "stop_words"),
        _same("sampling_param_seed", "seed"),
        _same("sampling_param_exclude_input_from_output", "exclude_input_in_output"),
        Name("sampling_param_best_of", "TYPE_INT32", neutral=(1,), why=_ONE),
        Name("sampling_param_return_perf_metrics", "TYPE_BOOL", neutral=(False,), why=_TIMES),
        Name("return_stop_reason", "TYPE_BOOL", neutral=(False,), why="see finish_reason"),
        Name("image_url", "TYPE_STRING", (-1,), neutral=("",), why=_IMAGES),
        Name("lora_id", "TYPE_UINT64", why=_LORA),
        Name("lora_name", "TYPE_STRING", neutral=("",), why=_LORA),
        Name("lora_path", "TYPE_STRING", neutral=("",), why=_LORA),
        Name("lora_ckpt_source", "TYPE_STRING", neutral=("", "hf", "nemo"), why=_LORA),
    ),
}
KNOWN = {name.name: name for names in NAMES.values() for name in names}
OWN = {field.name: field for field in INPUTS}
# Every tensor that config.pbtxt declares.
TAKEN = (*INPUTS, *(name.field for name in KNOWN.values() if name.declared))
