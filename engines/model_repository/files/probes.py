"""What supervise.py knows of the models' health by their metrics, and the port that says it. Standard library alone."""

import http.server
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping

from heart import Heart

Pulses = dict[str, dict[str, float]]  # by model, by metric

PATHS = {"/health/live": "live", "/health/ready": "ready"}
WATCHED = re.compile(r"^deepseek_trt_(heartbeats_total|engine_up|accepting)\{(.*)\} (\S+)$", re.MULTILINE)
MODEL = re.compile(r'\bmodel="([^"]*)"')


def pulses(metrics: str) -> Pulses:
    """Of models that have a heart; those of other tools, and of older versions, have none."""
    found: Pulses = {}
    for name, labels, value in WATCHED.findall(metrics):
        model = MODEL.search(labels)
        if model:
            found.setdefault(model[1], {})[name] = float(value)
    return found


class Health:
    """Looks at all hearts, the server's among them, which beats when it answers."""

    def __init__(self, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self.reset()

    def reset(self) -> None:
        """The server starts, or starts again."""
        self.server, self.answers, self.up = Heart(self.stall_seconds), 0, False
        self.hearts: dict[str, Heart] = {}
        self.beating: Pulses = {}
        self.status: int | None = None

    def look(self, status: int | None, beating: Pulses, cpu: Mapping[str, float | None], elapsed: float) -> None:
        """`status` is the server's answer to whether it is ready; `cpu` is processor seconds by model, "" the server's.

        A model without a process is not loaded: its count stands, and its heart begins anew when it is loaded again.
        Asked about a model before it is up, tritonserver 2.51 crashes: up means that it has said that it is ready.
        """
        self.up = self.up or status == 200
        self.answers += status is not None
        self.status, self.beating = status, beating or self.beating
        self.server.look(self.answers or None, cpu.get(""), elapsed)
        for model in self.beating:
            if model not in cpu:
                self.hearts.pop(model, None)
                continue
            heart = self.hearts.setdefault(model, Heart(self.stall_seconds))
            heart.look(beating.get(model, {}).get("heartbeats_total"), cpu.get(model), elapsed)

    def stopped(self) -> list[str]:
        """Models whose hearts stand still."""
        return [model for model, heart in self.hearts.items() if heart.stopped]

    def why_not(self, kind: str) -> str:
        """What is wrong, or nothing: "live" is that nobody must start it again, "ready" that requests are taken."""
        if not self.up:
            return "the server is starting"
        failed = [model for model, pulse in self.beating.items() if pulse.get("engine_up") == 0]
        if failed:
            return f"the engine of {', '.join(failed)} has failed"
        if kind == "live":
            return "the server does not answer" if self.server.stopped else ""
        if self.status != 200:
            return "a model is not loaded" if self.status else "the server does not answer"
        full = [model for model, pulse in self.beating.items() if pulse.get("accepting") == 0]
        return f"{', '.join(full)}: no request is taken now" if full else ""


def serve_probes(address: str, port: int, why_not: Callable[[str], str]) -> None:
    """Answer GET of PATHS from now on, in threads: 200, or 503 and a line that says what is wrong."""

    class Probe(http.server.BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            kind = PATHS.get(self.path)
            wrong = why_not(kind) if kind else f"ask {' or '.join(PATHS)}"
            body = f"{wrong or 'ok'}\n".encode()
            self.send_response((503 if wrong else 200) if kind else 404)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815, as the base class calls it

        def log_message(self, format: str, *values: object) -> None:
            """Probes come every few seconds: not a line of log each."""

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        daemon_threads = True

    try:
        server = Server((address, port), Probe)
    except (OSError, OverflowError) as error:
        sys.exit(f"serve.sh: --probe-port {port} of {address}: cannot be had ({error})")
    threading.Thread(target=server.serve_forever, daemon=True).start()
