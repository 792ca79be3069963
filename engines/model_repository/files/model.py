"""What tritonserver loads: it checks every file of this folder against manifest.json, then starts the runtime.

The log names the first file that is missing, is not the one that was written, or was put among the runtime's, and the
model is not loaded. The process ends with tritonserver, however that ends: a killed one's would wait for ever (2.51).
"""

import hashlib
import json
import os
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

LOOK_SECONDS = 0.1  # from one look at tritonserver to the next: before the backend's own, every 0.3 s
HERE = Path(__file__).resolve().parent
CHUNK = 8 * 2**20  # bytes hashed at once


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


def sha256(file: Path) -> str:
    """Of a regular file alone: a pipe is not waited for, and no link is followed."""
    digest = hashlib.sha256()
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check(name: str, expected: str) -> None:
    """RuntimeError that names the file and the mend."""
    file = HERE / name
    try:
        found = sha256(file)
    except OSError:
        raise RuntimeError(
            f"{file} is missing, or no file: write the repository again with deepseek-trt model-repository"
        ) from None
    if found != expected:
        raise RuntimeError(
            f"{file} is not the file that was written (its sha256 differs from manifest.json's): "
            "write the repository again with deepseek-trt model-repository"
        )


def check_all() -> None:
    manifest = HERE / "manifest.json"
    if not manifest.is_file():
        raise RuntimeError(f"{manifest} is missing: write the repository again with deepseek-trt model-repository")
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    with ThreadPoolExecutor() as threads:
        list(threads.map(check, files.keys(), files.values()))
    for file in (HERE / "runtime").rglob("*"):
        name = file.relative_to(HERE).as_posix()
        if not file.is_dir() and "/__pycache__/" not in name and name not in files:
            raise RuntimeError(f"{file} is none of the runtime's files: remove it, as it would be imported")


with suppress(OSError):  # what Python has just kept of this file, compiled: nothing is here but what was written
    for compiled in (HERE / "__pycache__").glob("model.*.pyc"):
        compiled.unlink()
    (HERE / "__pycache__").rmdir()
threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
check_all()
sys.dont_write_bytecode, sys.pycache_prefix = True, os.devnull  # compiled files beside the sources are not listed
sys.path.insert(0, str(HERE / "runtime"))

from deepseek_trt.engines.serving.triton_model import TritonPythonModel  # noqa: E402, F401
