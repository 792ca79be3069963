"""A bundle's manifest.json, a plan's record and a plugin library's manifest, judged by the json module.

What lists a file's hash is made right after the change: the readers behind the hashes are what is tried.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import good
from fuzzing.exports import trace_once
from fuzzing.mutate import mutated_bytes, mutated_json
from fuzzing.runner import DisagreementError
from fuzzing.weights import strict

MANIFEST, PLAN, RECORD = "manifest.json", "decode.plan", "decode.plan.json"


def exported(folder: Path) -> dict[str, bytes]:
    """The files of a small bundle."""
    from deepseek_trt.export.exporter import ExportRequest, export_bundle

    trace_once()
    (folder / "in").mkdir()
    files = {"config.json": good.dumped(good.CONFIG), **good.one_file(good.tensors_of(good.CONFIG))}
    good.write(folder / "in", {**files, **good.text_files()})
    export_bundle(ExportRequest(folder / "in", folder / "out"))
    out = folder / "out"
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def damaged(rng: Random, data: bytes) -> bytes:
    return mutated_json(rng, data) if rng.random() < 0.85 else mutated_bytes(rng, data)


def sealed(data: bytes) -> bytes:
    """A manifest with the sha256 of what it says now; as it is where it says nothing."""
    from deepseek_trt.export.bundle.manifest import sha256_of

    try:
        raw = json.loads(data)
        raw.pop("sha256", None)
        return good.dumped({**raw, "sha256": sha256_of(raw)})
    except (ValueError, AttributeError, TypeError, RecursionError):  # no JSON, no object, half a character
        return data


def judge_json(data: bytes, found: Any) -> None:
    """What was read is what the file says; a manifest's own sha256 is of the rest, and no part of what is read."""
    said, read = strict(data), json.loads(json.dumps(dataclasses.asdict(found)))
    if "sha256" not in read:
        said.pop("sha256", None)
    if said.keys() != read.keys():
        raise DisagreementError(f"the keys are {sorted(said)}, and {sorted(read)} were read")
    for key, value in said.items():
        if read[key] != value:
            raise DisagreementError(f"{key} {str(value)[:200]} was read as {str(read.get(key))[:200]}")


class Manifests:
    """Bundle.open of a bundle with a changed manifest.json."""

    name, patience = "manifest", 20.0

    def prepare(self, folder: Path) -> None:
        self.good = exported(folder)

    def change(self, rng: Random, folder: Path) -> None:
        data = damaged(rng, self.good[MANIFEST])
        good.write(folder / "out", {**self.good, MANIFEST: sealed(data) if rng.random() < 0.9 else data})

    def read(self, folder: Path) -> Any:
        from deepseek_trt.export.bundle.folder import Bundle

        return Bundle.open(folder / "out")

    def judge(self, folder: Path, found: Any) -> None:
        judge_json((folder / "out" / MANIFEST).read_bytes(), found.manifest)


def _shapes(dims: tuple[Any, ...]) -> Any:
    return tuple(tuple(dim if isinstance(dim, int) else size for dim in dims) for size in (1, 2, 8))


class Plans:
    """PlanRecord.of a plan whose record is changed, in a bundle that lists both files as they are."""

    name, patience = "plan", 20.0

    def prepare(self, folder: Path) -> None:
        from deepseek_trt.engines.plans.plan import BuildSpec, PlanRecord, Profile
        from deepseek_trt.export.bundle.folder import Bundle

        files = exported(folder)
        graph, spec = Bundle.open(folder / "out").graph("decode"), BuildSpec(sms=(90,), max_input_len=1024)
        plan = b"a plan"
        record = PlanRecord(
            graph="decode",
            spec=spec,
            flavour_version="1.0",
            inputs=tuple(graph.inputs),
            weights=(),
            outputs=tuple(graph.outputs),
            profile=Profile({tensor.name: _shapes(tensor.dims) for tensor in graph.inputs}),
            layers={"attention": 2},
            plugins={"MlaDecode": 2},
            plugin_library="plugins/libdeepseek_trt_plugins.so",
            plugin_library_sha256="0" * 64,
            source_sha256=hashlib.sha256(files["decode.onnx"]).hexdigest(),
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            plan_bytes=len(plan),
        )
        record.write(folder / RECORD)
        self.good = {**files, PLAN: plan, RECORD: (folder / RECORD).read_bytes()}

    def change(self, rng: Random, folder: Path) -> None:
        files = {**self.good, RECORD: damaged(rng, self.good[RECORD])}
        manifest = json.loads(files[MANIFEST])
        manifest["added"] = {name: hashlib.sha256(files[name]).hexdigest() for name in (PLAN, RECORD)}
        good.write(folder / "out", {**files, MANIFEST: sealed(good.dumped(manifest))})

    def read(self, folder: Path) -> Any:
        from deepseek_trt.engines.plans.plan import PlanRecord
        from deepseek_trt.export.bundle.folder import Bundle

        return PlanRecord.of(Bundle.open(folder / "out"), "decode")

    def judge(self, folder: Path, found: Any) -> None:
        judge_json((folder / "out" / RECORD).read_bytes(), found)


class PluginManifests:
    """read_manifest of the JSON beside a plugin library."""

    name, patience = "plugins", 20.0

    def prepare(self, folder: Path) -> None:
        from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, MANIFEST, SCHEMA, Manifest

        self.library, self.manifest = folder / LIBRARY, folder / MANIFEST
        self.library.write_bytes(b"a library")
        Manifest(
            schema=SCHEMA,
            made_by="tests",
            sha256=hashlib.sha256(b"a library").hexdigest(),
            library_id="0" * 16,
            inputs_sha256="0" * 64,
            dtype="float32",
            sizes={"H": 2},
            ops=["MlaDecode"],
            sms=[90],
            ptx_sms=[],
            versions={"triton": "3.7.1"},
            binaries=[{"op": "MlaDecode", "kernel": "k", "sm": 90, "is_ptx": False, "bytes": 3, "sha256": "0" * 64}],
        ).write(self.manifest)
        self.good = self.manifest.read_bytes()

    def change(self, rng: Random, folder: Path) -> None:
        self.manifest.write_bytes(damaged(rng, self.good))

    def read(self, folder: Path) -> Any:
        from deepseek_trt.plugins.tensorrt.manifest import read_manifest

        return read_manifest(self.library)

    def judge(self, folder: Path, found: Any) -> None:
        judge_json(self.manifest.read_bytes(), found)
