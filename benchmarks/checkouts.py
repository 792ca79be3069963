"""Do two checkouts compute and write the same? Run the command line of each on the demo model and compare all results.

    python benchmarks/checkouts.py OLD NEW WORKDIR

OLD and NEW are checkouts, each with its own .venv (scripts/setup). Files are compared by their bytes, JSON by its
values; what names a version, a time or a module's path is left out, and said. Plans are compared by their records: two
builds of one checkout differ in their bytes. Exit code 1 where anything else differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT = "Return the number of"
# Of a JSON: names of values that say who made a file and when, not what it holds.
UNLIKE = {
    "versions",
    "made_by",
    "provenance",
    "schema",
    "schema_version",
    "command",
    "created",
    "machine",
    "files",
    "milliseconds",
}
# Of a plugin library: follows from its sources' bytes, comments included, and lies in the binary as 16 digits.
LIBRARY_ID = ("library_id", "inputs_sha256")
# Builds a bundle's library in the new checkout with the id of another; prints the library's path.
WITH_ID = """
import sys
from pathlib import Path
from deepseek_trt.plugins.tensorrt import codegen
from deepseek_trt.plugins.tensorrt.for_bundle import PluginRequest, build_plugins
source = codegen.library_id_source
codegen.library_id_source = lambda _: source(sys.argv[2])
print(build_plugins(PluginRequest(Path(sys.argv[1]), (86,))).path)
"""
EXPORTS: dict[str, tuple[str, ...]] = {
    "float32": ("--dtype", "float32"),
    "float16": ("--dtype", "float16"),
    "bfloat16": (),
    "reference": ("--by-reference",),
    "all-logits": ("--all-logits", "--num-layers", "2"),
    "features": ("--task", "feature-extraction", "--hidden-states"),
    "embeddings": ("--task", "feature-extraction", "--no-cache"),
    "transformers": ("--io", "transformers", "--dtype", "float32"),
}
SAMPLED = ("--temperature", "0.8", "--top-k", "40", "--top-p", "0.95", "--seed", "7", "--repetition-penalty", "1.1")


def main(old: Path, new: Path, workdir: Path) -> int:
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint = workdir / "checkpoint"  # one for both: bundles name it
    if not checkpoint.is_dir():
        shutil.copytree(old / "cli" / "demo_model", checkpoint)
    folders = []
    for name, checkout in (("old", old), ("new", new)):
        folders.append(workdir / name)
        if not (workdir / name / "done").is_file():
            shutil.rmtree(workdir / name, ignore_errors=True)
            run_all(checkout.resolve(), checkpoint, workdir / name)
    rebuild_library(new.resolve(), *folders)
    return print_differences(*folders)


def run_all(checkout: Path, checkpoint: Path, out: Path) -> None:
    """Every command of the checkout into `out`; the cache of compiled libraries lies in it, too."""
    out.mkdir()
    environment = {**os.environ, "XDG_CACHE_HOME": str(out / "cache"), "COLUMNS": "200"}

    def deepseek_trt(*arguments: str | Path) -> str:
        command = [checkout / ".venv" / "bin" / "deepseek-trt", *arguments]
        print(" ", *map(str, arguments), file=sys.stderr)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    for name, options in EXPORTS.items():
        deepseek_trt("export", checkpoint, out / name, *options)
    for name in ("float32", "bfloat16"):
        bundle = out / name
        text = deepseek_trt("generate", bundle, "--prompt", PROMPT, "--threads", "1")
        more = ("--prompt", PROMPT, "--prompt", "If", *SAMPLED, "--logprobs", "3", "--json", "--threads", "1")
        (out / f"{name}.txt").write_text(text + deepseek_trt("generate", bundle, *more))
    for name in ("float32", "float16", "bfloat16", "features", "embeddings"):
        deepseek_trt("validate", out / name, "--report", out / f"report-{name}", "--threads", "1")
    deepseek_trt("validate", out / "bfloat16", "--layers", "0-1,4", "--report", out / "report-layers", "--threads", "1")
    (out / "check.json").write_text(deepseek_trt("check", checkpoint, "--json"))
    deepseek_trt("build", out / "float16", "--sm", "86", "--max-batch-size", "4", "--max-seq-len", "1024")
    (out / "done").touch()


def rebuild_library(checkout: Path, old: Path, new: Path) -> None:
    """Replace the new plugin library by one with the id of the old."""
    manifest = json.loads((old / "float16/plugins/libdeepseek_trt_plugins.json").read_text())
    bundle = new / "float16"
    shutil.rmtree(bundle / "plugins")
    command = [checkout / ".venv/bin/python", "-c", WITH_ID, bundle, manifest["library_id"]]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=checkout.anchor)


def print_differences(old: Path, new: Path) -> int:
    """A line a file that differs or stands on one side only, then the counts."""
    files = [
        {str(p.relative_to(f)): p for p in f.rglob("*") if p.is_file() and kept(p.relative_to(f))} for f in (old, new)
    ]
    found: list[str] = [f"{name}: in one checkout only" for name in sorted(files[0].keys() ^ files[1].keys())]
    both = sorted(files[0].keys() & files[1].keys())
    for name in both:
        found += [f"{name}: {what}" for what in differences(files[0][name], files[1][name])]
    libraries = [cpu_library(folder) for folder in (old, new)]
    print(f"CPU library sha256: {libraries[0]}\n               then {libraries[1]}")
    print("\n".join(found))
    print(f"{len(both)} files compared, {len(found)} differences")
    print(f"left out of JSON: {', '.join(sorted(UNLIKE))}; of plans: their bytes")
    print("the plugin library of the new checkout was built with the id of the old, which covers comments, too")
    return int(bool(found))


def kept(name: Path) -> bool:
    unlike = name.suffix in (".html", ".lock", ".plan") or name.name.endswith("polygraphy.json")
    return "cache" not in name.parts and not unlike


def cpu_library(folder: Path) -> str:
    (path,) = (folder / "cache").glob("deepseek-trt/cpu/*.so")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(old: Path, new: Path) -> Iterator[str]:
    if old.name == "report.json":
        yield from different_numbers(json.loads(old.read_text()), json.loads(new.read_text()))
    elif old.suffix == ".json":
        a, b = (dict(leaves(json.loads(path.read_text()))) for path in (old, new))
        yield from (
            f"{key} {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
        )
    elif old.read_bytes() != new.read_bytes():
        yield f"{old.stat().st_size} bytes -> {new.stat().st_size}"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a JSON by its path, without what is unlike by nature."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.removeprefix("reference_") not in UNLIKE and key not in LIBRARY_ID and not key.endswith("sha256"):
                yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def different_numbers(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Numbers by their own name, however deep they stand: the two reports may be laid out differently."""
    a, b = (
        Counter((path.rpartition(".")[2].partition("[")[0], v) for path, v in leaves(raw) if isinstance(v, float))
        for raw in (old, new)
    )
    yield from (f"{key} {value!r}, {count} times, is gone" for (key, value), count in (a - b).items())
    yield from (f"{key} {value!r}, {count} times, is new" for (key, value), count in (b - a).items())


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:4])))
