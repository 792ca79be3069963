"""Options that several commands share: which backend runs a bundle, and how tokens are sampled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from deepseek_trt.cli.printing.output import say
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


# What a bundle's generation_config.json may say otherwise.
_OF_BUNDLE = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def sampling_options(command: Command) -> Command:
    """Give a command every sampling option, and its function their SamplingParams as `params`.

    What is not given is generation_config.json's of the command's `bundle`, which is said, and else what help shows.
    """

    @functools.wraps(command)
    def with_params(greedy: bool, no_generation_config: bool, **options: Any) -> Any:
        given = {name: options.pop(name) for name in _SAMPLING_HELP}
        given = {name: value for name, value in given.items() if value is not None}
        if greedy and given.setdefault("temperature", 0.0):
            raise click.UsageError("give either --greedy or --temperature")
        bundle = None if no_generation_config else options.get("bundle")
        return command(params=_params(bundle, given), **options)

    names = (*reversed(_SAMPLING_HELP),)
    flags = (
        click.option("--greedy", is_flag=True, help="--temperature 0, whatever generation_config.json says."),
        click.option("--no-generation-config", is_flag=True, help="Leave the bundle's generation_config.json out."),
    )
    options = (*reversed(flags), *map(_sampling_option, names))
    return functools.reduce(lambda function, option: option(function), options, with_params)  # type: ignore[return-value]


def _params(bundle: Path | None, given: Mapping[str, Any]) -> SamplingParams:
    from deepseek_trt.engines.generation.defaults import SamplingDefaults

    defaults = SamplingDefaults.of(bundle) if bundle else SamplingDefaults()
    for line in defaults.lines:
        say(line)
    return defaults.params(**given)


def _sampling_option(name: str) -> Callable[[Any], Any]:
    default, of_bundle = getattr(SamplingParams, name), name in _OF_BUNDLE
    shown: bool | str = f"generation_config.json's, else {default:g}" if of_bundle else type(default) in (int, float)
    return click.option(
        _NAMES.get(name, f"--{name.replace('_', '-')}"),
        name,
        default=None if of_bundle else default,
        type=type(default) if of_bundle else _TYPES.get(name),
        is_flag=default is False,
        multiple=isinstance(default, tuple),
        show_default=shown,
        help=_SAMPLING_HELP[name],
    )
