"""Chips: which a build is for, when a library that lies there is taken, and what is said where PTX stands in."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import types
from pathlib import Path

import pytest

from deepseek_trt.engines.plans import chips, request
from deepseek_trt.engines.plans.chips import chips_of, stand_in_note
from deepseek_trt.engines.plans.flavour import Flavour
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.engines.plans.request import BuildRequest, build_plans
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.manifest import list_added
from deepseek_trt.export.errors import BackendError, BuildError
from deepseek_trt.plugins.kernels.chips import compiled_for
from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, MANIFEST, SCHEMA, Manifest
from deepseek_trt.plugins.tensorrt.op_tables import fixed_sizes

RTX = Flavour("rtx", types.SimpleNamespace(ComputeCapability=None), None)
FULL = Flavour("tensorrt", types.SimpleNamespace(), None)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(sm): this machine has such a GPU."""
    return lambda sm: monkeypatch.setattr(chips, "visible_sm", lambda: sm)


def test_a_flavour_with_targets_builds_for_the_named(gpu):
    gpu(90)
    assert chips_of(BuildSpec(sms=(86, 120)), RTX) == (86, 120)


def test_a_flavour_without_builds_for_the_gpu_of_this_machine(gpu):
    gpu(90)
    assert chips_of(BuildSpec(flavour="tensorrt"), FULL) == (90,)
    gpu(75)
    with pytest.raises(BuildError, match="need SM 80 or newer; this GPU is SM 75"):
        chips_of(BuildSpec(flavour="tensorrt"), FULL)


def test_and_says_where_there_is_none(monkeypatch):
    def none():
        raise BackendError("there is no NVIDIA driver on this machine")

    monkeypatch.setattr(chips, "visible_sm", none)
    with pytest.raises(BuildError, match="builds for the GPU of this machine only: there is no NVIDIA driver"):
        chips_of(BuildSpec(flavour="tensorrt"), FULL)


@pytest.mark.parametrize(
    ("sm", "own"),
    [
        (80, (80,)),
        (86, (86,)),
        (87, (86,)),
        (89, (89,)),
        (90, (90,)),
        (100, (100,)),
        (110, ()),
        (121, (121,)),
        (75, ()),
    ],
)
def test_what_is_compiled_for_a_chip(sm, own):
    assert compiled_for(sm) == own


MADE = Manifest(SCHEMA, "", "", "", "", "float32", {}, ("MlaDecode", "MoeExperts"), (86,), (80,), {}, ())


@pytest.mark.parametrize(
    ("sms", "words"),
    [((86,), ""), ((89,), ""), ((86, 90), "SM 90: PTX made for SM 80 .*--sm 90 "), ((80, 90), "SM 80, 90: PTX")],
)
def test_ptx_that_stands_in_is_said(sms, words):
    import re

    note = stand_in_note(MADE, sms)
    assert re.search(words, note) if words else note == ""


@pytest.fixture
def copied(demo_checkpoint, bundle_of, tmp_path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path / "bundle")))


@pytest.fixture
def asked(monkeypatch):
    """The chips that kernels were asked for; no plan is built."""
    seen = []

    def build_plugins(wanted, report):
        seen.append(wanted.sms)
        return types.SimpleNamespace(path=wanted.bundle / "plugins" / LIBRARY)

    monkeypatch.setattr(request, "build_in_locked", build_plugins)
    monkeypatch.setattr(request, "check_build", lambda bundle, spec: RTX if spec.sms else FULL)
    monkeypatch.setattr(request, "build_with_library", lambda *_: ())
    return seen


def leave_library(bundle, **changes):
    """A library of the bundle's model for SM 86, as an earlier build would leave it, or another."""
    library = bundle.path / "plugins" / LIBRARY
    library.parent.mkdir(exist_ok=True)
    library.write_bytes(b"library")
    digest = hashlib.sha256(b"library").hexdigest()
    sizes = fixed_sizes(bundle.manifest.model)
    whole = dataclasses.replace(MADE, sha256=digest, dtype=bundle.manifest.dtype, sizes=sizes)
    dataclasses.replace(whole, **changes).write(library.with_name(MANIFEST))
    list_added(bundle.path, [f"plugins/{LIBRARY}", f"plugins/{MANIFEST}"])


LEFT = {  # what lies there, the GPU, the chips named (none: the full TensorRT), what must be compiled
    "nothing, for H100": (None, 90, (), [(90,)]),
    "another flavour's, for H100": ({}, 90, (), [(90,)]),
    "another flavour's, for its chip": ({}, 86, (), []),
    "a smaller chip's": ({}, 89, (), [(89,)]),
    "for a chip in between": ({}, 87, (), []),
    "PTX alone, for a chip in between": ({"sms": ()}, 87, (), [(86,)]),
    "a chip that is not known": ({"sms": ()}, 110, (), []),
    "without PTX, for a chip that is not known": ({"ptx_sms": ()}, 110, (), [()]),
    "for both named": ({"sms": (86, 120)}, 0, (86, 120), []),
    "for one of the named": ({}, 0, (86, 120), [(86, 120)]),
    "of another dtype": ({"dtype": "float64"}, 86, (), [(86,)]),
    "of another model": ({"sizes": {"H": 1}}, 86, (), [(86,)]),
    "of another version": ({"schema": SCHEMA - 1}, 86, (), [(86,)]),
    "damaged": ({"sha256": "0" * 64}, 86, (), [(86,)]),
}


@pytest.mark.parametrize(("left", "sm", "sms", "compiled"), LEFT.values(), ids=LEFT.keys())
def test_which_library_is_taken(copied, asked, gpu, left, sm, sms, compiled):
    gpu(sm)
    if left is not None:
        leave_library(copied, **left)
    build_plans(BuildRequest(copied.path, BuildSpec(flavour="rtx" if sms else "tensorrt", sms=sms)))
    assert asked == compiled
