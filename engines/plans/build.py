"""Build: from a bundle and a plugin library to prefill.plan and decode.plan, on a machine with no GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.engines.plans.check import has_kernels, has_narrow
from deepseek_trt.engines.plans.chips import chips_of, memory_of, stand_in_note
from deepseek_trt.engines.plans.deferred import deferred
from deepseek_trt.engines.plans.flavour import Flavour, open_flavour
from deepseek_trt.engines.plans.input_len import with_input_len
from deepseek_trt.engines.plans.parse import Parsed, layers_by_kind, network_tensors, parse_graph
from deepseek_trt.engines.plans.plan import BuildSpec, Plan, PlanRecord, Profile, plan_files, plan_path
from deepseek_trt.engines.plans.profiles import profile_of
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import GraphSpec
from deepseek_trt.export.bundle.manifest import list_added
from deepseek_trt.export.bundle.recipes import too_large_for_tensorrt
from deepseek_trt.export.errors import BuildError, BundleError
from deepseek_trt.export.files import file_sha256
from deepseek_trt.export.writing.working import aside, remove_leftover, working_folder
from deepseek_trt.plugins.tensorrt.loading import load_library, loaded_from
from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, MANIFEST, PLUGINS_FOLDER, read_manifest

BuildProgress = Callable[[str, int, int], None]  # phase, steps done, steps


@dataclass(frozen=True)
class BuiltPlan(Plan):
    """`fresh`: whether it was built now or had been built of the same inputs before. `note`: what of the kernels is
    slower than it could be, or empty.
    """

    fresh: bool
    note: str = ""


def build_with_library(
    bundle: Bundle, spec: BuildSpec, library: Path, progress: BuildProgress | None = None
) -> tuple[BuiltPlan, ...]:
    """Build every graph of the bundle; each plan has its PlanRecord beside it as JSON.

    Raises BuildError where TensorRT refuses, where the library does not fit, and where an MLA or MoE node would not run
    as a plugin.
    """
    flavour = check_build(bundle, spec)
    spec = sized(bundle, spec, flavour)
    library = _placed(library, bundle)
    manifest = load_library(library, flavour.trt)
    if manifest.dtype != bundle.manifest.dtype:
        raise BuildError(f"{library} is for {manifest.dtype}, the bundle is {bundle.manifest.dtype}: build it again")
    if not has_narrow(manifest, bundle):
        raise BuildError(
            f"{library} has no kernels for the formats of the bundle's narrow weights and cache: build it again"
        )
    chips = chips_of(spec, flavour)
    for sm in chips:
        if not has_kernels(manifest, sm):
            raise BuildError(f"{library} has no kernels for SM {sm}: run deepseek-trt plugins --sm {sm}")
    list_added(bundle.path, [f"{PLUGINS_FOLDER}/{name}" for name in (LIBRARY, MANIFEST)])
    memory, note = loaded_from(library, manifest), stand_in_note(manifest, chips)
    library_facts = (memory, manifest.sha256, tuple(manifest.ops))
    build = _Build(bundle.listed_anew(), spec, flavour, *library_facts, note, progress or (lambda *_: None))
    return tuple(map(build.plan, bundle.manifest.graphs))


def check_build(bundle: Bundle, spec: BuildSpec) -> Flavour:
    """The flavour that builds, once all that is knowable before kernels are compiled is right; BuildError otherwise."""
    if spec.weights == "embedded" and bundle.manifest.by_reference:
        raise BuildError("a by-reference bundle has no weights to embed: use --weights shared, or export with weights")
    if bundle.manifest.speculation is not None:
        raise BuildError(
            f"{bundle.path} was exported with --mtp, and of the graphs with hidden states and the graph mtp no engines "
            "are built: export the checkpoint without --mtp"
        )
    large = too_large_for_tensorrt(record.recipe for record in bundle.manifest.weights)
    if large:
        raise BuildError(
            f"{large[0].name} {list(large[0].shape)} holds 2^31 numbers or more, which TensorRT cannot take, and is no "
            "stack of experts, which could be split: run this bundle with ort"
        )
    flavour = open_flavour(spec.flavour)
    flavour.check_chips(spec.sms)
    for graph in bundle.manifest.graphs:
        profile_of(graph, bundle.manifest.cache, sized(bundle, spec, flavour))
    return flavour


def sized(bundle: Bundle, spec: BuildSpec, flavour: Flavour) -> BuildSpec:
    """The spec with a max_input_len: its own, or what suits the chips that it is for."""
    if spec.max_input_len:
        return spec
    return with_input_len(spec, bundle, chips_of(spec, flavour), memory_of(flavour))


@dataclass(frozen=True)
class _Build:
    """What all plans of one build have in common."""

    bundle: Bundle
    spec: BuildSpec
    flavour: Flavour
    in_memory: Path
    library_sha256: str
    ops: tuple[str, ...]
    note: str
    progress: BuildProgress

    def plan(self, graph: GraphSpec) -> BuiltPlan:
        path, source = plan_path(self.bundle, graph.name), self._source_sha256(graph)
        done = _up_to_date(self.bundle, graph.name, source)
        if done is not None:
            remove_leftover(path)
            return BuiltPlan(path, done, fresh=False, note=self.note)
        with working_folder(path) as folder, deferred() as stopped:
            record = self._make(graph, source, folder / path.name, stopped)
            record.write(folder / _record_path(path).name)
            _record_path(path).unlink(missing_ok=True)  # never a record beside another plan
            (folder / path.name).rename(path)
            (folder / _record_path(path).name).rename(_record_path(path))
            list_added(self.bundle.path, plan_files(graph.name))
        return BuiltPlan(path, record, fresh=True, note=self.note)

    def _make(self, graph: GraphSpec, source: str, made: Path, stopped: Callable[[], bool]) -> PlanRecord:
        """Write the plan to `made`."""
        self.flavour.log.errors.clear()
        parsed = parse_graph(self.bundle, graph, self.spec, self.flavour, self.ops)
        profile = profile_of(graph, self.bundle.manifest.cache, self.spec)
        self._serialize(parsed, self._configure(parsed, profile, stopped), made)
        return PlanRecord(
            graph=graph.name,
            spec=self.spec,
            flavour_version=self.flavour.version,
            inputs=network_tensors(parsed.network, "input"),
            weights=parsed.weights,
            outputs=network_tensors(parsed.network, "output"),
            profile=profile,
            layers=layers_by_kind(parsed.network),
            plugins=parsed.plugins,
            plugin_library=f"{PLUGINS_FOLDER}/{LIBRARY}",
            plugin_library_sha256=self.library_sha256,
            source_sha256=source,
            plan_sha256=file_sha256(made),
            plan_bytes=made.stat().st_size,
        )

    def _source_sha256(self, graph: GraphSpec) -> str:
        """The sha256 of what decides what the plan holds; its small weights, or all of them, come from one export."""
        digest = hashlib.sha256(self.bundle.traced_bytes(graph.name))
        versions = [self.flavour.name, self.flavour.version, self.library_sha256]
        facts = [dataclasses.astuple(self.spec), *versions, self.bundle.manifest.fingerprint]
        digest.update(repr(facts).encode())
        return digest.hexdigest()

    def _configure(self, parsed: Parsed, profile: Profile, stopped: Callable[[], bool]) -> Any:
        trt = self.flavour.trt
        config = parsed.builder.create_builder_config()
        shapes = parsed.builder.create_optimization_profile()
        for name, (smallest, likeliest, largest) in profile.shapes.items():
            shapes.set_shape(name, smallest, likeliest, largest)
        if config.add_optimization_profile(shapes) < 0:
            raise BuildError(f"{self.flavour.name} refuses the profile {profile.shapes}")
        self.flavour.set_chips(config, self.spec.sms)
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        self.flavour.keep_capturable(config)
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 is float32: TF32 keeps 10 bits of mantissa
        if self.spec.embed_plugins:
            config.plugins_to_serialize = [str(self.in_memory)]
        config.progress_monitor = _monitor(trt, self.progress, stopped)
        return config

    def _serialize(self, parsed: Parsed, config: Any, path: Path) -> None:
        """Build, and write the plan as it is made where the flavour can stream."""
        if hasattr(parsed.builder, "build_serialized_network_to_stream"):
            with path.open("wb") as out:
                stream = _writer(self.flavour.trt, out.write)
                built = parsed.builder.build_serialized_network_to_stream(parsed.network, config, stream)
            if stream.error is not None:
                raise stream.error
        else:
            plan = parsed.builder.build_serialized_network(parsed.network, config)
            built = plan is not None
            if built:
                path.write_bytes(memoryview(plan))
        if not built:
            raise BuildError(f"{self.flavour.name} cannot build {path.stem}: {self.flavour.log.last()}")


def _record_path(plan: Path) -> Path:
    return plan.with_suffix(".plan.json")


def _up_to_date(bundle: Bundle, graph: str, source: str) -> PlanRecord | None:
    """The record of a plan that is listed, whole and of these inputs."""
    plan = plan_files(graph)[0]
    try:
        record = PlanRecord.of(bundle, graph)
        if record.source_sha256 != source or bundle.files.sha256.get(plan) != record.plan_sha256:
            return None
        bundle.files.check((plan,))
    except BundleError:
        return None
    return record


def _placed(library: Path, bundle: Bundle) -> Path:
    """The library in the bundle, copied with its manifest where it lies elsewhere: plans name it by its place there."""
    folder = bundle.path / PLUGINS_FOLDER
    if library.resolve() == folder.resolve() / LIBRARY:
        return folder / LIBRARY
    read_manifest(library)
    folder.mkdir(exist_ok=True)
    for source, name in ((library.with_name(MANIFEST), MANIFEST), (library, LIBRARY)):
        with aside(folder / name) as draft:
            shutil.copyfile(source, draft)
    return folder / LIBRARY


def _writer(trt: Any, write: Callable[[Any], Any]) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None  # to be raised when no C++ is on the stack

        def write(self, data: Any) -> int:
            try:
                write(data)
            except OSError as error:
                self.error = error
                return -1
            return len(data)

    return Writer()


def _monitor(trt: Any, progress: BuildProgress, stopped: Callable[[], bool]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self.steps[phase_name] = int(num_steps)
            progress(phase_name, 0, int(num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, int(step) + 1, self.steps.get(phase_name, 0))
            return not stopped()

        def phase_finish(self, phase_name: str) -> None:
            steps = self.steps.get(phase_name, 0)
            progress(phase_name, steps, steps)

    return Monitor()
