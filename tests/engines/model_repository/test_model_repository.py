"""The repository on disk: complete in itself, described, written once; and its runtime without this package."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deepseek_trt.cli.main import main
from deepseek_trt.engines.model_repository import copying, sizes
from deepseek_trt.engines.model_repository.copying import copy_file, real_file
from deepseek_trt.engines.model_repository.runtime import GENERATOR, SYNC, runtime_files
from deepseek_trt.engines.model_repository.sizes import SizeRequest, serving_backend, settings_for
from deepseek_trt.engines.plans.plan import BuildSpec, PlanRecord
from deepseek_trt.engines.plans.profiles import profile_of
from deepseek_trt.engines.serving import heart
from deepseek_trt.engines.serving.names.table import TAKEN
from deepseek_trt.engines.serving.tensors import OUTPUTS
from deepseek_trt.engines.sessions import opening
from deepseek_trt.engines.sessions.opening import Surroundings
from deepseek_trt.engines.sessions.prepared import fused_name
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import TensorSpec
from deepseek_trt.export.bundle.manifest import list_added
from deepseek_trt.export.errors import BundleError, OutputError, RequestError
from deepseek_trt.plugins.cpu.library import CPU_LIBRARY_FILE
from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, MANIFEST

PAGE = 8
SPEC = BuildSpec(max_batch_size=4, max_input_len=16, max_seq_len=64)


@pytest.fixture(scope="module")
def bundle(relist, small_v2, bundle_of, demo_checkpoint, tmp_path_factory):
    """The small model with the demo's tokenizer beside it, whose ids it does not have: nothing is generated here."""
    folder = tmp_path_factory.mktemp("with_tokenizer") / "bundle"
    shutil.copytree(bundle_of(small_v2.checkpoint, page_size=PAGE).path, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_checkpoint / name, folder)
    return relist(folder)


@pytest.fixture(scope="module")
def planned(bundle, tmp_path_factory):
    """The bundle with plans that nobody built."""
    folder = tmp_path_factory.mktemp("planned")
    own = Bundle.open(Path(shutil.copytree(bundle.path, folder / "bundle")))
    (own.path / "plugins").mkdir()
    (own.path / "plugins" / LIBRARY).write_bytes(b"library")
    (own.path / "plugins" / MANIFEST).write_text("{}")
    for graph in own.manifest.graphs:
        dims = [
            TensorSpec(t.name, t.dtype, tuple(-1 if isinstance(d, str) else d for d in t.dims)) for t in graph.inputs
        ]
        profile = profile_of(graph, own.manifest.cache, SPEC)
        library = (f"plugins/{LIBRARY}", hashlib.sha256(b"library").hexdigest())
        plan = hashlib.sha256(b"plan").hexdigest()
        record = PlanRecord(
            graph.name, SPEC, "1.0", tuple(dims), (), graph.outputs, profile, {}, {}, *library, "", plan, 4
        )
        (own.path / f"{graph.name}.plan").write_bytes(b"plan")
        record.write(own.path / f"{graph.name}.plan.json")
        list_added(own.path, [f"{graph.name}.plan", f"{graph.name}.plan.json"])
    list_added(own.path, [f"plugins/{LIBRARY}", f"plugins/{MANIFEST}"])
    return own.listed_anew()


