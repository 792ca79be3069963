"""Served: one model as the server gets it. What differs between tasks is said here, as data for one writer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.model_repository.runtime import CLASSIFIER, GENERATOR, requirements_of
from deepseek_trt.engines.model_repository.sizes import SizeRequest, serving_backend, settings_for
from deepseek_trt.engines.plans.check import read_plans
from deepseek_trt.engines.plans.flavour import MODULES
from deepseek_trt.engines.serving.names.table import TAKEN
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.serving.tensors import CLASSIFIER_INPUTS, OUTPUTS, Field, classifier_outputs
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import CLASSIFICATION
from deepseek_trt.export.errors import BundleError, RequestError

NO_GPU = "no GPU"
_CLASSIFIER_README = """# {name}

Labels texts: {labels}. Send up to {batch} texts in one request; the server batches requests that arrive together.

    curl -s localhost:8000/v2/models/{name}/generate -d '{{"text_input": "a fine film"}}'

Outputs: label and score of the best one; scores and logits of all, in the order above.
"""


@dataclass(frozen=True)
class ClassifierSettings:
    """max_batch_size texts are computed at once; a text waits at most max_queue_delay_us for others."""

    labels: tuple[str, ...]
    max_batch_size: int = 32
    max_queue_delay_us: int = 2000


@dataclass(frozen=True)
class Served:
    """One model of a repository.

    `why` says why `backend` serves it, and `needs` what it takes beside packages. start is the module of the runtime
    whose TritonPythonModel the server loads. batching and instance are text of config.pbtxt. facts go into the model's
    manifest.json; a readme that is not empty lies in the model's folder.
    """

    name: str
    bundle: Bundle
    settings: ServingSettings | ClassifierSettings
    backend: str
    why: str
    needs: str
    start: str
    decoupled: bool
    max_batch_size: int
    batching: str
    instance: str
    inputs: tuple[Field, ...]
    outputs: tuple[Field, ...]
    parameters: Mapping[str, str]
    facts: Mapping[str, str] = field(default_factory=dict)
    readme: str = ""

    @property
    def requirements(self) -> tuple[str, ...]:
        """Packages that the server's Python must have."""
        return requirements_of(self.backend, self.start)


def served_model(bundle: Bundle, name: str, sizes: SizeRequest) -> Served:
    """The bundle as its task is served; `sizes` are for generation.

    Raises BundleError for a bundle that cannot be served, RequestError for sizes that cannot be had.
    """
    refusal = _refusal(bundle)
    if refusal:
        raise BundleError(f"{bundle.path} {refusal}")
    Text(bundle)  # BundleError where there is no tokenizer
    classifier = bundle.manifest.classifier
    if classifier is None:
        if sizes.generation_config:
            SamplingDefaults.of_bundle(bundle)  # ConfigError or BundleError now, not when the server loads the model
        choice = serving_backend(bundle, sizes.backend)
        settings = settings_for(bundle, dataclasses.replace(sizes, backend=choice.backend))
        return _generator(bundle, name, settings, choice.why)
    if sizes.backend == "tensorrt":
        raise RequestError("classifiers have no plans: leave out --backend tensorrt")
    return _classifier(bundle, name, ClassifierSettings(classifier.labels))


def _refusal(bundle: Bundle) -> str:
    """Why the bundle cannot be served and what to do, or nothing where it can."""
    manifest = bundle.manifest
    if manifest.classifier is not None:
        if manifest.by_reference or manifest.interface.inputs_embeds:
            return "refers to its checkpoint, or takes inputs_embeds: export without --by-reference and --inputs-embeds"
    elif manifest.generation_refusal:
        return f"cannot be served: {manifest.generation_refusal}"
    elif manifest.by_reference:
        return f"refers to {manifest.checkpoint} for its weights: export without --by-reference"
    return ""


def _generator(bundle: Bundle, name: str, settings: ServingSettings, why: str) -> Served:
    """One instance: its scheduler batches all requests, and its cache pages are not shared between processes.

    The parameters hold the settings, which can be edited, and facts of the graphs, for people.
    """
    kind = "KIND_GPU gpus: [ 0 ]" if settings.backend == "tensorrt" else "KIND_CPU"
    return Served(
        name=name,
        bundle=bundle,
        settings=settings,
        backend=settings.backend,
        why=why,
        needs=_gpu_of(bundle) if settings.backend == "tensorrt" else NO_GPU,
        start=GENERATOR,
        decoupled=True,
        max_batch_size=1,  # its scheduler batches
        batching="response_cache { enable: false }",
        instance=f"name: {json.dumps(name)} count: 1 kind: {kind}",
        inputs=TAKEN,
        outputs=OUTPUTS,
        parameters={**settings.to_parameters(), **_graph_facts(bundle)},
    )


def _gpu_of(bundle: Bundle) -> str:
    """E.g. "an NVIDIA GPU of SM 86, and the tensorrt_rtx 1.2.0 that built the plans"."""
    record = next(iter(read_plans(bundle).values())).record
    chips = " or ".join(map(str, record.spec.sms))
    gpu = f"an NVIDIA GPU of SM {chips}" if chips else "the NVIDIA GPU that the plans were built on"
    return f"{gpu}, and the {MODULES[record.spec.flavour]} {record.flavour_version} that built the plans"


def _graph_facts(bundle: Bundle) -> dict[str, str]:
    cache = bundle.manifest.cache
    logits = next(tensor for tensor in bundle.graph("decode").outputs if tensor.name == "logits")
    return {
        "vocab_size": str(logits.dims[-1]),
        "dtype": bundle.manifest.dtype,
        "page_size": str(cache.page_size),
        "cache_bytes_per_token": str(cache.bytes_per_token),
    }


def _classifier(bundle: Bundle, name: str, settings: ClassifierSettings) -> Served:
    """One response a request: the server batches requests by itself."""
    labels, batch = settings.labels, settings.max_batch_size
    return Served(
        name=name,
        bundle=bundle,
        settings=settings,
        backend="ort",
        why="classifiers have no plans",
        needs=NO_GPU,
        start=CLASSIFIER,
        decoupled=False,
        max_batch_size=batch,
        batching=f"dynamic_batching {{ max_queue_delay_microseconds: {settings.max_queue_delay_us} }}",
        instance="count: 1 kind: KIND_CPU",
        inputs=CLASSIFIER_INPUTS,
        outputs=classifier_outputs(len(labels)),
        parameters={"labels": json.dumps(labels, ensure_ascii=False)},
        facts={"task": CLASSIFICATION},
        readme=_CLASSIFIER_README.format(name=name, labels=", ".join(labels), batch=batch),
    )
