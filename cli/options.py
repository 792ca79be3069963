"""Options that several commands share: which backend runs a bundle, and how tokens are sampled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from deepseek_trt.engines.generation.params import SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])

BACKENDS = ("auto", "ort", "ort-cuda", "tensorrt", "torch")
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="auto: tensorrt where plans and a GPU are, else ort. What was chosen and why is said on stderr.",
)
threads_option = click.option("--threads", default=0, show_default=True, help="0 lets the backend choose.")

# Help of each field of SamplingParams, whose defaults the options have.
_SAMPLING_HELP = {
    "max_new_tokens": None,
    "temperature": "0 is greedy.",
    "top_k": "0 keeps all tokens.",
    "top_p": "Keep the likeliest that hold this share.",
    "min_p": "Keep those with this share of the likeliest's.",
    "seed": "Prompt i samples with seed + i.",
    "repetition_penalty": "On tokens of prompt and answer.",
    "presence_penalty": "Once a token of the answer.",
    "frequency_penalty": "Once an occurrence in the answer.",
    "stop": "End before this text; may be given several times.",
    "stop_token_ids": "End with this token, too.",
    "ignore_eos": "Go on after the model's own stop tokens.",
    "min_tokens": "No stop counts before.",
    "logprobs": "Give log-probabilities, and those of this many likeliest tokens.",
}
_NAMES = {"stop_token_ids": "--stop-token-id"}  # given once a token
_TYPES = {"stop": str, "stop_token_ids": int, "logprobs": int}  # which the defaults do not show


def sampling_options(command: Command) -> Command:
    """Give a command every sampling option, and its function their SamplingParams as `params`."""

    @functools.wraps(command)
    def with_params(**options: Any) -> Any:
        params = SamplingParams(**{name: options.pop(name) for name in _SAMPLING_HELP})
        return command(params=params, **options)

    return functools.reduce(
        lambda function, name: _sampling_option(name)(function), reversed(_SAMPLING_HELP), with_params
    )  # type: ignore[return-value]


def _sampling_option(name: str) -> Callable[[Any], Any]:
    default = getattr(SamplingParams, name)
    return click.option(
        _NAMES.get(name, f"--{name.replace('_', '-')}"),
        name,
        default=default,
        type=_TYPES.get(name),
        is_flag=default is False,
        multiple=isinstance(default, tuple),
        show_default=type(default) in (int, float),
        help=_SAMPLING_HELP[name],
    )