@pytest.fixture(scope="module")
def classifier(small_v2, bundle_of, demo_checkpoint, tmp_path_factory):
    """The small model in bfloat16 with a score head instead of its language-model head."""
    folder = Path(shutil.copytree(small_v2.checkpoint, tmp_path_factory.mktemp("classifier") / "checkpoint"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {name: t for file in set(index["weight_map"].values()) for name, t in load_file(folder / file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:3].clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**small_v2.raw, "id2label": {"0": "sad", "1": "so so", "2": "né"}}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_checkpoint / name, folder)
    return bundle_of(folder, task="text-classification")


def run(*arguments):
    return CliRunner().invoke(main, ["model-repository", *map(str, arguments)])


def written(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def repository(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository") / "models"
    assert written(bundle.path, folder, "--max-inflight", 9)["fresh"]
    return folder


def test_everything_is_described_and_real(repository, bundle):
    version = repository / "deepseek_v2" / "1"
    manifest = json.loads((version / "manifest.json").read_text())
    found = {p.relative_to(version).as_posix() for p in version.rglob("*") if p.is_file()} - {"manifest.json"}
    assert manifest["files"].keys() == found
    assert {"model.py", "bundle/weights.safetensors", "bundle/tokenizer.json", "bundle/prefill.onnx"} <= found
    assert not [p for p in repository.rglob("*") if p.is_symlink()]
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((version / name).read_bytes()).hexdigest() == digest
    weights = version / "bundle" / "weights.safetensors"
    assert weights.stat().st_nlink == 1  # onnx reads no other
    listed = {"manifest.json", "weights.safetensors", "tokenizer.json", "tokenizer_config.json", *bundle.manifest.files}
    made = {CPU_LIBRARY_FILE, *map(fused_name, ("prefill", "decode"))}
    assert {p.relative_to(version / "bundle").as_posix() for p in (version / "bundle").rglob("*")} - made == listed
    assert (repository / "serve.sh").stat().st_mode & 0o111
    assert all(name in manifest["requirements"][0] for name in ("numpy", "<2"))


def test_onnx_reads_the_bundle_of_a_repository(repository):
    import onnx

    folder = repository / "deepseek_v2" / "1" / "bundle"
    for graph in folder.glob("*.onnx"):
        if graph.name in ("prefill.onnx", "decode.onnx"):
            onnx.checker.check_model(str(graph))
            onnx.load(graph)


def test_links_where_they_are_asked_for(bundle, tmp_path):
    (bundle.path / "notes.txt").write_text("mine")
    try:
        assert written(bundle.path, tmp_path, "--link")["fresh"]
        placed = tmp_path / "deepseek_v2" / "1" / "bundle"
        assert (placed / "weights.safetensors").samefile(bundle.path / "weights.safetensors")
        assert not (placed / "notes.txt").exists()
        assert written(bundle.path, tmp_path)["fresh"]
        assert not (placed / "weights.safetensors").samefile(bundle.path / "weights.safetensors")
    finally:
        (bundle.path / "notes.txt").unlink()


def test_a_link_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "b").write_text("")
    with pytest.raises(OutputError, match="leave out --link"):
        copy_file(tmp_path / "a", tmp_path / "b", link=True)


@pytest.mark.parametrize("cloned", [True, False])
def test_a_copy_is_a_reflink_where_the_file_system_can(tmp_path, monkeypatch, cloned):
    def ioctl(target, request, source):
        if not cloned:
            raise OSError("not on this file system")
        target.write(b"cloned")

    monkeypatch.setattr(copying.fcntl, "ioctl", ioctl)
    (tmp_path / "a").write_bytes(b"copied")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    copy_file(real_file(tmp_path / "link", tmp_path), tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (b"cloned" if cloned else b"copied")
    assert not (tmp_path / "b").is_symlink()


@pytest.mark.parametrize("name", ["missing.onnx", "../stray", "/etc/hostname"])
def test_a_listed_file_that_is_not_there_is_named(bundle, name):
    (bundle.path.parent / "stray").write_text("")
    manifest = dataclasses.replace(bundle.manifest, files={**bundle.manifest.files, name: ""})
    with pytest.raises(BundleError, match=f"{name} is missing|'{name}' leads out"):
        dataclasses.replace(bundle, manifest=manifest).files.check([name])


def test_config_says_everything(repository):
    text = (repository / "deepseek_v2" / "config.pbtxt").read_text()
    assert "${" not in text
    for field in TAKEN + OUTPUTS:
        dims = ", ".join(map(str, field.dims))
        assert f'name: "{field.name}" data_type: {field.data_type} dims: [ {dims} ]' in text
    parameters = dict(re.findall(r'key: "(\w+)" value \{ string_value: "([^"]*)"', text))
    assert parameters["backend"] == "ort"
    assert (parameters["max_inflight"], parameters["max_running"]) == ("9", "9")
    assert (parameters["max_model_len"], parameters["page_size"], parameters["vocab_size"]) == ("2560", "8", "256")
    assert "decoupled: true" in text


def test_the_same_again_does_nothing_and_a_change_replaces_all(bundle, tmp_path):
    first = written(bundle.path, tmp_path / "r")
    stray = tmp_path / "r" / "deepseek_v2" / "1" / "stray"
    stray.write_text("")
    again = written(bundle.path, tmp_path / "r")
    assert (first["fresh"], again["fresh"], stray.exists()) == (True, False, True)
    changed = written(bundle.path, tmp_path / "r", "--max-model-len", 100)
    assert (changed["fresh"], changed["max_model_len"], stray.exists()) == (True, 100, False)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "README.md", "client.py", "control.py", "deepseek_v2", "deepseek_v2_sync", "flags.py", "heart.py",
        "leavings.py", "probes.py", "serve.sh", "supervise.py",
    ]  # fmt: skip


def test_a_model_for_unary_inference_beside_it(bundle, tmp_path):
    facts = written(bundle.path, tmp_path, "--max-inflight", 7)
    assert facts["sync"] == "deepseek_v2_sync"
    version = tmp_path / "deepseek_v2_sync" / "1"
    assert not (version / "bundle").exists()
    config = (tmp_path / "deepseek_v2_sync" / "config.pbtxt").read_text()
    assert "decoupled: false" in config
    assert 'key: "model" value { string_value: "deepseek_v2" }' in config
    assert 'key: "max_inflight" value { string_value: "7" }' in config
    both = [(tmp_path / name / "config.pbtxt").read_text() for name in ("deepseek_v2", "deepseek_v2_sync")]
    first, second = (text[text.index("input [") : text.index("parameters {")] for text in both)
    assert first == second
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["requirements"] == ["numpy>=1.26,<2"]
    assert "models: `deepseek_v2`." in (tmp_path / "README.md").read_text()
    assert not written(bundle.path, tmp_path, "--max-inflight", 7)["fresh"]
    without = written(bundle.path, tmp_path, "--max-inflight", 7, "--no-sync")
    assert (without["sync"], version.exists()) == (None, False)


def test_names_that_a_model_for_unary_inference_takes(bundle, tmp_path):
    """Neither stands in the place of the other."""
    written(bundle.path, tmp_path)
    result = run(bundle.path, tmp_path, "--name", "deepseek_v2_sync")
    assert (result.exit_code, "answers unary requests for deepseek_v2" in result.stderr) == (1, True)
    written(bundle.path, tmp_path, "--name", "a_sync", "--no-sync")
    result = run(bundle.path, tmp_path, "--name", "a")
    assert (result.exit_code, "--no-sync" in result.stderr) == (1, True)
    assert not (tmp_path / "a").exists()
    written(bundle.path, tmp_path, "--name", "a", "--no-sync")
    assert (tmp_path / "a_sync" / "1" / "bundle").exists()


def test_models_side_by_side(bundle, tmp_path):
    written(bundle.path, tmp_path)
    before = (tmp_path / "deepseek_v2" / "config.pbtxt").stat().st_mtime_ns
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.pbtxt").write_text("")
    written(bundle.path, tmp_path, "--name", "other")
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["config.pbtxt"]
    assert (tmp_path / "deepseek_v2" / "config.pbtxt").stat().st_mtime_ns == before
    assert 'name: "other"' in (tmp_path / "other" / "config.pbtxt").read_text()
    assert "`deepseek_v2`, `other`" in (tmp_path / "README.md").read_text()
    assert not re.search(r"@\w+@", (tmp_path / "README.md").read_text())


def test_a_by_reference_bundle_is_refused(small_v2, bundle_of, tmp_path):
    result = run(bundle_of(small_v2.checkpoint, by_reference=True).path, tmp_path)
    assert result.exit_code == 1
    assert "without --by-reference" in result.stderr


def test_a_bundle_without_tokenizer_is_refused(small_v2, bundle_of, tmp_path):
    result = run(bundle_of(small_v2.checkpoint, page_size=PAGE).path, tmp_path)
    assert (result.exit_code, "tokenizer.json" in result.stderr) == (1, True)


@pytest.mark.parametrize("name", ["../out", "a b", ".hidden", ""])
def test_names_that_are_no_folder(bundle, tmp_path, name):
    result = run(bundle.path, tmp_path, "--name", name)
    assert (result.exit_code, "name" in result.stderr) == (1, True)


def test_what_somebody_else_wrote_is_left_alone(bundle, tmp_path):
    (tmp_path / "deepseek_v2").mkdir()
    (tmp_path / "deepseek_v2" / "theirs").write_text("")
    result = run(bundle.path, tmp_path)
    assert (result.exit_code, "move it away" in result.stderr) == (1, True)
    assert (tmp_path / "deepseek_v2" / "theirs").exists()


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, {"max_model_len": 2560, "max_running": 32, "pages": 1 + 32 * 320}),
        ({"max_inflight": 2}, {"max_running": 2, "pages": 1 + 2 * 320}),
        ({"max_model_len": 17}, {"pages": 1 + 32 * 2}),  # 16 cached tokens: the last is never cached
        ({"max_model_len": 18}, {"pages": 1 + 32 * 3}),
        ({"pages": 400}, {"pages": 400}),
        ({"cache_mib": 1}, {"pages": 2**20 // (3 * 48 * 2 * PAGE)}),
        ({"threads": 3, "prefix_reuse": False}, {"threads": 3, "prefix_reuse": False}),
    ],
)
def test_sizes(bundle, request_, expected):
    settings = settings_for(bundle, SizeRequest(**request_))
    assert {name: getattr(settings, name) for name in expected} == expected


def test_a_model_longer_than_the_cache_is_served_as_far_as_it_holds(bundle, monkeypatch):
    """Published models have 163,840 positions: no server of theirs would start without a length."""
    monkeypatch.setattr(sizes, "DEFAULT_CACHE_MIB", 1)
    pages = 2**20 // (3 * 48 * 2 * PAGE)
    long = dataclasses.replace(bundle.manifest.model, max_position_embeddings=163840)
    longer = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, model=long))
    settings = settings_for(longer, SizeRequest())
    assert (settings.max_model_len, settings.pages) == ((pages - 1) * PAGE + 1, pages)
    assert settings_for(longer, SizeRequest(cache_mib=2)).max_model_len > settings.max_model_len
    for asked in ({"max_model_len": 163840}, {"pages": pages}):  # what is asked for is had, or refused
        with pytest.raises(RequestError, match="does not hold one sequence of 163840 tokens"):
            settings_for(longer, SizeRequest(**asked))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"max_model_len": 2561}, "between 2 and the model's 2560"),
        ({"max_model_len": 1}, "max_model_len 1"),
        ({"pages": 100}, "--pages 321"),
        ({"max_inflight": 0}, "max_inflight 0"),
        ({"max_running": 0}, "max_running 0"),
        ({"threads": -1}, "threads -1"),
    ],
)
def test_sizes_that_cannot_be_had(bundle, request_, words):
    with pytest.raises(RequestError, match=words):
        settings_for(bundle, SizeRequest(**request_))


