"""V2's and V2-Lite's sizes in a few layers: memory and bytes written do not follow the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_EXPORT = r"""
import json, re, sys
from pathlib import Path
from deepseek_trt.export.exporter import ExportRequest, Reporter, export_bundle

too_early = []
def step(text, total):
    if not text.startswith("tracing decode"):  # torch is there since prefill was traced
        too_early.extend(name for name in ("torch", "onnxscript") if name in sys.modules)

checkpoint, out, by_reference = sys.argv[1:]
by_reference = by_reference == "yes"
request = ExportRequest(Path(checkpoint), Path(out), by_reference=by_reference, allow_zeros=not by_reference)
result = export_bundle(request, Reporter(step))
# Not ru_maxrss, which begins at the parent's.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"peak": peak, "too_early": too_early, "weights": len(result.bundle.manifest.weights)}))
"""


def export(checkpoint: Path, out: Path, by_reference: bool) -> dict[str, object]:
    command = [sys.executable, "-c", _EXPORT, str(checkpoint), str(out), "yes" if by_reference else "no"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


_CLI = r"""
import json, re, sys
from pathlib import Path
from deepseek_trt.cli.main import main

main(sys.argv[1:], standalone_mode=False)
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"peak": peak}))
"""


def cli(*words: str) -> dict[str, int]:
    command = [sys.executable, "-c", _CLI, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_by_reference(tmp_path, make_checkpoint):
    """Four layers of V2: 26 GB, of which nothing is read but headers."""
    published = make_checkpoint.reduced(make_checkpoint.PUBLISHED["v2"], layers=4)
    total = make_checkpoint.write_sparse(published, tmp_path / "v2")
    found = export(tmp_path / "v2", tmp_path / "out", by_reference=True)
    assert total > 12e9
    assert found["peak"] < 1e9
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) < 50e6
    assert found["too_early"] == []


@pytest.mark.slow
@pytest.mark.tensorrt
def test_plugins_and_engines_by_reference(tmp_path, make_checkpoint):
    """Four layers of V2, from headers to plans that hold no weights."""
    published = make_checkpoint.reduced(make_checkpoint.PUBLISHED["v2"], layers=4)
    make_checkpoint.write_sparse(published, tmp_path / "v2")
    export(tmp_path / "v2", tmp_path / "out", by_reference=True)
    assert cli("plugins", str(tmp_path / "out"), "--sm", "86")["peak"] < 1e9
    assert cli("build", str(tmp_path / "out"), "--sm", "86")["peak"] < 1e9
    plans = [(tmp_path / "out" / f"{graph}.plan").stat().st_size for graph in ("prefill", "decode")]
    assert sum(plans) < 30e6


@pytest.mark.slow
def test_with_weights(tmp_path, make_checkpoint):
    """Two layers of V2-Lite, 2.1 GB with both embeddings: twice what may be in memory."""
    published = make_checkpoint.reduced(make_checkpoint.PUBLISHED["v2-lite"], layers=2)
    total = make_checkpoint.write_sparse(published, tmp_path / "lite")
    found = export(tmp_path / "lite", tmp_path / "out", by_reference=False)
    written = (tmp_path / "out" / "weights.safetensors").stat().st_size
    assert total <= written < total + 1e6
    assert found["peak"] < 1e9
