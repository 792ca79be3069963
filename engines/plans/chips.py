"""Which chips a build is for, and whether a plugin library's kernels were compiled for them."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_trt.engines.plans.flavour import Flavour
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.engines.sessions.tensorrt.cuda import visible_memory, visible_sm
from deepseek_trt.export.errors import BackendError, BuildError
from deepseek_trt.plugins.kernels.chips import OLDEST, runs_on
from deepseek_trt.plugins.tensorrt.manifest import Manifest


def chips_of(spec: BuildSpec, flavour: Flavour) -> tuple[int, ...]:
    """The chips that plans of `spec` run on: those named, or this machine's GPU where the flavour builds for that.

    Raises BuildError where there is no GPU that the kernels run on, and the flavour cannot build without.
    """
    if flavour.targets_chips:
        return spec.sms
    try:
        sm = visible_sm()
    except BackendError as error:
        raise BuildError(f"{flavour.name} builds for the GPU of this machine only: {error}") from None
    if sm < OLDEST:
        raise BuildError(
            f"the plugins' kernels need SM {OLDEST} or newer; this GPU is SM {sm}: run the bundle with ort"
        )
    return (sm,)


def memory_of(flavour: Flavour) -> int | None:
    """Bytes of this machine's GPU where the flavour builds for that; None where it builds for others."""
    if flavour.targets_chips:
        return None
    try:
        return visible_memory()
    except BackendError:
        return None


def stand_in_note(manifest: Manifest, sms: Sequence[int]) -> str:
    """What to say where some of the chips run PTX that was made for an older one; else empty."""
    standing_in = [sm for sm in sms if not any(runs_on(own, sm) for own in manifest.sms)]
    if not standing_in:
        return ""
    chips, made_for = ", ".join(map(str, standing_in)), ", ".join(map(str, manifest.ptx_sms))
    options = " ".join(f"--sm {sm}" for sm in standing_in)
    return (
        f"the plugin library has no kernels compiled for SM {chips}: PTX made for SM {made_for} stands in, which is "
        f"slower; deepseek-trt plugins {options} compiles them, where this version knows the chip"
    )