@pytest.mark.parametrize(
    ("gpu", "wanted", "backend", "why"),
    [
        ("a GPU", "auto", "tensorrt", "the bundle has plans and a GPU is visible"),
        (None, "auto", "ort", "no GPU is visible (for its plans, give --backend tensorrt)"),
        (None, "tensorrt", "tensorrt", "it was asked for"),
        ("a GPU", "ort", "ort", "it was asked for"),
    ],
)
def test_auto_is_that_of_generate(planned, monkeypatch, gpu, wanted, backend, why):
    monkeypatch.setattr(opening, "Surroundings", lambda: Surroundings(lambda: gpu, list))
    choice = serving_backend(planned, wanted)
    assert (choice.backend, choice.why) == (backend, why)
    assert settings_for(planned, SizeRequest(wanted)).backend == backend


def test_what_a_repository_needs_is_said(planned, bundle, tmp_path):
    plans = run(planned.path, tmp_path, "--backend", "tensorrt")
    assert (
        "backend: tensorrt, as it was asked for; it needs the NVIDIA GPU that the plans were built on" in plans.stdout
    )
    assert "the tensorrt_rtx 1.0 that built the plans" in plans.stdout
    facts = written(bundle.path, tmp_path, "--name", "cpu", "--backend", "ort")
    assert (facts["backend"], facts["why"], facts["needs"]) == ("ort", "it was asked for", "no GPU")
    with pytest.raises(RequestError, match="backend 'cuda'"):
        serving_backend(bundle, "cuda")


