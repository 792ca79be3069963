"""deepseek-trt generate"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_trt.cli.options import (
    backend_option,
    sampling_options,
    speculate_option,
    threads_option,
    verify_option,
)
from deepseek_trt.cli.printing.output import output_options, print_json, say, step, write, write_model_text
from deepseek_trt.cli.prompting.prompts import Prompts, prompt_options
from deepseek_trt.cli.prompting.speed import Speed

if TYPE_CHECKING:
    from deepseek_trt.engines.generation.answer import Result
    from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
    from deepseek_trt.engines.generation.llm import LLM
    from deepseek_trt.engines.generation.params import SamplingParams
    from deepseek_trt.engines.text.text import Text
    from deepseek_trt.export.bundle.folder import Bundle

_CHAT_CACHE_MIB = 1024


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@prompt_options
@backend_option
@sampling_options
@threads_option
@speculate_option
@verify_option
@output_options("Print one JSON object a prompt instead of streaming.")
def command(
    bundle: Path,
    prompts: Prompts,
    backend: str,
    params: SamplingParams,
    threads: int,
    speculate: str,
    as_json: bool,
) -> None:
    """Continue each prompt with the model in BUNDLE, or chat with it on a terminal where no prompt is given.

    On a terminal, control characters in an answer are shown escaped; into a pipe or file it goes as it is.

    Example: deepseek-trt generate ./v2-lite --prompt "The number of" --max-new-tokens 64
    """
    prompts.check_usage()
    if params.logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are printed with --json only")
    if not prompts.interactive:
        _answer(bundle, prompts, params, Engine(backend, threads, speculate), as_json)
    elif as_json:
        raise click.UsageError("--json is for prompts: give one")
    else:
        _chat(bundle, prompts, params, Engine(backend, threads, speculate))


@dataclass(frozen=True)
class Engine:
    """What runs the model, and how."""

    backend: str
    threads: int
    speculate: str


def _answer(path: Path, prompts: Prompts, params: SamplingParams, engine: Engine, as_json: bool) -> None:
    """Print the answers to all prompts, run as one batch, and on stderr how fast they came."""
    from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
    from deepseek_trt.engines.generation.pages import answer_lengths, pages_needed

    bundle, text = _bundle_and_text(path, wants_text=not prompts.token_ids)
    ids = prompts.encode(text)
    lengths = answer_lengths(bundle.manifest.model, ids, params.max_new_tokens)
    pages = pages_needed(bundle.manifest.cache, lengths)
    with _llm(bundle, text, pages, SchedulerLimits.for_batch(len(ids), engine.speculate), engine) as llm:
        speed = Speed()
        if len(ids) == 1 and not as_json:
            for piece in llm.stream(ids[0], params):
                speed.tick()
                write_model_text(piece.text if llm.text else f"{piece.token_id} ")
            write("\n")
        else:
            for result in llm.generate(ids, params, on_token=speed.tick):
                _print(result, as_json)
        say(speed.line)
        if engine.speculate != "off":
            say(llm.scheduler.counters.line)


def _chat(path: Path, prompts: Prompts, params: SamplingParams, engine: Engine) -> None:
    """Chat until the terminal ends; the cache holds the model's whole length, as far as it fits."""
    from deepseek_trt.cli.prompting.chat import Chat
    from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
    from deepseek_trt.engines.generation.pages import pages_needed, pages_within

    bundle, text = _bundle_and_text(path, wants_text=True)
    assert text is not None
    cache = bundle.manifest.cache
    longest = pages_needed(cache, [bundle.manifest.model.max_position_embeddings])
    pages = max(2, min(longest, pages_within(cache, _CHAT_CACHE_MIB)))
    with _llm(bundle, text, pages, SchedulerLimits(max_running=1, speculate=engine.speculate), engine) as llm:
        Chat(llm, text, params, prompts.chat).run()


def _bundle_and_text(path: Path, wants_text: bool) -> tuple[Bundle, Text | None]:
    from deepseek_trt.engines.sessions.opening import check_generates
    from deepseek_trt.engines.text.text import Text
    from deepseek_trt.export.bundle.folder import Bundle

    step("opening the bundle and its text files", shown=False)
    bundle = Bundle.open(path)
    check_generates(bundle)
    return bundle, Text(bundle) if bundle.tokenizer_path or wants_text else None


@contextmanager
def _llm(bundle: Bundle, text: Text | None, pages: int, limits: SchedulerLimits, engine: Engine) -> Iterator[LLM]:
    """Give an LLM with so many pages; say on stderr what runs it, and why."""
    from deepseek_trt.cli.printing.progress import weight_progress
    from deepseek_trt.engines.generation.drafting.drafter import check_drafts
    from deepseek_trt.engines.generation.llm import LLM
    from deepseek_trt.engines.sessions.opening import SessionRequest, open_session

    check_drafts(bundle, engine.speculate)
    step("loading the weights", shown=False)
    with weight_progress() as progress:
        started = open_session(SessionRequest(bundle, pages, engine.threads, progress=progress), engine.backend)
    step(started.line)
    with LLM(started.session, bundle.manifest.model, text, limits, started.choice) as llm:
        yield llm


def _facts(result: Result) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "prompt_ids": result.prompt_ids,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "text": result.text,
    }
    if result.logprobs is not None:
        facts |= {"logprobs": result.logprobs, "top_logprobs": result.top_logprobs}
    return facts


def _print(result: Result, as_json: bool) -> None:
    """One of several answers."""
    if as_json:
        print_json(_facts(result))
        return
    body = result.text if result.text is not None else " ".join(map(str, result.token_ids))
    write(f"--- {result.finish_reason}, {len(result.token_ids)} tokens\n")
    write_model_text(f"{body}\n")
