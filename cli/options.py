"""Options that several commands share: ranges of numbers, which backend runs a bundle, how tokens are sampled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from deepseek_trt.cli.printing.output import say
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.sessions.threads import MOST_THREADS

Command = TypeVar("Command", bound=Callable[..., Any])

MOST = 2**31 - 1  # of what is counted in 32 bits
COUNT = click.IntRange(1, MOST)


class FiniteRange(click.FloatRange):
    """A range that neither nan nor an infinity lies in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


BACKENDS = ("auto", "ort", "ort-cuda", "tensorrt", "torch")
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="auto: tensorrt where plans and a GPU are, else ort. What was chosen and why is said on stderr.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(0, MOST_THREADS),
    default=0,
    show_default=True,
    help="Of the processor; 0 lets the backend choose.",
)

# Spelled out: nothing of the engines is imported for a help text.
speculate_option = click.option(
    "--speculate",
    type=click.Choice(["off", "lookup", "mtp", "auto"]),
    default="off",
    show_default=True,
    help="Propose tokens: those that followed the last ones before, or of the layer of an export with --mtp; the same "
    "answers. auto: the latter if there, while it pays.",
)


def _opened(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    from deepseek_trt.export.bundle.folder import Bundle

    Bundle.open(path)
    return path


# Opened before the packages that the command itself needs are imported, which takes seconds.
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path), callback=_opened)


def verify_option(command: Command) -> Command:
    """Give a command --verify, which hashes all of its `bundle` before anything else is done."""

    @functools.wraps(command)
    def verified(verify: bool, **options: Any) -> Any:
        if verify:
            from deepseek_trt.cli.printing.progress import weight_progress
            from deepseek_trt.export.bundle.folder import Bundle

            with weight_progress("hashing weights") as progress:
                Bundle.open(options["bundle"], verify=True, progress=progress)
        return command(**options)

    text = "Hash all files of BUNDLE, the weights, too: those are else hashed once, and again when they change."
    return click.option("--verify", is_flag=True, help=text)(verified)  # type: ignore[return-value]


_PAGES = "Pages of the cache, the scratch page counted.  [default: what --cache-mib holds]"
_SIZE_OPTIONS = (
    click.option(
        "--backend",
        type=click.Choice(["auto", "ort", "tensorrt"]),
        default="auto",
        show_default=True,
        help="auto: the plans where there are some and a GPU is visible, else ONNX Runtime.",
    ),
    click.option(
        "--max-inflight", type=COUNT, default=64, show_default=True, help="Requests taken at once; more are refused."
    ),
    click.option("--max-running", type=COUNT, default=32, show_default=True, help="Those that own cache pages."),
    click.option(
        "--max-model-len",
        type=click.IntRange(2, MOST),
        help="Tokens of prompt and answer together.  [default: the model's or the plans', or what the cache holds]",
    ),
    click.option("--pages", type=click.IntRange(2, MOST), help=_PAGES),
    click.option("--cache-mib", type=COUNT, help="MiB of the cache.  [default: 1024]"),
    threads_option,
    click.option(
        "--prefix-reuse/--no-prefix-reuse", default=True, show_default=True, help="Share equal prompts' pages."
    ),
    click.option(
        "--generation-config/--no-generation-config",
        default=True,
        show_default=True,
        help="Take defaults of sampling from the bundle's generation_config.json.",
    ),
    speculate_option,
)


def size_options(command: Command) -> Command:
    """Give a command of a server the options of what is served at once, as `sizes`, a SizeRequest."""

    @functools.wraps(command)
    def sized(**options: Any) -> Any:
        from deepseek_trt.engines.model_repository.sizes import SizeRequest

        sizes = {field.name: options.pop(field.name) for field in fields(SizeRequest)}
        if sizes["pages"] is not None and sizes["cache_mib"] is not None:
            raise click.UsageError("give either --pages or --cache-mib")
        return command(sizes=SizeRequest(**sizes), **options)

    return functools.reduce(lambda function, option: option(function), reversed(_SIZE_OPTIONS), sized)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Sampling:
    """How the command line takes a field of SamplingParams; None is a flag."""

    type: click.ParamType[Any] | None
    help: str


