"""What served models take and give: a generator by TensorRT-LLM's names, and a classifier.

Names that other servers have for the same are in names/table.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One tensor of a request or a response; dims leave out the batch, optional is for inputs, `what` for people."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True
    what: str = ""


_MANY = (-1,)
_NOT_RETURNED = "true unless given: false leaves the output out"

INPUTS = (
    Field("text_input", "TYPE_STRING", what="the prompt; BOS is put before it, unless it begins with BOS itself"),
    Field(
        "messages",
        "TYPE_STRING",
        what="instead: a JSON list of `{role, content}`, rendered with the checkpoint's chat template; content is text "
        "or a list of text parts, other keys (`name`, `tool_calls`, `tool_call_id`) are the template's",
    ),
    Field(
        "tools",
        "TYPE_STRING",
        what="with `messages`: a JSON list of tools as OpenAI's API has them; a template called `tool_use` is taken "
        "where there is one",
    ),
    Field(
        "chat_template_kwargs",
        "TYPE_STRING",
        what='with `messages`: a JSON object of what the template reads beside, e.g. `{"thinking": true}`; `documents` '
        "and `add_generation_prompt` may be in it",
    ),
    Field("max_tokens", "TYPE_INT32", what="128 unless given (see below); cut to what the model's length leaves"),
    Field("min_tokens", "TYPE_INT32", what="0 unless given: before it nothing ends the answer"),
    Field(
        "stream", "TYPE_BOOL", what="pieces as they come; without it one response, over gRPC and `generate_stream` too"
    ),
    Field(
        "stop_words",
        "TYPE_STRING",
        _MANY,
        what="the answer ends before the first of them; they may span tokens, and hold special tokens, which are "
        "looked for as they are written and never shown; at most 128 of 1,024 characters",
    ),
    Field(
        "stop_token_ids", "TYPE_INT32", _MANY, what="the answer ends with one of these tokens, too, which has no text"
    ),
    Field("ignore_eos", "TYPE_BOOL", what="the model's own end of an answer does not count"),
    Field("bad_words", "TYPE_STRING", _MANY, what="refused, unless empty: see `logit_bias`"),
    Field("temperature", "TYPE_FP32", what="greedy unless given, see below"),
    Field("top_k", "TYPE_INT32", what="0 or -1 keep all"),
    Field("top_p", "TYPE_FP32"),
    Field("min_p", "TYPE_FP32"),
    Field("repetition_penalty", "TYPE_FP32"),
    Field("presence_penalty", "TYPE_FP32"),
    Field("frequency_penalty", "TYPE_FP32"),
    Field(
        "logit_bias", "TYPE_STRING", what='a JSON object of token ids and what is added to their logits, `{"42": -100}`'
    ),
    Field(
        "seed",
        "TYPE_UINT64",
        what="the same seed gives the same answer, whatever else is in the batch; another one each time unless given",
    ),
    Field(
        "guided_decoding_guide_type",
        "TYPE_STRING",
        what="the form of the answer: `json` (any object), `json_schema`, `regex`, `choice` (a JSON list of texts), "
        "`ebnf_grammar` or `grammar` (llama.cpp's form or Lark's)",
    ),
    Field("guided_decoding_guide", "TYPE_STRING", what="the schema, expression, texts or grammar"),
    Field(
        "sampling_parameters",
        "TYPE_STRING",
        what="a JSON object of any of these names, as vllm_backend has it; see below",
    ),
    Field("timeout_ms", "TYPE_INT32", what="from arrival to the last token; the answer ends with an error"),
    Field("exclude_input_in_output", "TYPE_BOOL", what="true unless given: the answer alone; see below"),
    Field("return_log_probs", "TYPE_BOOL", what="`output_log_probs` and `cum_log_probs` too"),
    Field("return_cumulative_logprob", "TYPE_BOOL", what="`cumulative_logprob` too"),
    Field("return_finish_reason", "TYPE_BOOL", what=_NOT_RETURNED),
    Field("return_num_input_tokens", "TYPE_BOOL", what=_NOT_RETURNED),
    Field("return_num_output_tokens", "TYPE_BOOL", what=_NOT_RETURNED),
)

OUTPUTS = (
    Field(
        "text_output", "TYPE_STRING", what="the whole answer, or the next piece of it: whole characters, spaces kept"
    ),
    Field("finish_reason", "TYPE_STRING", what="`stop` or `length` on the last response, else empty"),
    Field("num_input_tokens", "TYPE_INT32", what="of the prompt"),
    Field("num_output_tokens", "TYPE_INT32", what="of this response; the sum over a stream is the answer's"),
    Field("output_log_probs", "TYPE_FP32", _MANY, what="with `return_log_probs`: of this response's tokens"),
    Field("cum_log_probs", "TYPE_FP32", what="with `return_log_probs`: the sum so far"),
    Field("cumulative_logprob", "TYPE_FP32", what="with `return_cumulative_logprob`: the same by vllm_backend's name"),
)

CLASSIFIER_INPUTS = (Field("text_input", "TYPE_STRING", optional=False),)


def classifier_outputs(labels: int) -> tuple[Field, ...]:
    """The best label and its score; scores and logits of all, in the labels' order."""
    return (
        Field("label", "TYPE_STRING"),
        Field("score", "TYPE_FP32"),
        Field("scores", "TYPE_FP32", (labels,)),
        Field("logits", "TYPE_FP32", (labels,)),
    )
