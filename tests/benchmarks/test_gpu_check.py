"""scripts/gpu-check without a GPU: what is read, launched, timed and said; a fault is a row and not the end."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_check import checks, engines, launching, parts, rehearsal, shipped, timing  # noqa: E402  benchmarks are no package of the product
from gpu_check.items import Setting  # noqa: E402
from gpu_check.places import Prepared  # noqa: E402
from gpu_check.rows import Row, markdown  # noqa: E402

from deepseek_trt.export.config.model_config import ModelConfig  # noqa: E402
from deepseek_trt.plugins.aot.variants import variants_for  # noqa: E402
from deepseek_trt.plugins.kernels import interpreter  # noqa: E402

DEMO = json.loads((ROOT / "cli" / "demo_model" / "config.json").read_text())


def stand_in_library(folder: Path, raw=DEMO, sm=90, ops=None):
    """A library as it lies in a bundle, for a chip and as PTX, whose images are not code; gives its manifest."""
    rows, data = [], bytearray(b"\x7fELF not an image".ljust(128, b"."))
    for own, is_ptx in ((sm, False), (80, True)):
        variants = variants_for(ModelConfig.from_hf(raw), "bfloat16", 86 if is_ptx else own)
        for v in (v for v in variants if ops is None or v.op in ops):
            start = b"// PTX\n" if is_ptx else b"\x7fELF"
            image = start + repr((v.kernel, v.constexprs, own)).encode()
            data += image + b"\0"
            data += bytes(-len(data) % shipped.ALIGNMENT)
            row = {key: getattr(v, key) for key in ("op", "kernel", "dtype", "max_tokens")}
            row |= {"sm": own, "is_ptx": is_ptx, "entry": v.kernel, "shared_bytes": 60_000, "threads": 128}
            row |= {"bytes": len(image), "sha256": hashlib.sha256(image).hexdigest(), "constants": dict(v.constexprs)}
            rows.append(row)
    (folder / "plugins").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return write_library(folder / "plugins", rows, bytes(data))


def write_library(folder: Path, rows, data: bytes):
    (folder / shipped.LIBRARY).write_bytes(data)
    manifest = {"dtype": "bfloat16", "sha256": hashlib.sha256(data).hexdigest(), "binaries": rows}
    (folder / shipped.MANIFEST).write_text(json.dumps(manifest))
    return manifest


def gpu_check(*words, **environment):
    """The script's exit code, and its JSON."""
    out = Path(words[words.index("--out") + 1])
    command = [ROOT / "scripts" / "gpu-check", *map(str, words)]
    variables = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert (out / "gpu-check.json").is_file(), done.stderr
    assert done.stdout.count("|") > 10
    return done.returncode, json.loads((out / "gpu-check.json").read_text())


def results(found, part):
    return {row["what"]: row["result"] for row in found["rows"] if row["part"] == part}


def test_rehearsal_launches_every_binary_and_times_all_ops(tmp_path):
    stand_in_library(tmp_path / "demo" / "bfloat16")
    words = ("--part", "machine", "--part", "kernels", "--part", "speed")
    code, found = gpu_check("--rehearse", "--prepared", tmp_path, "--out", tmp_path / "out", *words)
    assert code == 0, found["rows"]
    assert found["rehearsal"] is True
    kernels = results(found, "kernels")
    assert set(kernels.values()) == {"good"}
    for target in ("cubin 90", "PTX 80"):
        for op in (
            "MlaDecode",
            "MlaPrefill",
            "MoeRouter",
            "MoeExperts",
            "MlaQuery",
            "MlaValue",
            "MoeLayer",
            "Sampling",
            "all",
        ):
            assert f"demo bfloat16 {target} {op}" in kernels
    timed = {row["what"]: row["figures"] for row in found["rows"] if row["part"] == "speed"}
    # The ceilings, decode, the experts' products and all of the experts, prefill, the layer, sampling both ways.
    assert len(timed) == 1 + 1 + 2 + 1 + 1 + 2
    assert all(figures["GB/s"] > 0 for figures in timed.values())


