"""Export the demo model in each dtype, validate it by each backend, print the largest errors and their tolerances.

python benchmarks/accuracy.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[1] / "cli" / "demo_model"
DTYPES = ("float32", "float16", "bfloat16")
BACKENDS = ("exported", "ort", "torch")
VALIDATE = [*(word for name in BACKENDS for word in ("--backend", name)), "--bisect", "--threads", "1"]
COLUMNS = (
    "bundle",
    "backend",
    "computed in",
    "logits",
    "tolerance",
    "latents nearest theirs",
    "tolerance",
    "top-1",
    "perplexity - reference",
    "loss - reference",
    "tolerance",
    "greedy",
)


def report_of(dtype: str, folder: Path) -> dict[str, Any]:
    bundle, report = folder / dtype, folder / f"{dtype}-report"
    _deepseek_trt("export", str(DEMO), str(bundle), "--dtype", dtype)
    _deepseek_trt("validate", str(bundle), *VALIDATE, "--report", str(report))
    found: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return found


def row(dtype: str, backend: dict[str, Any]) -> Iterator[str]:
    """The cells of one backend's line."""
    logits, *latents = backend["outputs"]
    nearest = max(latents, key=lambda output: float(output["max_relative"]) / output["tolerance"])
    text = backend["text"]
    yield from (dtype, backend["backend"], backend["computed_in"])
    for output in (logits, nearest):
        yield from (f"{output['max_relative']:.1e}", f"{output['tolerance']:.1e}")
    yield f"{backend['tokens']['top1']:.2%}"
    yield f"{text['perplexity'] - text['reference_perplexity']:+.1e}"
    yield from (f"{text['loss'] - text['reference_loss']:+.1e}", f"{text['tolerance']:.1e}")
    yield ", ".join(str(prompt["agreed"]) for prompt in backend["greedy"])


def _deepseek_trt(*words: str) -> None:
    script = "from deepseek_trt.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", script, *words], check=True, stdout=sys.stderr)


def _machine() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    wide = "with" if "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "without"
    versions = f"torch {version('torch')}, ONNX Runtime {version('onnxruntime-gpu')}"
    return f"{found[1] if found else 'unknown processor'} {wide} AVX-512, one thread, {versions}."


def main() -> None:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    with tempfile.TemporaryDirectory() as name:
        for dtype in DTYPES:
            for backend in report_of(dtype, Path(name))["backends"]:
                if (dtype, backend["backend"]) != ("float32", "torch"):  # that is the reference
                    lines.append(f"| {' | '.join(row(dtype, backend))} |")
    print("\n".join([*lines, "", _machine()]))


if __name__ == "__main__":
    main()
