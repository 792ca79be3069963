"""Asks the served model one question, as a whole and as a stream, and checks that both agree. Standard library alone.

python3 client.py [--url http://127.0.0.1:8000] [--model NAME] [--prompt TEXT] [--max-tokens N]
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Body = dict[str, Any]


def post(url: str, path: str, body: Body) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


def whole(url: str, model: str, body: Body) -> Body:
    with post(url, f"/v2/models/{model}/generate", body) as answer:
        return json.load(answer)


def stream(url: str, model: str, body: Body) -> Iterator[Body]:
    """The pieces as they come; an error after the first one comes as a piece too."""
    with post(url, f"/v2/models/{model}/generate_stream", {**body, "stream": True}) as answer:
        for line in answer:
            if line.startswith(b"data:"):
                piece = json.loads(line[5:])
                if "error" in piece:
                    sys.exit(f"error: {piece['error']}")
                yield piece


def default_model() -> str:
    names = sorted(config.parent.name for config in Path(__file__).resolve().parent.glob("[!.]*/config.pbtxt"))
    return names[0] if names else "deepseek_v2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--prompt", default="The number of")
    parser.add_argument("--max-tokens", type=int, default=32)
    given = parser.parse_args()
    body = {"text_input": given.prompt, "max_tokens": given.max_tokens}
    streamed = ""
    try:
        for piece in stream(given.url, given.model, body):
            streamed += piece["text_output"]
            print(piece["text_output"], end="", flush=True)
        print()
        answer = whole(given.url, given.model, body)
    except urllib.error.HTTPError as error:
        sys.exit(f"error: {error.code} {error.read().decode(errors='replace')}")
    except OSError as error:
        sys.exit(f"error: {given.url}: {error}")
    if answer["text_output"] != streamed:
        sys.exit(f"error: the whole answer differs from the streamed one: {answer['text_output']!r}")
    print(f"{answer['num_output_tokens']} tokens, {answer['finish_reason']}; streamed and whole agree", file=sys.stderr)


if __name__ == "__main__":
    main()