def test_what_is_wrong_in_a_library_fails(tmp_path):
    """A kernel that computes something else, and one that nothing launches: an op that has no cases yet."""
    bundle = tmp_path / "demo" / "bfloat16"
    manifest = stand_in_library(bundle, ops=("MlaDecode", "MlaPrefill"))
    rows = manifest["binaries"]
    data = (bundle / "plugins" / shipped.LIBRARY).read_bytes()
    for row in rows:
        if row["kernel"] == "mla_decode_combine":
            row["constants"]["MIN_TILES"] = 9  # no launch asks for it
    rows.append({**rows[0], "op": "Sample", "kernel": "moe_combine"})
    write_library(bundle / "plugins", rows, data)
    code, found = gpu_check("--rehearse", "--prepared", tmp_path, "--out", tmp_path / "out", "--part", "kernels")
    assert code == 1
    kernels = {row["what"]: row for row in found["rows"]}
    assert kernels["demo bfloat16 cubin 90 MlaDecode"]["result"] == "FAILED"
    assert "no binary of mla_decode_combine" in kernels["demo bfloat16 cubin 90 MlaDecode"]["note"]
    assert kernels["demo bfloat16 cubin 90 MlaPrefill"]["result"] == "good"
    assert kernels["demo bfloat16 cubin 90 all"]["result"] == "FAILED"
    assert "never: mla_decode_combine, moe_combine" in kernels["demo bfloat16 cubin 90 all"]["note"]


def test_nothing_prepared_is_no_success(tmp_path):
    code, found = gpu_check("--rehearse", "--prepared", tmp_path, "--out", tmp_path / "out")
    assert code == 1
    assert "--prepare" in next(row["note"] for row in found["rows"] if row["part"] == "kernels")
    assert results(found, "engines") == {"demo": "FAILED"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_says_so(tmp_path):
    code, found = gpu_check("--prepared", tmp_path, "--out", tmp_path / "out")
    assert code == 1
    assert not [row for row in found["rows"] if row["result"] == "good"]
    assert "sees no CUDA GPU" in found["rows"][0]["note"]


def test_images_are_cut_out_of_the_library(tmp_path):
    manifest = stand_in_library(tmp_path)
    library = shipped.read_library(tmp_path / "plugins", DEMO)
    assert library.targets() == ((80, True), (90, False))
    assert [hashlib.sha256(b.image).hexdigest() for b in library.binaries] == [
        row["sha256"] for row in manifest["binaries"]
    ]
    data = (tmp_path / "plugins" / shipped.LIBRARY).read_bytes()
    (tmp_path / "plugins" / shipped.LIBRARY).write_bytes(data + b"!")
    with pytest.raises(ValueError, match="is not the file"):
        shipped.read_library(tmp_path / "plugins", DEMO)
    write_library(tmp_path / "plugins", manifest["binaries"], data.replace(b"mla_decode_split", b"mla_decode_SPLIT"))
    with pytest.raises(ValueError, match="images are not in the library"):
        shipped.read_library(tmp_path / "plugins", DEMO)


class PlayedGpu:
    """Runs what it captures once more at each replay; a run takes as many seconds as it was told."""

    def __init__(self, seconds=()):
        self.done: list[str] = []
        self._seconds = iter(seconds)

    def capture(self, work):
        self.done.append("capture")
        work()
        return work

    def flush(self):
        self.done.append("flush")

    def seconds(self, work):
        work()
        return next(self._seconds)


def test_a_graph_holds_many_calls_that_take_turns():
    played = PlayedGpu([100.0, 4.0, 2.0, 6.0])
    calls = [lambda name=name: played.done.append(name) for name in "abc"]
    assert timing.Timer(runs=3, warmup=1, gpu=played)(*calls) == 4.0 / timing.CALLS
    one_graph = [*"abcabcabcabcabcabcab"]
    assert len(one_graph) == timing.CALLS
    assert played.done == ["capture", *one_graph, *["flush", *one_graph] * 4]


def test_the_cache_is_flushed_by_reading(monkeypatch):
    """Written lines would have to go back to memory while the calls are timed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "played")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(L2_cache_size=2**10))
    stock = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: stock(*shape, **options))
    flushing = timing.TorchGpu()
    flushing.flush()
    assert flushing._read.nbytes >= 4 * 2**10
    before = flushing._read._version
    flushing.flush()
    assert flushing._read._version == before
    assert flushing._sum.numel() == 1


@pytest.mark.parametrize(
    ("nbytes", "cache", "free", "copies"),
    [(1e6, 50e6, 1e12, 20), (40e6, 50e6, 1e12, 4), (1e9, 50e6, 1e12, 2), (1e9, 50e6, 1.5e9, 1), (1e9, 50e6, 0, 1)],
)
def test_copies_exceed_the_cache_and_fit_the_memory(nbytes, cache, free, copies):
    assert timing.copies_for(nbytes, int(cache), free) == copies
    if 1 < copies < timing.CALLS:
        assert (copies - 1) * nbytes >= 2 * cache


class Recorder:
    """A CUDA driver that keeps what is launched, parameters' bits included."""

    CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)
    CUfunction_attribute = types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self):
        self.loaded, self.shared, self.launched = [], [], []

    def __getattr__(self, name):
        calls = {"cuModuleLoadData": self.load, "cuModuleGetFunction": self.function}
        return {**calls, "cuFuncSetAttribute": self.set_attribute, "cuLaunchKernel": self.launch}[name]

    def load(self, image):
        self.loaded.append(image)
        return 0, image

    def function(self, module, name):
        return 0, (module, name)

    def set_attribute(self, function, attribute, value):
        self.shared.append(value)
        return (0,)

    def launch(self, function, *how):
        *how, stream, params, _ = how
        pointers = (ctypes.c_void_p * 5).from_address(params)
        first = ctypes.c_uint64.from_address(pointers[0]).value
        self.launched.append((function[1], *how, stream, first))
        return (0,)


