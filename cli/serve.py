"""deepseek-trt serve"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_trt.cli.options import FiniteRange, size_options, verify_option
from deepseek_trt.cli.printing.output import output_options, print_json, say
from deepseek_trt.engines.serving.heart import STALL_SECONDS
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.files import read_file

if TYPE_CHECKING:
    from deepseek_trt.engines.model_repository.sizes import SizeRequest

_EXTRA = ("starlette", "uvicorn", "msgspec")
_MOST_KEYS = 2**20  # bytes of a file of keys
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", "api_keys", multiple=True, help="A key that requests must bear; may be given several times.")
@click.option("--api-key-file", type=_FILE, help="A file with such keys, one a line: others see a command's options.")
@click.option(
    "--served-model-name", "names", multiple=True, help="What requests call the model.  [default: BUNDLE's folder name]"
)
@verify_option
@size_options
@click.option("--reasoning-parser", default="auto", show_default=True, help="auto, deepseek_r1 or off.")
@click.option("--tool-parser", default="auto", show_default=True, help="auto, deepseek_v3, deepseek_v31 or off.")
@click.option("--max-body-mib", type=click.IntRange(1, 1024), default=16, show_default=True, help="Of one request.")
@click.option(
    "--drain-seconds", type=click.IntRange(0, 86400), default=20, show_default=True, help="For answers, after SIGTERM."
)
@click.option(
    "--stall-seconds",
    type=FiniteRange(1, 86400),
    default=STALL_SECONDS,
    show_default=True,
    help="Without a step: it failed.",
)
@click.option("--ssl-certfile", type=_FILE, help="Certificate for HTTPS, in PEM.")
@click.option("--ssl-keyfile", type=_FILE, help="Its key, where the certificate's file does not hold it.")
@output_options("Print where the server is, once it is there, as one line of JSON.")
def command(
    bundle: Path,
    api_keys: tuple[str, ...],
    api_key_file: Path | None,
    sizes: SizeRequest,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve BUNDLE with OpenAI's API: completions, chat, models; embeddings for a feature-extraction bundle.

    Example: deepseek-trt serve ./v2-lite --port 8000 --served-model-name v2-lite
    """
    _check_extra()
    from deepseek_trt.engines.serving.openai.app import Door
    from deepseek_trt.engines.serving.openai.server import ServeRequest, serve

    door = Door(_keys(api_keys, api_key_file), options.pop("max_body_mib") * 2**20)
    certificate, key = options.pop("ssl_certfile"), options.pop("ssl_keyfile")
    request = ServeRequest(bundle, sizes, door=door, certificate=certificate, key=key, **options)
    serve(request, say, lambda url, models: _announce(as_json, url, models))


def _announce(as_json: bool, url: str, models: tuple[str, ...]) -> None:
    say(f"serving {', '.join(models)} at {url}")
    if as_json:
        print_json({"url": url, "models": models})


def _check_extra() -> None:
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(f"serve needs {', '.join(missing)}: pip install 'deepseek-trt[serve]'")


def _keys(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """Keys of both places. RequestError for a file without any, and for a key that no header can hold."""
    lines = _lines(file) if file else []
    keys = [*given, *(line.strip() for line in lines if line.strip())]
    if file and len(keys) == len(given):
        raise RequestError(f"{file} holds no key: write one a line")
    if not all(key.isascii() and key.isprintable() and key == key.strip() and key for key in keys):
        raise RequestError("a key must be of printable ASCII characters without space around them: choose another")
    return tuple(keys)


def _lines(file: Path) -> list[str]:
    """RequestError for what is no regular file, or cannot be read."""
    try:
        return read_file(file, _MOST_KEYS).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror}") from None
