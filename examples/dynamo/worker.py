"""A worker of NVIDIA Dynamo over a bundle: Dynamo's frontend gives it tokens, finds its replicas, and chooses one.

    pip install ai-dynamo                    # tried: 1.6.1
    export DYN_FILE_KV=/tmp/dynamo           # where workers and frontend of one machine find each other
    python examples/dynamo/worker.py ./v2-lite &
    python -m dynamo.frontend --discovery-backend file --request-plane tcp --event-plane zmq --http-port 8000

Each further worker.py is a replica. On several machines: --discovery etcd, or kubernetes under Dynamo's operator.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
from dynamo.llm.exceptions import InvalidArgument
from dynamo.runtime import DistributedRuntime

from deepseek_trt import LLM, DeepseekTrtError, Guide, Piece, SamplingParams

# Fields of a request by group: honoured under the name of SamplingParams, or taken with these values alone.
HONOURED = {
    "stop_conditions": ("max_tokens", "min_tokens", "stop", "ignore_eos"),
    "sampling_options": (
        *("temperature", "top_p", "top_k", "min_p", "seed"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    ),
    "output_options": ("logprobs",),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
}
STOP_IDS = ("stop_token_ids", "stop_token_ids_visible", "stop_token_ids_hidden")
GUIDES = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}


def params_of(request: dict[str, Any], llm: LLM) -> SamplingParams:
    """What the request says, and for the rest the bundle's generation_config.json. InvalidArgument names a field."""
    given: dict[str, Any] = {"seed": secrets.randbits(64)}
    for group, honoured in HONOURED.items():
        for name, value in (request.get(group) or {}).items():
            if value is None or value in ([], {}) or value in NEUTRAL.get(name, ()):
                continue
            if name in honoured:
                given[name] = value
            elif name in STOP_IDS:
                given["stop_token_ids"] = (*given.get("stop_token_ids", ()), *value)
            elif name == "guided_decoding":
                given["guide"] = guide_of(value)
            elif name != "formatted_prompt":  # the text that token_ids stand for
                raise InvalidArgument(f"{name} {str(value)[:80]}: is not supported")
    if given.get("top_k") == -1:
        given["top_k"] = 0
    stop = given.pop("stop", ())
    return llm.defaults.params(**given, stop=(stop,) if isinstance(stop, str) else tuple(stop))


def guide_of(wanted: dict[str, Any]) -> Guide:
    kinds = {name: value for name, value in wanted.items() if value is not None}
    if len(kinds) != 1 or not kinds.keys() <= GUIDES.keys():
        raise InvalidArgument(f"guided_decoding {sorted(kinds)}: give one of {', '.join(GUIDES)}")
    ((name, value),) = kinds.items()
    if name == "choice":
        return Guide.choice(value)
    schema = name == "json" and not isinstance(value, str)
    return Guide.json_schema(value) if schema else Guide(GUIDES[name], value)


def chunk_of(piece: Piece, params: SamplingParams) -> dict[str, Any]:
    chunk: dict[str, Any] = {"index": 0, "token_ids": [piece.token_id]}
    if piece.finish_reason:
        chunk["finish_reason"] = piece.finish_reason
    if params.logprobs is not None:
        chunk["log_probs"] = [piece.logprob]
        ranked = enumerate(piece.top_logprobs, 1)
        chunk["top_logprobs"] = [[{"rank": r, "token_id": id, "logprob": value} for r, (id, value) in ranked]]
    return chunk


async def until_stopped(pieces: Any, context: Any) -> AsyncIterator[Piece]:
    """The pieces as they come, up to where nobody wants more: also while none comes."""
    stopped = asyncio.ensure_future(context.async_killed_or_stopped())
    try:
        while True:
            coming = asyncio.ensure_future(anext(pieces))
            await asyncio.wait({coming, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                with suppress(asyncio.CancelledError):
                    await coming
                return
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
    finally:
        stopped.cancel()


class Worker:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._before = llm.text.encode("a")[:1] if llm.text else []
        if llm.text and llm.text.decode(self._before):  # a token of text: nothing stands before texts
            self._before = []

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        ids = request["token_ids"]
        try:
            params = params_of(request, self._llm)
            # Dynamo puts no BOS before the prompt of a completion; a chat template has it.
            prompt = ids if ids[:1] == self._before else [*self._before, *ids]
            async with aclosing(self._llm.astream(prompt, params)) as pieces:
                async for piece in until_stopped(pieces, context):
                    yield chunk_of(piece, params)
        except DeepseekTrtError as error:
            raise InvalidArgument(str(error)) from None


async def serve(arguments: argparse.Namespace) -> None:
    runtime = DistributedRuntime(
        asyncio.get_running_loop(),
        arguments.discovery,
        "tcp",
        event_plane="zmq" if arguments.discovery == "file" else None,
    )
    endpoint = runtime.endpoint(arguments.endpoint)
    with LLM.open(arguments.bundle, backend=arguments.backend) as llm:
        config = ModelRuntimeConfig()
        config.max_num_seqs, config.total_kv_blocks = llm.scheduler.limits.max_running, llm.session.pages - 1
        await register_model(
            ModelInput.Tokens,
            ModelType.Chat | ModelType.Completions,
            endpoint,
            str(arguments.bundle),
            arguments.name or arguments.bundle.resolve().name,
            worker_type=WorkerType.Aggregated,
            kv_cache_block_size=llm.session.cache.page_size,
            runtime_config=config,
            ignore_weights=True,
        )
        await endpoint.serve_endpoint(Worker(llm).generate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", help="of the model, by default the bundle's folder name")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--endpoint", default="deepseek.worker.generate")
    parser.add_argument("--discovery", default="file", choices=("file", "etcd", "kubernetes"))
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
