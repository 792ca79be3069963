"""A classifier in a tritonserver model repository: not decoupled, its requests batched by the server."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from deepseek_trt.engines.generation.text import Text
from deepseek_trt.engines.model_repository.config import MODEL_FILE
from deepseek_trt.engines.model_repository.placing import bundle_files, place
from deepseek_trt.engines.model_repository.runtime import CLASSIFIER, GENERATOR, REQUIREMENTS, runtime_files
from deepseek_trt.engines.model_repository.writer import (
    VERSION,
    check_name,
    replace_folder,
    script_bytes,
    write_manifest,
    write_scripts,
    written_inputs,
)
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import CLASSIFICATION
from deepseek_trt.export.errors import BundleError, RequestError

_BACKEND = "ort"
_README = """# {name}

Labels texts: {labels}. Send up to {batch} texts in one request; the server batches requests that arrive together.

    curl -s localhost:8000/v2/models/{name}/generate -d '{{"text_input": "a fine film"}}'

Outputs: label and score of the best one; scores and logits of all, in the order above.
"""


@dataclass(frozen=True)
class ClassificationRequest:
    """max_batch_size texts are computed at once; a text waits at most max_queue_delay_us for others."""

    bundle: Path
    repository: Path
    name: str
    max_batch_size: int = 32
    max_queue_delay_us: int = 2000


@dataclass(frozen=True)
class ClassificationRepository:
    """What was written; `fresh` is False where it was there already, from the same inputs."""

    path: Path
    name: str
    labels: tuple[str, ...]
    max_batch_size: int
    requirements: tuple[str, ...]
    fresh: bool


def write_classification(request: ClassificationRequest) -> ClassificationRepository:
    """The model as REPOSITORY/NAME beside others, which are left alone; a model of this name is replaced as a whole.

    Raises BundleError for a bundle that cannot be served, OutputError where the name is taken by something else.
    """
    bundle = _servable(request)
    target, inputs = request.repository / request.name, _fingerprint(bundle, request)
    fresh = written_inputs(target) != inputs
    if fresh:
        request.repository.mkdir(parents=True, exist_ok=True)
        replace_folder(target, lambda folder: _write_model(folder, bundle, request, inputs))
    write_scripts(request.repository)
    labels = bundle.manifest.classifier.labels if bundle.manifest.classifier else ()
    requirements = REQUIREMENTS[_BACKEND]
    return ClassificationRepository(
        request.repository, request.name, labels, request.max_batch_size, requirements, fresh
    )


def _servable(request: ClassificationRequest) -> Bundle:
    check_name(request.name)
    if request.max_batch_size < 1:
        raise RequestError(f"max_batch_size {request.max_batch_size}: must be at least 1")
    bundle = Bundle.open(request.bundle)
    if bundle.manifest.classifier is None:
        raise BundleError(f"{request.bundle} is for {bundle.manifest.task}, not for {CLASSIFICATION}")
    if bundle.manifest.by_reference or bundle.manifest.interface.inputs_embeds:
        raise BundleError(
            f"{request.bundle} refers to its checkpoint, or takes inputs_embeds: export without --by-reference and "
            "--inputs-embeds"
        )
    Text(bundle)  # BundleError where there is no tokenizer
    return bundle


def _write_model(folder: Path, bundle: Bundle, request: ClassificationRequest, inputs: str) -> None:
    version_folder = folder / VERSION
    placed = version_folder / "bundle"
    placed.mkdir(parents=True)
    for file in bundle_files(bundle):
        place(file, placed / file.name)
    _place_widened(bundle, placed)
    for relative, source in runtime_files(_BACKEND, CLASSIFIER).items():
        target = version_folder / "runtime" / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (version_folder / MODEL_FILE).write_bytes(_model_file())
    facts = {"inputs": inputs, "deepseek_trt": version("deepseek-trt"), "task": CLASSIFICATION}
    write_manifest(version_folder, {**facts, "requirements": REQUIREMENTS[_BACKEND]})
    (folder / "config.pbtxt").write_text(_config(bundle, request), encoding="utf-8")
    labels = ", ".join(bundle.manifest.classifier.labels if bundle.manifest.classifier else ())
    readme = _README.format(name=request.name, labels=labels, batch=request.max_batch_size)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _place_widened(bundle: Bundle, placed: Path) -> None:
    """The graph that computes bfloat16 in float32, made now: the server's Python has no onnx."""
    if bundle.manifest.dtype != "bfloat16":
        return
    from deepseek_trt.engines.sessions.prepared import widened_path
    from deepseek_trt.export.passes.widen import widened_bytes

    target = widened_path(Bundle(placed, bundle.manifest), "model")
    target.write_bytes(widened_bytes(bundle.graph_path("model")))


def _model_file() -> bytes:
    """The file that checks the folder, then starts the classifier instead of the generator."""
    script = script_bytes(MODEL_FILE).decode()
    assert GENERATOR in script
    return script.replace(GENERATOR, CLASSIFIER).encode()


def _config(bundle: Bundle, request: ClassificationRequest) -> str:
    """Every field that matters, written out."""
    classifier = bundle.manifest.classifier
    assert classifier is not None
    labels = json.dumps(json.dumps(classifier.labels, ensure_ascii=False), ensure_ascii=False)
    count = len(classifier.labels)
    return f"""name: {json.dumps(request.name)}
backend: "python"
default_model_filename: "{MODEL_FILE}"
max_batch_size: {request.max_batch_size}
version_policy {{ specific {{ versions: [ {VERSION} ] }} }}
model_transaction_policy {{ decoupled: false }}
dynamic_batching {{ max_queue_delay_microseconds: {request.max_queue_delay_us} }}
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
input [ {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [
  {{ name: "label" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "score" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "scores" data_type: TYPE_FP32 dims: [ {count} ] }},
  {{ name: "logits" data_type: TYPE_FP32 dims: [ {count} ] }}
]
parameters {{ key: "labels" value {{ string_value: {labels} }} }}
"""


def _fingerprint(bundle: Bundle, request: ClassificationRequest) -> str:
    """Of all that decides what is written: the request, the bundle's files by size and time, this package's sources."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in bundle_files(bundle)]
    digest = hashlib.sha256(repr((request.name, _config(bundle, request), stats)).encode())
    for source in (*runtime_files(_BACKEND, CLASSIFIER).values(), *Path(__file__).parent.glob("*.py")):
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    digest.update(script_bytes(MODEL_FILE))
    return digest.hexdigest()
