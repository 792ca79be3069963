"""Options that several commands share: which backend runs a bundle, and how tokens are sampled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

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

# Option and field of SamplingParams alike, but for --stop-token-id.
_SAMPLING = (
    click.option("--max-new-tokens", default=128, show_default=True),
    click.option("--temperature", default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", default=0, show_default=True, help="0 keeps all tokens."),
    click.option("--top-p", default=1.0, show_default=True, help="Keep the likeliest that hold this share."),
    click.option("--min-p", default=0.0, show_default=True, help="Keep those with this share of the likeliest's."),
    click.option("--seed", default=0, show_default=True, help="Prompt i samples with seed + i."),
    click.option("--repetition-penalty", default=1.0, show_default=True, help="On tokens of prompt and answer."),
    click.option("--presence-penalty", default=0.0, show_default=True, help="Once a token of the answer."),
    click.option("--frequency-penalty", default=0.0, show_default=True, help="Once an occurrence in the answer."),
    click.option("--stop", multiple=True, help="End before this text; may be given several times."),
    click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True, help="End with this token, too."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the model's own stop tokens."),
    click.option("--min-tokens", default=0, show_default=True, help="No stop counts before."),
    click.option("--logprobs", type=int, help="Give log-probabilities, and those of this many likeliest tokens."),
)
_FIELDS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logprobs",
)


def sampling_options(command: Command) -> Command:
    """Give a command every sampling option, and its function their SamplingParams as `params`."""

    @functools.wraps(command)
    def with_params(**options: Any) -> Any:
        from deepseek_trt.engines.generation.params import SamplingParams

        params = SamplingParams(**{name: options.pop(name) for name in _FIELDS})
        return command(params=params, **options)

    return functools.reduce(lambda function, option: option(function), reversed(_SAMPLING), with_params)  # type: ignore[return-value]
