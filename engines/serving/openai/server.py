"""serve: a bundle behind OpenAI's API until a signal or the engine's end, which runs in a process of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.model_repository.sizes import SizeRequest, settings_for
from deepseek_trt.engines.serving.heart import STALL_SECONDS
from deepseek_trt.engines.serving.openai.app import Door
from deepseek_trt.engines.serving.openai.running import Announce, Parts, run
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.text.parsing.choose import AUTO, Formats, choose_formats
from deepseek_trt.engines.text.template_files import choose_template
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import FEATURES
from deepseek_trt.export.errors import BackendError, BundleError, RequestError
from deepseek_trt.export.text.generation_config import GenerationConfig
from deepseek_trt.plugins.isolated import plain_environment, python_command

_ENGINE_ENDS = 10  # seconds for the engine's process to end by itself
_OPEN = Door()
_MODULE = "deepseek_trt.engines.serving.process.engine"


@dataclass(frozen=True)
class ServeRequest:
    """names: what requests call the model by; the bundle's folder name where there is none.

    drain_seconds: how long answers may go on after a signal. stall_seconds: how long the engine may stand still before
    it counts as failed. certificate and key: PEM files, for HTTPS.
    """

    bundle: Path
    sizes: SizeRequest
    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    door: Door = _OPEN
    drain_seconds: int = 20
    certificate: Path | None = None
    key: Path | None = None
    reasoning_parser: str = AUTO
    tool_parser: str = AUTO
    stall_seconds: float = STALL_SECONDS


def serve(request: ServeRequest, say: Callable[[str], None], announce: Announce) -> None:
    """Returns after SIGTERM or SIGINT, when answers have ended.

    `say` is told what people should know, and `announce` where the server is, once it is there, and its models' names.
    Raises BackendError where the engine ends before, and BundleError, ConfigError and RequestError for what cannot be
    served.
    """
    parts = _parts(request)
    own, served = parts.bundle.manifest.model.max_position_embeddings, parts.settings.max_model_len
    if served < own:
        say(f"{served} tokens per request, of the model's {own}: as --max-model-len, the cache or the plans have it")
    with _bound(request.host, request.port) as listener, _engine_process() as (process, ours):
        reason = asyncio.run(run(parts, listener, ours, process.pid, say, announce))
        ours.close()  # the engine ends with it
        code = _ended(process)
    if reason:
        raise BackendError(f"{reason}{_killed(code)}; what it said stands above")


def _parts(request: ServeRequest) -> Parts:
    bundle = Bundle.open(request.bundle)
    text = Text(bundle) if bundle.tokenizer_path or bundle.manifest.task != FEATURES else None
    settings = dataclasses.replace(_settings(bundle, request.sizes), drain_ms=1000 * request.drain_seconds)
    defaults = _defaults(bundle, settings.generation_config)
    names = request.names or (bundle.path.resolve().name,)
    certificates = _certificates(request)
    formats, stall = _formats(text, request), request.stall_seconds
    return Parts(bundle, text, settings, formats, defaults, names, request.door, certificates, stall)


def _defaults(bundle: Bundle, generation_config: bool) -> SamplingDefaults:
    """The bundle's, and where it does not speak of temperature OpenAI's: 1. do_sample false speaks of it: greedy."""
    defaults = SamplingDefaults.of(bundle.path) if generation_config else SamplingDefaults()
    greedy = generation_config and GenerationConfig.read(bundle.path).do_sample is False
    if greedy or "temperature" in dict(defaults.values):
        return defaults
    return dataclasses.replace(defaults, values=(*defaults.values, ("temperature", 1.0)))


def _settings(bundle: Bundle, sizes: SizeRequest) -> ServingSettings:
    """For generation as a repository's; embeddings have no cache to be sized."""
    manifest = bundle.manifest
    if manifest.task == FEATURES:
        length = manifest.model.max_position_embeddings
        return ServingSettings("ort", sizes.max_inflight, 1, length, 2, 1, 1, generation_config=False)
    if manifest.classifier is not None:
        raise BundleError(f"{bundle.path} labels texts: use deepseek-trt classify, or model-repository to serve it")
    if manifest.generation_refusal:
        raise BundleError(f"{bundle.path} cannot be served: {manifest.generation_refusal}")
    return settings_for(bundle, sizes)


def _formats(text: Text | None, request: ServeRequest) -> Formats:
    template = choose_template(text.chat.named, tools=True).text if text and text.chat.named else ""
    return choose_formats(template, request.reasoning_parser, request.tool_parser)


def _certificates(request: ServeRequest) -> tuple[Path, Path | None] | None:
    """Those of HTTPS, tried; RequestError where they are none."""
    if request.certificate is None:
        if request.key is not None:
            raise RequestError("--ssl-keyfile is given without --ssl-certfile: give both")
        return None
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(request.certificate, request.key)
    except (OSError, ssl.SSLError) as error:
        raise RequestError(f"{request.certificate}: no certificate with its key ({error}): give PEM files") from None
    return request.certificate, request.key


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, which does not listen yet; RequestError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"host {host!r}: cannot be had ({error}): give an address of this machine") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise RequestError(f"{host} port {port}: cannot be had ({error.strerror}): give another --port") from None
        yield listener


@contextmanager
def _engine_process() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A process with an engine that waits for its Setup on the other end of the socket; it ends with the context."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command, env = python_command(_MODULE, theirs.fileno()), plain_environment()
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env, stdin=subprocess.DEVNULL, stdout=2)
        try:
            yield process, ours
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(_ENGINE_ENDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _killed(code: int) -> str:
    return f" (killed by signal {-code})" if code < 0 else f" (exit code {code})" if code else ""
