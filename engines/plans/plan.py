"""Plans: what a build asks for, and the JSON beside each plan (an engine itself can be asked on its GPU only)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import TensorSpec
from deepseek_trt.export.errors import BundleError

PLAN_SCHEMA = 1
Weights = Literal["shared", "embedded"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class BuildSpec:
    """What to build. max_seq_len counts prompt and answer of one sequence; sms is empty where the GPU decides.

    weights "shared": large tensors are engine inputs, so that both engines bind one copy; "embedded": plans hold them.
    """

    flavour: str = "rtx"
    sms: tuple[int, ...] = ()
    max_batch_size: int = 8
    max_input_len: int = 1024
    max_seq_len: int = 4096
    weights: Weights = "shared"
    embed_plugins: bool = False


def plan_path(bundle: Bundle, graph: str) -> Path:
    """Where the plan of one of the bundle's graphs lies; its record is the .plan.json beside it."""
    return bundle.path / f"{graph}.plan"


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
    def read(cls, path: Path) -> PlanRecord:
        """BundleError when there is none, or it is of another schema or damaged."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if raw["schema_version"] != PLAN_SCHEMA:
                raise BundleError(f"{path} is of schema {raw['schema_version']}, not {PLAN_SCHEMA}: build it again")
            spec = BuildSpec(**{**raw["spec"], "sms": tuple(raw["spec"]["sms"])})
            shapes = {name: _three(shapes) for name, shapes in raw["profile"]["shapes"].items()}
            tensors = {key: tuple(_tensor(t) for t in raw[key]) for key in ("inputs", "outputs")}
            fixed = {"spec": spec, "profile": Profile(shapes), "weights": tuple(raw["weights"])}
            return cls(**{**raw, **tensors, **fixed})
        except FileNotFoundError:
            raise BundleError(f"{path} is missing: make it with deepseek-trt build") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BundleError(f"{path} is damaged ({error!r}): build the plans again") from None


@dataclass(frozen=True)
class Plan:
    """A plan on disk, and what lies beside it."""

    path: Path
    record: PlanRecord


def _three(shapes: list[list[int]]) -> tuple[Shape, Shape, Shape]:
    smallest, likeliest, largest = (tuple(shape) for shape in shapes)
    return smallest, likeliest, largest


def _tensor(raw: dict[str, Any]) -> TensorSpec:
    return TensorSpec(raw["name"], raw["dtype"], tuple(raw["dims"]))
