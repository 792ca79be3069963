"""What served models take and give: a generator by TensorRT-LLM's names, and a classifier."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One tensor of a request or a response; dims leave out the batch, and optional is for inputs."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


INPUTS = (
    Field("text_input", "TYPE_STRING"),
    Field("messages", "TYPE_STRING"),
    Field("tools", "TYPE_STRING"),
    Field("chat_template_kwargs", "TYPE_STRING"),
    Field("max_tokens", "TYPE_INT32"),
    Field("min_tokens", "TYPE_INT32"),
    Field("stream", "TYPE_BOOL"),
    Field("stop_words", "TYPE_STRING", (-1,)),
    Field("stop_token_ids", "TYPE_INT32", (-1,)),
    Field("bad_words", "TYPE_STRING", (-1,)),
    Field("temperature", "TYPE_FP32"),
    Field("top_k", "TYPE_INT32"),
    Field("top_p", "TYPE_FP32"),
    Field("min_p", "TYPE_FP32"),
    Field("repetition_penalty", "TYPE_FP32"),
    Field("presence_penalty", "TYPE_FP32"),
    Field("frequency_penalty", "TYPE_FP32"),
    Field("seed", "TYPE_UINT64"),
    Field("timeout_ms", "TYPE_INT32"),
    Field("exclude_input_in_output", "TYPE_BOOL"),
    Field("return_log_probs", "TYPE_BOOL"),
)

OUTPUTS = (
    Field("text_output", "TYPE_STRING"),
    Field("finish_reason", "TYPE_STRING"),
    Field("num_input_tokens", "TYPE_INT32"),
    Field("num_output_tokens", "TYPE_INT32"),
    Field("output_log_probs", "TYPE_FP32", (-1,)),
    Field("cum_log_probs", "TYPE_FP32"),
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