def test_plans_come_with_their_library_and_limits(planned, tmp_path):
    facts = written(planned.path, tmp_path, "--backend", "tensorrt")
    assert facts["backend"] == "tensorrt"
    assert (facts["max_running"], facts["prefill_chunk"], facts["max_model_len"]) == (4, 16, 64)
    placed = tmp_path / "deepseek_v2" / "1" / "bundle"
    assert (placed / "plugins" / LIBRARY).read_bytes() == b"library"
    assert (placed / "plugins" / MANIFEST).is_file()
    assert PlanRecord.of(Bundle.open(placed), "decode").plugin_library == f"plugins/{LIBRARY}"
    assert "KIND_GPU" in (tmp_path / "deepseek_v2" / "config.pbtxt").read_text()
    assert written(planned.path, tmp_path, "--backend", "ort", "--name", "cpu")["backend"] == "ort"
    assert not list((tmp_path / "cpu").rglob("*.plan"))


CLASSIFIER_CONFIG = r"""name: "mood"
backend: "python"
default_model_filename: "model.py"
max_batch_size: 32
version_policy { specific { versions: [ 1 ] } }
model_transaction_policy { decoupled: false }
dynamic_batching { max_queue_delay_microseconds: 2000 }
instance_group [ { count: 1 kind: KIND_CPU } ]
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
  { name: "label" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "score" data_type: TYPE_FP32 dims: [ 1 ] },
  { name: "scores" data_type: TYPE_FP32 dims: [ 3 ] },
  { name: "logits" data_type: TYPE_FP32 dims: [ 3 ] }
]
parameters { key: "labels" value { string_value: "[\"sad\", \"so so\", \"né\"]" } }
"""