def test_the_driver_gets_the_binaries_of_the_library(tmp_path):
    """Of this chip's tiles, launched as they were compiled; afterwards the modules have Triton's kernels back."""
    stand_in_library(tmp_path)
    binaries = shipped.read_library(tmp_path / "plugins", DEMO).of((90, False))
    (binary,) = (b for b in binaries if b.kernel == "mla_decode_combine")
    constants = {name: value for name, value in binary.constants.items() if name != "PDL"}  # as wrappers give them
    if not torch.cuda.is_available():
        interpreter.enable()  # else no later test of this process could interpret them
    mla_decode = importlib.import_module("deepseek_trt.plugins.kernels.mla_decode")
    driver, stock = Recorder(), mla_decode.mla_decode_combine
    tensor = types.SimpleNamespace(is_cuda=True, is_contiguous=lambda: True, data_ptr=lambda: 0x7000)
    with launching.shipped_kernels(binaries, launching.DriverExecutor(driver, lambda: 77)) as journal:
        assert mla_decode.chip_of(tensor) == 90
        for _ in range(2):
            mla_decode.mla_decode_combine[(3, 4)](*[tensor] * 5, 2, 8, 5, 6, **constants, num_warps=4, num_stages=2)
        with pytest.raises(LookupError, match="no binary of mla_decode_combine"):
            mla_decode.mla_decode_combine[(3, 4)](*[tensor] * 5, 2, 8, 5, 6, BLOCK_S=1)
        odd = types.SimpleNamespace(is_cuda=True, is_contiguous=lambda: True, data_ptr=lambda: 0x7002)
        with pytest.raises(ValueError, match="multiples of 16"):
            mla_decode.mla_decode_combine[(3, 4)](*[odd] * 5, 2, 8, 5, 6, **constants)
    assert [launch.binary for launch in journal] == [binary] * 2
    assert driver.loaded == [binary.image + b"\0"]
    assert driver.shared == [60_000]
    assert driver.launched == [(b"mla_decode_combine", 3, 4, 1, 128, 1, 1, 60_000, 77, 0x7000)] * 2
    assert mla_decode.mla_decode_combine is stock


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled in this process")
@pytest.mark.parametrize("fault", ["none", "two percent", "stray write", "nan"])
def test_small_faults_of_a_kernel_are_seen(tmp_path, fault):
    interpreter.enable()
    stand_in_library(tmp_path, ops=("MlaDecode",))
    library, gpu = shipped.read_library(tmp_path / "plugins", DEMO), rehearsal.RehearsedGpu(90)
    honest = gpu.executor()

    def spoiled(binary, grid, arguments):
        honest(binary, grid, arguments)
        if binary.kernel == "mla_decode_combine" and fault == "two percent":
            arguments[4].mul_(1.02)  # attended
        if binary.kernel == "mla_decode_combine" and fault == "nan":
            arguments[4].view(-1)[-1] = torch.nan
        if binary.kernel == "mla_decode_split" and fault == "stray write":
            arguments[2][-1, -1, -1] = 1.0  # of the pool's last page

    gpu.executor = lambda: spoiled
    setting = Setting(Prepared(tmp_path), rehearsal=True)
    row, coverage = checks.check("demo", library, (90, False), setting, gpu)
    assert coverage.result == "good"
    assert row.result == ("good" if fault == "none" else "FAILED")
    assert (row.figures["error"] > 1) == (fault != "none")


