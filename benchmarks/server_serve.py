"""`deepseek-trt serve` as benchmarks/server.py runs it: with the members of the tests' tritonserver."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_harness import harness

ROOT = Path(__file__).parents[1]
_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from deepseek_trt.cli.main import main; main()"


def write_package(folder: Path, session: Path) -> Path:
    """A folder to import the package from, a copy with another file in the place of ONNX Runtime's session."""
    package = folder / "deepseek_trt"
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "api", package, ignore=unwanted)
    for name in ("cli", "engines", "export", "plugins", "validate"):
        shutil.copytree(ROOT / name, package / name, ignore=unwanted)
    shutil.copyfile(session, package / "engines" / "sessions" / "ort.py")
    return folder


@dataclass
class Serve(harness.Server):  # type: ignore[misc,name-defined]
    """`repository` is a bundle here; `package` the folder to import deepseek_trt from, by default this process's."""

    package: Path | None = None

    def spawn(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.http,) = harness.free_ports(1)
        self.metrics_port = self.http
        self.shared = f"deepseek-trt-serve-{self.http}-"  # it has none
        self.log_file = self.folder / f"serve-{self.http}.log"
        first = str(self.package or next((path for path in sys.path if (Path(path) / "deepseek_trt").is_dir()), ROOT))
        arguments = ["serve", str(self.repository), "--port", str(self.http), *self.flags]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, first, *arguments],
                env=os.environ,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ready(self) -> bool:
        try:
            return bool(self.get("/health").status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def pids(self) -> list[int]:
        return [self.process.pid, *harness.descendants(self.process.pid)]

    def generate(self, model: str = "", /, **inputs: Any) -> Any:
        return self.post("/v1/completions", _body(inputs))

    def stream(self, model: str = "", /, **inputs: Any) -> Iterator[dict[str, Any]]:
        """Events as they come; closing the iterator closes the connection."""
        connection = self._asked({**_body(inputs), "stream": True})
        try:
            yield from harness.events_of(connection.getresponse())
        finally:
            connection.close()

    def ask_whole(self, **inputs: Any) -> http.client.HTTPConnection:
        """A connection on which an answer is being waited for."""
        return self._asked(_body(inputs))

    def _asked(self, body: dict[str, Any]) -> http.client.HTTPConnection:
        connection = self._connection()
        connection.request("POST", "/v1/completions", json.dumps(body))
        made: http.client.HTTPConnection = connection
        return made


def _body(inputs: dict[str, Any]) -> dict[str, Any]:
    given = {"prompt" if name == "text_input" else name: value for name, value in inputs.items()}
    return {"temperature": 0, **given}