def test_a_classifier_beside_a_generator(classifier, bundle, tmp_path):
    """Another start of the runtime, another config.pbtxt; the scripts that ask generators are not written for it."""
    assert written(classifier.path, tmp_path, "--name", "mood")["labels"] == ["sad", "so so", "né"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "control.py",
        "flags.py",
        "heart.py",
        "leavings.py",
        "mood",
        "probes.py",
        "serve.sh",
        "supervise.py",
    ]
    model = tmp_path / "mood"
    assert (model / "config.pbtxt").read_text(encoding="utf-8") == CLASSIFIER_CONFIG
    assert "Labels texts: sad, so so, né." in (model / "README.md").read_text(encoding="utf-8")
    assert json.loads((model / "1" / "manifest.json").read_text())["task"] == "text-classification"
    assert "engines.serving.classifier_model import TritonPythonModel" in (model / "1" / "model.py").read_text()
    assert not (model / "1" / "runtime" / "deepseek_trt" / "engines" / "serving" / "triton_model.py").exists()
    prepared = {p.name for p in (model / "1" / "bundle").iterdir()} - {p.name for p in classifier.path.iterdir()}
    assert prepared == set()
    assert "nothing to do" in run(classifier.path, tmp_path, "--name", "mood").stdout
    written(bundle.path, tmp_path)
    assert "models: `deepseek_v2`." in (tmp_path / "README.md").read_text()


def test_a_classifier_that_cannot_be_served(classifier, bundle_of, tmp_path):
    checkpoint = Path(classifier.manifest.checkpoint)
    result = run(bundle_of(checkpoint, task="text-classification", by_reference=True).path, tmp_path)
    assert (result.exit_code, "refers to its checkpoint" in result.stderr) == (1, True)


# What the server's Python does not have, or need not.
ABSENT = ("torch", "onnx", "onnx_ir", "safetensors", "triton", "polygraphy", "click", "rich", "tensorrt", "cuda")


