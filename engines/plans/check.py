"""Whether plans, plugin library, TensorRT and GPU belong together: asked before TensorRT reads a byte of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from deepseek_trt.engines.plans.chips import stand_in_note
from deepseek_trt.engines.plans.flavour import MODULES, Flavour
from deepseek_trt.engines.plans.plan import Plan, PlanRecord, plan_files
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import CacheSpec, GraphSpec, TensorSpec, past_name
from deepseek_trt.export.bundle.manifest import WeightRecord
from deepseek_trt.export.bundle.recipes import tensorrt_parts
from deepseek_trt.export.errors import BackendError, BuildError, BundleError
from deepseek_trt.plugins.aot.narrow_use import narrow_use
from deepseek_trt.plugins.kernels.chips import runs_on
from deepseek_trt.plugins.narrow_names import CODES_DTYPE, plugin_name
from deepseek_trt.plugins.tensorrt.manifest import MANIFEST, Manifest, read_manifest

MOST_CHUNK = 4096  # tokens; beyond, an H100's matrix units are busy anyway (input_len.py)
AGAIN = "run deepseek-trt build again"


@dataclass(frozen=True)
class Limits:
    """What both engines were built for: rows, tokens a row and call, pages a row, pages in the pool."""

    batch: int
    input_len: int
    table: int
    pages: int


def read_plans(bundle: Bundle) -> dict[str, Plan]:
    """The plans of the bundle's graphs by name, as their records tell.

    Raises BundleError where one is missing or damaged, BackendError where it is of another bundle or of another build
    than the first.
    """
    plans: dict[str, Plan] = {}
    for graph in bundle.manifest.graphs:
        record, name = PlanRecord.of(bundle, graph.name), plan_files(graph.name)[0]
        if bundle.files.sha256.get(name) != record.plan_sha256:
            raise BundleError(f"{bundle.path / name} is not the plan that its record describes: {AGAIN}")
        plan = plans[graph.name] = Plan(bundle.path / name, record)
        _check_inputs(plan, graph)
        _check_weights(plan, bundle)
    first, *others = plans.values()
    for other in others:
        if other.record.spec != first.record.spec or other.record.flavour_version != first.record.flavour_version:
            raise BackendError(f"{first.path.name} and {other.path.name} were built with different options: {AGAIN}")
    return plans


def _check_inputs(plan: Plan, graph: GraphSpec) -> None:
    found = [t for t in plan.record.inputs if t.name not in plan.record.weights]
    same = len(found) == len(graph.inputs) and all(map(_alike, found, graph.inputs))
    if not same:
        raise BackendError(f"{plan.path} does not take the inputs of {graph.file}; the bundle has changed: {AGAIN}")


def _alike(built: TensorSpec, exported: TensorSpec) -> bool:
    """A plan's record has -1 where a graph has a symbol."""
    dims = tuple(-1 if isinstance(dim, str) else dim for dim in exported.dims)
    return (built.name, built.dtype, built.dims) == (exported.name, exported.dtype, dims)


def _check_weights(plan: Plan, bundle: Bundle) -> None:
    """The bundle's weights are those that the plan wants to be given, by name, shape and dtype."""
    stored = {p.name: (p.shape, given_dtype(w)) for w in bundle.manifest.weights for p in tensorrt_parts(w.recipe)}
    for tensor in plan.record.inputs:
        if tensor.name in plan.record.weights and stored.get(tensor.name) != (tensor.dims, tensor.dtype):
            raise BackendError(
                f"{plan.path} wants {tensor.name} as {tensor.dtype} {list(tensor.dims)}, the bundle has "
                f"{stored.get(tensor.name, 'none')}: {AGAIN}"
            )


def given_dtype(weight: WeightRecord) -> str:
    """What TensorRT is given the weight as: codes as bytes."""
    recipe = weight.recipe
    return weight.dtype if recipe.narrow is None or recipe.is_scales else CODES_DTYPE


def check_version(plan: Plan, flavour: Flavour) -> None:
    """A plan is read only by the TensorRT version that built it."""
    built = plan.record.flavour_version
    if built != flavour.version:
        raise BackendError(
            f"{plan.path} was built by {MODULES[flavour.name]} {built}, this is {flavour.version}: {AGAIN}, "
            f"or install {built}"
        )


def is_for_chip(plan: Plan, sm: int) -> bool:
    """Whether the plan was built for this chip; one without a list was built on the GPU that it is for."""
    return not plan.record.spec.sms or sm in plan.record.spec.sms


