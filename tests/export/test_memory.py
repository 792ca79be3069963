"""What `check` says of memory, held against the peaks of processes that do it. Other sizes than the formulas' own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.memory import CHUNK, CONTEXT
from deepseek_trt.export.survey import survey

CHILD = f"""
import sys
from pathlib import Path
import numpy as np
from deepseek_trt.engines.sessions.opening import BACKENDS, SessionRequest
from deepseek_trt.export.bundle.folder import Bundle

bundle, backend, mapped = Bundle.open(Path(sys.argv[1])), sys.argv[2], sys.argv[3] == "mapped"
table = np.arange(1, {CONTEXT} // bundle.manifest.cache.page_size + 1, dtype=np.int32)[None]
session = BACKENDS[backend](SessionRequest(bundle, table.size + 1, 2, mapped))
session.fill(0.1)
ids = np.zeros((1, {CHUNK}), dtype=np.int64)
session.prefill(ids, np.array([{CHUNK}], np.int32), np.zeros(1, np.int32), table)
session.decode(ids[:, :1], np.ones(1, np.int32), np.array([{CHUNK}], np.int32), table)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_checkpoint):
    """bfloat16, nine tenths of it experts, as in V2-Lite."""
    config = {
        **make_checkpoint.V2_LITE,
        "vocab_size": 2048,
        "hidden_size": 640,
        "intermediate_size": 1408,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    folder = tmp_path_factory.mktemp("memory") / "checkpoint"
    make_checkpoint.write_sparse(make_checkpoint.Published(config, 2), folder)
    make_checkpoint.fill_random(folder, range(3))
    return folder


def peak_anonymous(*words: str) -> int:
    """Bytes: the most that RssAnon of /proc/self/status said while the child ran."""
    with subprocess.Popen([sys.executable, "-c", CHILD, *words]) as process:
        peak = 0
        while process.poll() is None:
            try:
                found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            except OSError:  # it has ended
                continue
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.003)
        assert process.returncode == 0
    return peak * 1024


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("step", "dtype", "by_reference", "backend", "way"),
    [
        ("generate, by reference", "bfloat16", True, "ort", "copied"),
        pytest.param("generate, weights mapped", "bfloat16", False, "ort", "mapped", marks=SLOW),
        pytest.param("generate, weights mapped", "float16", False, "ort", "mapped", marks=SLOW),
        pytest.param("generate, weights mapped", "float32", False, "ort", "mapped", marks=SLOW),
        pytest.param("generate, weights copied", "bfloat16", False, "ort", "copied", marks=SLOW),
        pytest.param("generate, weights copied", "float16", False, "ort", "copied", marks=SLOW),
        pytest.param("generate, weights copied", "float32", False, "ort", "copied", marks=SLOW),
        pytest.param("generate, --backend torch", "bfloat16", True, "torch", "copied", marks=SLOW),
    ],
)
def test_memory_is_what_check_says(checkpoint, tmp_path, step, dtype, by_reference, backend, way):
    bundle = export_bundle(ExportRequest(checkpoint, tmp_path / "out", dtype=dtype, by_reference=by_reference)).bundle
    need = next(need for need in survey(checkpoint, dtype).facts.needs if need.step == step)
    assert peak_anonymous(str(bundle.path), backend, way) == pytest.approx(need.memory, rel=0.2)
