"""Plans: what a build asks for, and the JSON beside each plan (an engine itself can be asked on its GPU only)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import TensorSpec
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.text.wording import shown
from deepseek_trt.export.trust.own_json import own_object, own_record
from deepseek_trt.export.trust.real_files import flaw_of_name

PLAN_SCHEMA = 2
MEND = "make it with deepseek-trt build"
Weights = Literal["shared", "embedded"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class BuildSpec:
    """What to build. max_seq_len counts prompt and answer of one sequence; sms is empty where the GPU decides.

    max_input_len 0 is for the build to choose, by chip and memory (input_len.py); a plan's record has what it chose.

    weights "shared": large tensors are engine inputs, so that both engines bind one copy; "embedded": plans hold them.
    """

    flavour: str = "rtx"
    sms: tuple[int, ...] = ()
    max_batch_size: int = 8
    max_input_len: int = 0
    max_seq_len: int = 4096
    weights: Weights = "shared"
    embed_plugins: bool = False


def plan_files(graph: str) -> tuple[str, str]:
    """The names of a graph's plan, and of its record beside it."""
    return f"{graph}.plan", f"{graph}.plan.json"


def plan_path(bundle: Bundle, graph: str) -> Path:
    """Where the plan of one of the bundle's graphs lies."""
    return bundle.path / plan_files(graph)[0]


def has_plan(bundle: Bundle, graph: str) -> bool:
    """Whether the bundle lists a plan of the graph."""
    return all(name in bundle.files for name in plan_files(graph))


@dataclass(frozen=True)
class Profile:
    """Smallest, likeliest and largest shape of each dynamic input."""

    shapes: dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class PlanRecord:
    """What lies beside a plan. `weights` names the inputs that are bundle weights; `layers` counts layers by kind."""

    graph: str
    spec: BuildSpec
    flavour_version: str
    inputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    profile: Profile
    layers: dict[str, int]
    plugins: dict[str, int]
    plugin_library: str
    plugin_library_sha256: str
    source_sha256: str
    plan_sha256: str
    plan_bytes: int
    schema_version: int = PLAN_SCHEMA

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def of(cls, bundle: Bundle, graph: str) -> PlanRecord:
        """That of a bundle's plan. BundleError when there is none, or it is of another schema or damaged."""
        name = plan_files(graph)[1]
        data, path = bundle.files.read(name, MEND), bundle.path / name
        raw = own_object(data, path, BundleError, MEND)
        record = own_record(cls, raw, ("schema_version", PLAN_SCHEMA), path, BundleError, MEND)
        flaw = _flaw(record, graph)
        if flaw:
            raise BundleError(f"{path}: {flaw}: {MEND}")
        return record


@dataclass(frozen=True)
class Plan:
    """A plan on disk, and what lies beside it."""

    path: Path
    record: PlanRecord


def _flaw(record: PlanRecord, graph: str) -> str:
    """What of the record cannot be, with its key; nothing where all can."""
    if record.graph != graph:
        return f"graph is {shown(record.graph)}"
    flaw = flaw_of_name(record.plugin_library)
    if flaw:
        return f"plugin_library {shown(record.plugin_library)} {flaw}"
    spec = record.spec
    if min(spec.max_batch_size, spec.max_input_len, spec.max_seq_len, *spec.sms) < 1:
        return "spec holds a size below 1"
    for name, shapes in record.profile.shapes.items():
        if any(not 0 <= low <= middle <= high for low, middle, high in zip(*shapes, strict=False)):
            return f"profile: {shown(name)} has the shapes {shown(shapes)}"
    for tensor in record.inputs:
        if any(len(shape) != len(tensor.dims) for shape in record.profile.shapes.get(tensor.name, ())):
            return f"profile: {shown(tensor.name)} has shapes of another rank than {len(tensor.dims)}"
    missing = {tensor.name for tensor in record.inputs} - record.profile.shapes.keys() - set(record.weights)
    return f"profile lacks {shown(min(missing))}" if missing else ""