_TEXT = click.STRING
_NOT_NEGATIVE, _SHARE = click.IntRange(0, MOST), FiniteRange(0, 1)
_PENALTY = FiniteRange(-2, 2)
# Each field of SamplingParams, whose defaults the options have.
_SAMPLING = {
    "max_new_tokens": _Sampling(COUNT, "Tokens of each answer, at most."),
    "temperature": _Sampling(FiniteRange(0, MOST), "What logits are divided by; 0 is greedy."),
    "top_k": _Sampling(_NOT_NEGATIVE, "Keep so many of the likeliest tokens; 0 keeps all."),
    "top_p": _Sampling(FiniteRange(0, 1, min_open=True), "Keep the likeliest that hold this share of probability."),
    "min_p": _Sampling(_SHARE, "Keep those with this share of the likeliest's probability."),
    "seed": _Sampling(click.IntRange(0), "Prompt i samples with seed + i."),
    "repetition_penalty": _Sampling(FiniteRange(0, MOST, min_open=True), "Factor on tokens of prompt and answer."),
    "presence_penalty": _Sampling(_PENALTY, "Off a token's logit, once it is in the answer."),
    "frequency_penalty": _Sampling(_PENALTY, "Off a token's logit, each time it is in the answer."),
    "stop": _Sampling(_TEXT, "End before this text; may be given several times."),
    "stop_token_ids": _Sampling(_NOT_NEGATIVE, "End with this token, too; may be given several times."),
    "ignore_eos": _Sampling(None, "Go on after the model's own stop tokens."),
    "min_tokens": _Sampling(_NOT_NEGATIVE, "Tokens of the answer before which no stop counts."),
    "logprobs": _Sampling(_NOT_NEGATIVE, "Give natural log-probabilities, and those of this many likeliest tokens."),
}
_NAMES = {"stop_token_ids": "--stop-token-id"}  # given once a token


# What a bundle's generation_config.json may say otherwise.
_OF_BUNDLE = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def sampling_options(command: Command) -> Command:
    """Give a command every sampling option, and its function their SamplingParams as `params`.

    What is not given is generation_config.json's of the command's `bundle`, which is said, and else what help shows.
    """

    @functools.wraps(command)
    def with_params(greedy: bool, no_generation_config: bool, **options: Any) -> Any:
        given = {name: options.pop(name) for name in _SAMPLING}
        given = {name: value for name, value in given.items() if value is not None}
        if greedy and given.setdefault("temperature", 0.0):
            raise click.UsageError("give either --greedy or --temperature")
        bundle = None if no_generation_config else options.get("bundle")
        return command(params=_params(bundle, given), **options)

    names = (*reversed(_SAMPLING),)
    flags = (
        click.option("--greedy", is_flag=True, help="--temperature 0, whatever generation_config.json says."),
        click.option("--no-generation-config", is_flag=True, help="Leave the bundle's generation_config.json out."),
    )
    options = (*reversed(flags), *map(_sampling_option, names))
    return functools.reduce(lambda function, option: option(function), options, with_params)  # type: ignore[return-value]


def _params(bundle: Path | None, given: Mapping[str, Any]) -> SamplingParams:
    from deepseek_trt.engines.generation.defaults import SamplingDefaults
    from deepseek_trt.export.bundle.folder import Bundle

    defaults = SamplingDefaults.of_bundle(Bundle.open(bundle)) if bundle else SamplingDefaults()
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
        type=_SAMPLING[name].type,
        is_flag=default is False,
        multiple=isinstance(default, tuple),
        show_default=shown,
        help=_SAMPLING[name].help,
    )
