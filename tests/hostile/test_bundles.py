"""Bundles that somebody touched: every file, every key of the manifest, and what was planted beside them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.engines.plans.plan import BuildSpec, PlanRecord
from deepseek_trt.engines.plans.profiles import profile_of
from deepseek_trt.export.bundle.folder import MANIFEST_FILE, WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.graph import TensorSpec
from deepseek_trt.export.bundle.manifest import list_added, sha256_of
from deepseek_trt.export.errors import BundleError, DeepseekTrtError

Tamper = Callable[[Path], object]
SPEC = BuildSpec(sms=(86,), max_batch_size=4, max_input_len=16, max_seq_len=64)


@pytest.fixture
def bundle(demo_checkpoint, bundle_of, tmp_path) -> Path:
    """A copy of the demo model's bundle."""
    return Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path / "bundle"))


def run(command: str, *arguments: object) -> tuple[int, str]:
    """Exit code and what was said; a traceback fails the test."""
    done = CliRunner().invoke(main, [command, *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stderr


def generate(bundle: Path, *more: object) -> tuple[int, str]:
    return run("generate", bundle, "--prompt", "def f", "--max-new-tokens", 3, "--threads", 1, *more)


def refused(told: tuple[int, str], *words: str) -> None:
    """Exit code 1, and one sentence that holds the words."""
    code, said = told
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (1, 1), said
    assert all(word in lines[0] for word in words), lines[0]


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def replace_by(make: Callable[[Path, Path], object]) -> Tamper:
    """The file goes aside, into the bundle or beside it, and something else takes its name."""

    def tamper(path: Path) -> None:
        moved = path.with_name(f"{path.name}.moved")
        path.rename(moved)
        make(path, moved)

    return tamper


def link_outside(path: Path, moved: Path) -> None:
    outside = path.parents[1] / f"outside-{path.name}"
    moved.rename(outside)
    path.symlink_to(outside)


TAMPERS: dict[str, Tamper] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a link inside": replace_by(lambda path, moved: path.symlink_to(moved.name)),
    "a link outside": replace_by(link_outside),
    "a link to a device": replace_by(lambda path, moved: path.symlink_to("/dev/zero")),
    "a dangling link": replace_by(lambda path, moved: path.symlink_to("nowhere")),
    "a pipe": replace_by(lambda path, moved: os.mkfifo(path)),
    "a folder": replace_by(lambda path, moved: path.mkdir()),
}


@pytest.mark.parametrize("tamper", TAMPERS)
def test_every_listed_file_is_compared(bundle, tamper):
    for name in Bundle.open(bundle).manifest.files:
        own = Path(shutil.copytree(bundle, bundle.with_name(f"of-{name}")))
        TAMPERS[tamper](own / name)
        refused(generate(own), str(own / name), "export the checkpoint again")


@pytest.mark.parametrize("tamper", [name for name in TAMPERS if name != "flipped"])
def test_the_weights_are_a_file_of_their_size(bundle, tamper):
    TAMPERS[tamper](bundle / WEIGHTS_FILE)
    refused(generate(bundle), str(bundle / WEIGHTS_FILE))


@pytest.mark.parametrize("tamper", TAMPERS)
def test_the_manifest_is_a_file(bundle, tamper):
    if tamper != "flipped":  # a sha256 of another letter, e.g.: see below
        TAMPERS[tamper](bundle / MANIFEST_FILE)
        if tamper != "grown":
            refused(generate(bundle), str(bundle))


COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("--prompt", "a"),
    "bench": ("--new-tokens", "3", "--context", "4"),
    "validate": (),
    "plugins": ("--sm", "86"),
    "build": ("--sm", "86"),
    "model-repository": ("REPOSITORY",),
    "classify": ("--text", "a"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["decode.onnx", "tokenizer.json", "config.json"])
def test_every_command_refuses(bundle, tmp_path, command, name):
    flip(bundle / name)
    options = [str(tmp_path / "r") if option == "REPOSITORY" else option for option in COMMANDS[command]]
    refused(run(command, bundle, *options), name, "sha256")
    assert not (tmp_path / "r").exists()


VERIFYING = [name for name in COMMANDS if name not in ("plugins", "classify")]


@pytest.mark.parametrize("command", VERIFYING)
def test_verify_finds_a_changed_weight(bundle, tmp_path, command):
    flip(bundle / WEIGHTS_FILE)
    options = [str(tmp_path / "r") if option == "REPOSITORY" else option for option in COMMANDS[command]]
    refused(run(command, bundle, *options, "--verify"), "the weight", "is not what export wrote")


@pytest.mark.parametrize("command", ["generate", "bench", "model-repository"])
@pytest.mark.parametrize("keep_time", [True, False])
def test_a_changed_weight_is_found_at_first_use(bundle, tmp_path, command, keep_time):
    before = (bundle / WEIGHTS_FILE).stat()
    with (bundle / WEIGHTS_FILE).open("r+b") as file:  # the same file, other bytes
        file.seek(before.st_size // 2)
        byte = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    if keep_time:
        os.utime(bundle / WEIGHTS_FILE, ns=(before.st_atime_ns, before.st_mtime_ns))
    options = [str(tmp_path / "r") if option == "REPOSITORY" else option for option in COMMANDS[command]]
    refused(run(command, bundle, *options), "the weight", "is not what export wrote")


def test_a_changed_header_of_the_weights_is_found(bundle):
    flip(bundle / WEIGHTS_FILE, 12)
    refused(generate(bundle), WEIGHTS_FILE, "header")


# What is planted, and whether it is of a kind that somebody may expect to be used.
PLANTED = {
    "cpu_ops.so": True,
    "decode.cpu.onnx": True,
    "prefill.plan": True,
    "decode.plan": True,
    "decode.plan.json": False,
    "prefill.plan.json": False,
    "plugins/libdeepseek_trt_plugins.so": True,
    "plugins/libdeepseek_trt_plugins.json": False,
    "chat_template.jinja": True,
    "added_tokens.json": True,
    "README.md": False,
    "numpy.py": False,
    "prefill.runtime-cache": False,
}


def test_what_nobody_lists_is_not_used(bundle, monkeypatch):
    monkeypatch.setattr("deepseek_trt.export.trust.cache._said", set())
    before = CliRunner().invoke(main, ["generate", str(bundle), "--prompt", "def f", "--max-new-tokens", "5"])
    assert before.exit_code == 0, before.output
    (bundle / "plugins").mkdir()
    for name in PLANTED:
        (bundle / name).write_bytes(b"\x7fELF no library, no plan and no JSON")
    (bundle / "a pipe.so").unlink(missing_ok=True)
    os.mkfifo(bundle / "a pipe.so")
    after = CliRunner().invoke(main, ["generate", str(bundle), "--prompt", "def f", "--max-new-tokens", "5"])
    assert (after.exit_code, after.stdout) == (0, before.stdout), after.output
    said = [line for line in after.stderr.splitlines() if "does not list: it is not used" in line]
    told = {name for name in PLANTED if any(repr(name) in line for line in said)}
    assert told == {name for name, named in PLANTED.items() if named}


def raw_manifest(bundle: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((bundle / MANIFEST_FILE).read_text())
    return raw


def scalars(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value stands: every key, and of lists and of mappings of many alike the first."""
    yield place
    if isinstance(value, dict):
        few = list(value) if len(value) < 60 else list(value)[:1]
        for key in few:
            yield from scalars(value[key], (*place, key))
    elif isinstance(value, list) and value:
        yield from scalars(value[0], (*place, 0))


def put(raw: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(raw)
    at: Any = changed
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return changed


def write(bundle: Path, raw: dict[str, Any], own: bool = True) -> None:
    """The manifest, with its own sha256 where `own` says so."""
    rest = {key: value for key, value in raw.items() if key != "sha256"}
    (bundle / MANIFEST_FILE).write_text(json.dumps({**rest, "sha256": sha256_of(rest)} if own else raw))


def opened(bundle: Path) -> Any:
    """The manifest, None where it is refused by an error that names its place."""
    try:
        return Bundle.open(bundle).manifest
    except BundleError as error:
        if str(bundle) not in str(error):
            raise
        return None


WRONG = (None, True, -7, 10**9, 10**40, 1.5, 1e300, "", "x/../y", "\0", [], [[]], {}, {"a": 1}, [None])


@pytest.mark.parametrize("own", [False, True])
def test_wrong_values_of_every_key(bundle, own):
    """A BundleError that names the file. With a sha256 that fits, some values make another manifest that can be."""
    raw, tried, accepted = raw_manifest(bundle), 0, []
    before = Bundle.open(bundle).manifest
    for place in scalars(raw):
        for value in WRONG if place else ():
            write(bundle, put(raw, place, value), own)
            tried += 1
            if opened(bundle) not in (None, before):
                accepted.append((place, value))
    assert tried > 1500
    assert len(accepted) < (100 if own else 1), accepted


def test_manifests_that_are_no_json(bundle):
    text = (bundle / MANIFEST_FILE).read_text()
    for wrong in (
        "",
        "[]",
        "{",
        "null",
        '{"a": 1, "a": 1}',
        text.replace('"dtype"', '"dtype": "float32", "dtype"', 1),
        "[" * 100_000,
        text.replace('"schema_version": 8', '"schema_version": NaN'),
        text.replace('"schema_version": 8', '"schema_version": 7'),
        text.replace('"schema_version": 8', '"schema_version": 8.0'),
        text.replace('"schema_version": 8', '"schema_version": true'),
        "\ufeff" + text,
    ):
        (bundle / MANIFEST_FILE).write_text(wrong)
        refused(generate(bundle), MANIFEST_FILE)
    (bundle / MANIFEST_FILE).write_bytes(text.encode().replace(b"notes", b"not\xff\xfe"))
    refused(generate(bundle), MANIFEST_FILE)


ABSURD = {
    "more experts than there are": (("model", "num_experts_per_tok"), 10**6),
    "no page": (("cache", "page_size"), 0),
    "another page": (("cache", "page_size"), 7),
    "another vocabulary": (("model", "vocab_size"), 17),
    "a name that leads out": (("files", "../outside"), "0" * 64),
    "an absolute name": (("files", "/etc/hostname"), "0" * 64),
    "a name that is the manifest": (("files", MANIFEST_FILE), "0" * 64),
    "no sha256": (("files", "decode.onnx"), "0"),
    "a file twice": (("added", "decode.onnx"), "0" * 64),
    "a file that is not there": (("files", "more.onnx"), "0" * 64),
    "a key that nobody knows": (("more",), 1),
    "a weight's shape": (("weights", 0, "recipe", "shape"), [10**12, 10**12]),
    "a weight of size 0": (("weights", 0, "recipe", "shape"), [0]),
    "a weight's dtype": (("weights", 0, "dtype"), "float64"),
    "a weight without a hash": (("weights", 0, "sha256"), None),
    "a size": (("weights_file", "size"), 1),
    "by reference all at once": (("by_reference",), True),
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_manifests(bundle, what):
    place, value = ABSURD[what]
    write(bundle, put(raw_manifest(bundle), place, value))
    refused(generate(bundle), str(bundle))


@pytest.fixture
def planned(bundle) -> Bundle:
    """The bundle with records of plans and a library that nobody built, all listed."""
    own = Bundle.open(bundle)
    (bundle / "plugins").mkdir()
    for name in ("libdeepseek_trt_plugins.so", "libdeepseek_trt_plugins.json"):
        (bundle / "plugins" / name).write_text("x")
    for graph in own.manifest.graphs:
        dims = tuple(
            TensorSpec(t.name, t.dtype, tuple(-1 if isinstance(d, str) else d for d in t.dims)) for t in graph.inputs
        )
        profile = profile_of(graph, own.manifest.cache, SPEC)
        library = ("plugins/libdeepseek_trt_plugins.so", "0" * 64)
        record = PlanRecord(
            graph.name, SPEC, "1", dims, (), graph.outputs, profile, {}, {}, *library, "0" * 64, "0" * 64, 4
        )
        record.write(bundle / f"{graph.name}.plan.json")
        (bundle / f"{graph.name}.plan").write_text("plan")
        list_added(bundle, (f"{graph.name}.plan", f"{graph.name}.plan.json"))
    list_added(bundle, [f"plugins/libdeepseek_trt_plugins.{end}" for end in ("so", "json")])
    return own.listed_anew()


RECORDS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "a library elsewhere": (("plugin_library",), "../elsewhere/lib.so"),
    "an absolute library": (("plugin_library",), "/elsewhere/lib.so"),
    "a library of another type": (("plugin_library",), 7),
    "an unknown key": (("more",), 1),
    "another graph": (("graph",), "prefill"),
    "sizes in quotes": (("spec", "max_batch_size"), "4"),
    "a batch of nothing": (("spec", "max_batch_size"), 0),
    "a weight's kind": (("spec", "weights"), "borrowed"),
    "chips that are none": (("spec", "sms"), [86, "90"]),
    "shapes of another rank": (("profile", "shapes", "input_ids"), [[1], [1], [1]]),
    "shapes that shrink": (("profile", "shapes", "input_ids"), [[4, 1], [1, 1], [1, 1]]),
    "two shapes": (("profile", "shapes", "input_ids"), [[1, 1], [1, 1]]),
    "a shape of true": (("profile", "shapes", "input_ids"), [[True, 1], [1, 1], [1, 1]]),
    "no profile": (("profile", "shapes"), {}),
    "bytes": (("plan_bytes",), 1.5),
    "another schema": (("schema_version",), 1),
    "a schema of true": (("schema_version",), True),
}


@pytest.mark.parametrize("what", RECORDS)
def test_records_of_plans(planned, what):
    path = planned.path / "decode.plan.json"
    place, value = RECORDS[what]
    changed = put(json.loads(path.read_text()), place, value)
    PlanRecord.of(planned, "decode")
    path.write_text(json.dumps(changed))
    with pytest.raises(BundleError, match="is not the file that"):
        PlanRecord.of(planned, "decode")
    list_added(planned.path, ["decode.plan.json"])
    with pytest.raises(DeepseekTrtError, match=r"decode\.plan") as told:
        PlanRecord.of(planned.listed_anew(), "decode")
    assert "\n" not in str(told.value)


def test_files_that_are_listed_at_once_are_all_listed(bundle):
    names = [f"{number}.plan" for number in range(12)]
    start = threading.Barrier(len(names))

    def add(name: str) -> None:
        (bundle / name).write_text(name)
        start.wait()
        list_added(bundle, [name])

    threads = [threading.Thread(target=add, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Bundle.open(bundle, verify=True).manifest.added.keys() == set(names)
    (bundle / names[0]).unlink()
    assert names[0] not in list_added(bundle, []).added


def test_an_added_file_that_changed_is_named_by_verify(bundle):
    (bundle / "decode.plan").write_text("plan")
    list_added(bundle, ["decode.plan"])
    (bundle / "decode.plan").write_text("none")
    Bundle.open(bundle)
    refused(generate(bundle, "--verify"), "decode.plan", "make it again")


def test_a_bundle_of_before_is_told_to_be_exported_again(bundle):
    raw = raw_manifest(bundle)
    raw["schema_version"] = 7  # whose caches were all whole
    (bundle / MANIFEST_FILE).write_text(json.dumps(raw))
    refused(generate(bundle), "schema_version 7 is not 8", "export the checkpoint again")
