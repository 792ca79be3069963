"""What tritonserver loads: it checks every file of this folder against manifest.json, then starts the runtime.

The log names the first file that is missing or is not the one that was written, and the model is not loaded.
"""

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHUNK = 8 * 2**20  # bytes hashed at once


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check(name: str, expected: str) -> None:
    """RuntimeError that names the file and the mend."""
    file = HERE / name
    if not file.is_file():
        raise RuntimeError(f"{file} is missing: write the repository again with deepseek-trt model-repository")
    if sha256(file) != expected:
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


check_all()
sys.path.insert(0, str(HERE / "runtime"))

from deepseek_trt.engines.serving.triton_model import TritonPythonModel  # noqa: E402, F401