@pytest.mark.parametrize(
    ("start", "backend", "also"),
    [
        (GENERATOR, "ort", ()),
        (GENERATOR, "tensorrt", ("onnxruntime",)),
        (SYNC, "ort", ("onnxruntime", "tokenizers", "jinja2", "ml_dtypes", "llguidance")),
    ],
)
def test_the_runtime_imports_nothing_else(tmp_path, start, backend, also):
    """Every module, in an interpreter that has neither this package nor what it depends on."""
    names = []
    for relative, source in runtime_files(backend, start).items():
        (tmp_path / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / relative)
        names.append(relative.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    (tmp_path / "triton_python_backend_utils.py").write_text("")
    code = f"""
import sys
sys.path = [{str(tmp_path)!r}] + [p for p in sys.path if p not in ("", {str(Path.cwd())!r})]
sys.modules.update(dict.fromkeys({(*ABSENT, *also)!r}))
import importlib
for name in {names!r}:
    assert importlib.import_module(name).__file__.startswith({str(tmp_path)!r}), name
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def script(name):
    sys.modules["heart"] = heart  # which lies beside it in a repository
    path = Path(str(files("deepseek_trt.engines.model_repository") / "files" / name))
    spec = importlib.util.spec_from_file_location(f"served_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def test_flags_of_serve_sh():
    module = script("flags.py")
    flags, server = module.split_flags(["--http-port=81", "--log-verbose", "--grpc-port", "82", "--tritonserver=true"])
    assert (flags, server) == ({"http-port": ["81"], "log-verbose": [None], "grpc-port": ["82"]}, "true")
    assert module.own_shared_memory(flags) in flags["backend-config"][0]
    command = module.command_of(server, flags, ["a", "b"])
    assert {"--http-port=81", "--grpc-port=82", "--metrics-port=8002", "--log-verbose"} <= set(command)
    assert {"--http-address=127.0.0.1", "--load-model=a", "--load-model=b"} <= set(command)
    assert "--disable-auto-complete-config" in command
    with pytest.raises(SystemExit, match="no such-server"):
        module.command_of("such-server", {}, ["a"])
    with pytest.raises(SystemExit, match="is no flag"):
        module.split_flags(["8000"])


def test_a_model_that_is_loaded_again_has_its_time_anew():
    """While it was not loaded its count of steps stood still, which is no engine's fault."""
    health, beating = script("probes.py").Health(1.0), {"m": {"heartbeats_total": 5.0}}
    loaded, unloaded = {"": 1.0, "m": 1.0}, {"": 1.0}
    for _ in range(4):
        health.look(200, beating, loaded, 0.5)
    assert health.stopped() == ["m"]
    health.look(503, beating, unloaded, 0.5)
    health.look(200, beating, loaded, 0.5)
    assert health.stopped() == []


def test_control_endpoints_ask_for_a_key_unless_given_flags_say_otherwise():
    control = script("control.py")
    key, flags = control.control_key(None), {}
    assert key != control.control_key(None)
    assert control.restrict(flags, key) == {"deepseek-trt-control": key}
    both = f"model-repository,shared-memory,trace,logging:deepseek-trt-control={key}"
    assert flags == {"http-restricted-api": [both], "grpc-restricted-protocol": [both]}
    own = {"http-restricted-api": ["model-repository,health:a=b", "trace:c=d"], "grpc-restricted-protocol": []}
    assert control.restrict(own, key) == {"a": "b", "c": "d", "deepseek-trt-control": key}
    assert own["http-restricted-api"][2] == f"shared-memory,logging:deepseek-trt-control={key}"
    assert own["grpc-restricted-protocol"] == [both]


def test_a_control_file_keeps_the_key(tmp_path):
    control, file = script("control.py"), tmp_path / "control"
    key = control.control_key(str(file))
    assert file.read_text() == f"deepseek-trt-control: {key}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert control.control_key(str(file)) == key
    file.write_text("")  # as it is where its maker was killed
    key = control.control_key(str(file))
    assert file.read_text() == f"deepseek-trt-control: {key}\n"


def _linked(file):
    (file.parent / "other").touch(0o600)
    file.symlink_to("other")


def _written(data, mode=0o600):
    def write(file):
        file.write_bytes(data)
        file.chmod(mode)

    return write


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_written(b"deepseek-trt-control: " + b"a" * 64, 0o644), "nobody else can read"),
        (_written(b"deepseek-trt-control: short"), "one line"),
        (_written(b"deepseek-trt-control: " + b"a" * 40 + b"\nx: y"), "one line"),
        (_written(b"other: " + b"a" * 64), "one line"),
        (_written(b"\xff" * 64), "utf-8"),
        (_linked, "control"),
        (lambda file: file.mkdir(), "control"),
        (lambda file: os.mkfifo(file, 0o600), "must be a file"),
    ],
)
def test_a_control_file_of_others_is_refused(tmp_path, spoil, words):
    spoil(tmp_path / "control")
    with pytest.raises(SystemExit, match=words):
        script("control.py").control_key(str(tmp_path / "control"))


def test_a_spoiled_file_is_named(repository, tmp_path):
    version = Path(shutil.copytree(repository / "deepseek_v2" / "1", tmp_path / "1"))
    code = (version / "model.py").read_text().split("check_all()\nsys.")[0] + "check_all()\n"
    (version / "check.py").write_text(code)

    def check():
        return subprocess.run([sys.executable, version / "check.py"], capture_output=True, text=True, check=False)

    assert check().returncode == 0
    (version / "bundle" / "config.json").write_text("{}")
    assert "config.json is not the file that was written" in check().stderr
    (version / "bundle" / "config.json").unlink()
    assert "config.json is missing" in check().stderr
    shutil.copy(repository / "deepseek_v2" / "1" / "bundle" / "config.json", version / "bundle")
    (version / "notes.txt").write_text("mine")
    (version / "runtime" / "__pycache__").mkdir()
    (version / "runtime" / "__pycache__" / "numpy.pyc").write_text("")
    assert check().returncode == 0
    (version / "runtime" / "numpy.py").write_text("raise SystemExit('planted')")
    assert "numpy.py is none of the runtime's files" in check().stderr