FAULTY = """
import os, time
from gpu_check.items import Item
from gpu_check.rows import Row

def items(setting, gpu):
    return [
        Item("a", lambda: [Row("p", "a", "good")]),
        Item("dies", lambda: os.abort()),
        Item("raises", lambda: [Row("p", "before it", "good"), 1 / 0]),
        Item("b", lambda: [Row("p", "b", "good")]),
        Item("hangs", lambda: time.sleep(600)),
        Item("c", lambda: [Row("p", "c", "good")]),
    ]
"""


def test_a_fault_is_a_row_and_not_the_end(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    setting = Setting(Prepared(tmp_path), rehearsal=True)
    rows = list(parts.run_part(parts.Part("p", "faulty", 60), setting, tmp_path, 45))  # three starts, then it hangs
    found = [(row.what, row.result) for row in rows]
    assert found == [
        ("a", "good"),
        ("dies", "FAILED"),
        ("raises", "FAILED"),
        ("b", "good"),
        ("hangs", "FAILED"),
        ("what follows", "not run"),
    ]
    notes = {row.what: row.note for row in rows}
    assert "signal 6" in notes["dies"]
    assert "ZeroDivisionError" in notes["raises"]
    assert "not done after" in notes["hangs"]


SANITIZER = """#!/usr/bin/env bash
while [ "$1" != "--log-file" ]; do shift; done
log=$2; shift 4
echo "========= Invalid __global__ read of size 16 bytes" > "$log"
[ "$ERRORS" = 0 ] && : > "$log"
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] && echo "========= ERROR SUMMARY: $ERRORS errors" >> "$log"
"$@"
"""


@pytest.mark.parametrize(("errors", "result"), [(0, "good"), (3, "FAILED")])
def test_memcheck_runs_the_small_cases(tmp_path, errors, result):
    stand_in_library(tmp_path / "demo" / "bfloat16", ops=("MoeRouter",))
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    words = ("--rehearse", "--prepared", tmp_path, "--out", tmp_path / "out", "--part", "memcheck")
    code, found = gpu_check(*words, PATH=path, ERRORS=str(errors))
    assert results(found, "memcheck")["memcheck"] == result
    assert results(found, "memcheck")["demo bfloat16 cubin 90 MoeRouter"] == "good"
    assert code == (result == "FAILED")


def test_another_token_must_be_a_near_tie():
    answer = engines.Answer(prompt=[1], tokens=[5, 6, 7], gaps=[2.0, 0.01, 1.0], rms=[3.0, 3.0, 3.0])
    assert engines.compare([5, 6, 7], answer, 1e-3) == engines.Compared(3, True, "")
    tie, wrong = engines.compare([5, 9, 9], answer, 1e-3), engines.compare([8, 6, 7], answer, 1e-3)
    assert (tie.equal, tie.explained) == (1, True)
    assert (wrong.equal, wrong.explained) == (0, False)


def test_the_table_has_the_columns_that_are_used():
    rows = [Row("speed", "a|b", "good", "x\ny", {"us": 1.25}), Row("kernels", "c", "FAILED")]
    assert markdown(rows).splitlines() == [
        "| part | what | result | us | note |",
        "| --- | --- | --- | ---: | --- |",
        "| speed | a\\|b | good | 1.2 | x y |",
        "| kernels | c | FAILED |  |  |",
    ]
    with pytest.raises(ValueError, match="no column"):
        Row("speed", "a", "good", "", {"miles": 1.0})
