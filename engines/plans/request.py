"""From a BuildRequest to plans: the plugin library first, where it is missing, then an engine a graph."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deepseek_trt.engines.plans.build import BuildProgress, BuiltPlan, build_with_library, check_build
from deepseek_trt.engines.plans.check import has_narrow
from deepseek_trt.engines.plans.chips import chips_of
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BuildError
from deepseek_trt.export.writing.working import locked
from deepseek_trt.plugins.kernels.chips import compiled_for
from deepseek_trt.plugins.tensorrt.for_bundle import PluginReporter, PluginRequest, build_in_locked, is_listed
from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, PLUGINS_FOLDER, read_manifest
from deepseek_trt.plugins.tensorrt.op_tables import fixed_sizes

_M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class BuildRequest:
    """Build the plans of the bundle in the folder `bundle`, as `spec` says."""

    bundle: Path
    spec: BuildSpec = field(default_factory=BuildSpec)


def build_plans(
    request: BuildRequest, progress: BuildProgress | None = None, plugins: PluginReporter | None = None
) -> tuple[BuiltPlan, ...]:
    """Build prefill.plan and decode.plan, or the one plan of a bundle without a cache.

    A plugin library for the request's chips is built first where the bundle has none. Raises BundleError, and
    BuildError where TensorRT refuses.
    """
    _return_freed_memory()
    bundle = Bundle.open(request.bundle)
    chips = chips_of(request.spec, check_build(bundle, request.spec))  # before minutes go into kernels
    with locked(bundle.path):  # nobody replaces the library, or copies half of the plans
        bundle = bundle.listed_anew()
        library = _library(bundle, chips, plugins or PluginReporter())
        return build_with_library(bundle, request.spec, library, progress)


def _library(bundle: Bundle, sms: Sequence[int], plugins: PluginReporter) -> Path:
    """The bundle's library where it is of this model and has kernels compiled for the chips; else one made anew."""
    library = bundle.path / PLUGINS_FOLDER / LIBRARY
    wanted = tuple(dict.fromkeys(own for sm in sms for own in compiled_for(sm)))
    if is_listed(bundle) and _suits(library, bundle, wanted):
        return library
    return build_in_locked(PluginRequest(bundle.path, wanted), plugins).path


def _suits(library: Path, bundle: Bundle, sms: Sequence[int]) -> bool:
    """Whether the library is whole, of the bundle's sizes and dtype, and has kernels compiled for these very chips.

    One left by a build for other chips would run, too: as PTX, or with tiles of a smaller chip.
    """
    try:
        manifest = read_manifest(library)
    except BuildError:
        return False
    ours = bundle.manifest
    sizes = fixed_sizes(ours.model, ours.cache.page_size)
    same_model = (manifest.dtype, dict(manifest.sizes)) == (ours.dtype, sizes)
    if not same_model or not has_narrow(manifest, bundle):
        return False
    return set(sms) <= set(manifest.sms) and bool(sms or manifest.ptx_sms)


def _return_freed_memory() -> None:
    """Have glibc hand freed buffers back to the system: V2's engines then take 50 MB less at the peak.

    glibc raises its threshold to the largest block that was freed, and keeps what lies below it in the heap; a fixed
    threshold of 256 KiB keeps TensorRT's buffers out of the heap.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 18)