def wrong_chip(plan: Plan, sm: int, gpu: str) -> BackendError:
    """What to say where `is_for_chip` is False, and TensorRT does not say that it runs even so."""
    built = ", ".join(map(str, plan.record.spec.sms))
    return BackendError(
        f"{plan.path} was built for SM {built}; {gpu} is SM {sm}: run deepseek-trt build with --sm {sm}"
    )


def check_library(bundle: Bundle, plan: Plan, sm: int) -> Path | None:
    """The plugin library that the plan was built with; None where the plan carries it.

    Raises BundleError where the bundle lists none or another file, BuildError where it is damaged, BackendError where
    it is another one, or has no kernels for the GPU.
    """
    if plan.record.spec.embed_plugins:
        return None
    name = plan.record.plugin_library
    bundle.files.check((name, f"{PurePosixPath(name).parent}/{MANIFEST}"), "run deepseek-trt plugins again, then build")
    path = bundle.path / name
    manifest = read_manifest(path)
    if manifest.sha256 != plan.record.plugin_library_sha256:
        raise BackendError(f"{path} is not the library that {plan.path.name} was built with: {AGAIN}")
    if not has_kernels(manifest, sm):
        raise BackendError(
            f"{path} has no kernels for SM {sm}; it has SM {', '.join(map(str, manifest.sms))}: "
            f"run deepseek-trt plugins --sm {sm}, then deepseek-trt build"
        )
    return path


def kernels_note(bundle: Bundle, plan: Plan, sm: int) -> str:
    """What to say where PTX stands in on this GPU for the plan's kernels; empty also where their library is gone."""
    try:
        manifest = read_manifest(bundle.path / plan.record.plugin_library)
    except (BuildError, BundleError):  # the plan carries it
        return ""
    return stand_in_note(manifest, [sm]) if manifest.sha256 == plan.record.plugin_library_sha256 else ""


def has_kernels(manifest: Manifest, sm: int) -> bool:
    """The library's own rule: compiled code for this chip, or an earlier 8.x for a later one; else PTX."""
    return any(runs_on(own, sm) for own in manifest.sms) or any(ptx <= sm for ptx in manifest.ptx_sms)


def has_narrow(manifest: Manifest, bundle: Bundle) -> bool:
    """Whether the library has kernels for the formats of the bundle's narrow weights and cache, and for the weights'
    columns.
    """
    use = narrow_use((weight.recipe for weight in bundle.manifest.weights), bundle.manifest.cache.narrow)
    units = {row["op"]: row["constants"]["UNIT"] for row in manifest.binaries if row["kernel"] == "linear_narrow"}
    linear = {plugin_name("LinearNarrow", format): unit for format, unit in use.linear}
    experts = {plugin_name("MoeExpertsNarrow", format) for format in use.experts}
    experts |= {"MoeExperts"} if use.whole_experts and bundle.manifest.model.n_routed_experts else set()
    decode = plugin_name("MlaDecodeNarrow", use.cache.format) if use.cache else "MlaDecode"
    return units == linear and experts | {decode} <= set(manifest.ops)


def open_plan(bundle: Bundle, plan: Plan) -> BinaryIO:
    """The plan, once its bytes are those that bundle and record describe; BundleError where they are others."""
    return bundle.files.open(plan.path.name, AGAIN)


def limits_of(plans: dict[str, Plan]) -> Limits:
    """The largest sizes of the plans' profiles; both plans have the same, as they were built with the same options."""
    shapes = plans["prefill"].record.profile.shapes
    batch, input_len = shapes["input_ids"][2]
    return Limits(batch, input_len, shapes["page_table"][2][1], shapes[past_name(0)][2][0])


def chunk_of(limits: Limits) -> int:
    """Tokens of a prompt in one step: what the engines were built for, as far as decoding rows should wait for it."""
    return min(limits.input_len, MOST_CHUNK)


def check_pages(limits: Limits, cache: CacheSpec, pages: int) -> None:
    """BackendError where the pool would be larger than the engines, or any engine of TensorRT, take."""
    if pages > cache.most_pages:
        raise BackendError(
            f"{pages} cache pages are needed, 2^31 numbers a layer or more; TensorRT takes {cache.most_pages}, "
            f"{cache.longest(1)} tokens of all sequences together: use fewer or shorter prompts, or --backend ort"
        )
    if pages > limits.pages:
        raise BackendError(
            f"{pages} cache pages are needed, the engines take at most {limits.pages}: use fewer or shorter prompts, "
            "or build with a larger --max-batch-size or --max-seq-len"
        )
