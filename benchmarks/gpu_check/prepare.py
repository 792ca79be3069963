"""What a check needs and no bare machine can make: compiled plugin libraries, the demo's bundles, tokens of a CPU.

Needs the project's own environment, and no GPU. What is there already, made of the same sources, stays.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_check.engines import DEMOS, Demo
from gpu_check.models import DEMO_DTYPES, LIBRARIES, NARROW_DEMOS, NARROW_LIBRARIES, raw_config
from gpu_check.narrow_checkpoint import write_checkpoint
from gpu_check.places import ROOT, Prepared, add_package

if TYPE_CHECKING:
    from deepseek_trt.plugins.aot.records import Binary

_SOURCES = ("export", "plugins", "cli/demo_model")
DEMO = ROOT / "cli" / "demo_model"
PROMPTS = ("Return the number of", "If the", "The number of days in", "def add(a, b):")
NEW_TOKENS = 32


def prepare(prepared: Prepared, sms: tuple[int, ...]) -> None:
    """Fill the folder for these chips, and PTX for the others."""
    digest = _digest(sms)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as tree:
        add_package(Path(tree))
        for model, dtype in LIBRARIES:
            keep(prepared.libraries / f"{model}-{dtype}", digest, functools.partial(_library, model, dtype, sms))
        for model, dtype, unit in NARROW_LIBRARIES:
            folder = prepared.libraries / f"{model}-{dtype}-narrow"
            keep(folder, digest, functools.partial(_narrow_library, model, dtype, unit, sms))
        for dtype in DEMO_DTYPES:
            keep(prepared.demo / dtype, digest, functools.partial(_bundle, dtype, None, sms))
        for dtype, quantize in NARROW_DEMOS:
            folder = prepared.demo / f"{dtype}-{quantize}"
            keep(folder, digest, functools.partial(_bundle, dtype, quantize, sms))
        for demo in DEMOS:
            is_whole = demo.name in DEMO_DTYPES
            make = functools.partial(_tokens, DEMO) if is_whole else functools.partial(_narrow_tokens, prepared, demo)
            keep(prepared.demo / demo.tokens, digest, make)


def keep(folder: Path, digest: str, make: Callable[[Path], None]) -> None:
    """Make `folder`, unless the file beside it says that it was made of what has this digest."""
    mark = folder.with_name(f"{folder.name}.made")
    if folder.is_dir() and mark.is_file() and mark.read_text() == digest:
        return
    print(f"gpu-check: making {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    mark.unlink(missing_ok=True)
    folder.mkdir(parents=True)
    make(folder)
    mark.write_text(digest)


def _digest(sms: tuple[int, ...]) -> str:
    """Of the sources that what is prepared follows from."""
    digest = hashlib.sha256(repr(sms).encode())
    files = [p for name in _SOURCES for p in (ROOT / name).rglob("*") if p.is_file() and p.suffix != ".pyc"]
    for source in sorted((*files, Path(__file__).with_name("models.py"))):
        digest.update(str(source.relative_to(ROOT)).encode() + hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def _library(model: str, dtype: str, sms: tuple[int, ...], folder: Path) -> None:
    from deepseek_trt.export.config.model_config import ModelConfig
    from deepseek_trt.plugins.aot.compile import compile_all

    config = ModelConfig.from_hf(raw_config(model))
    _write_library(model, dtype, compile_all(config, dtype, sms, jobs=2), folder)


def _narrow_library(model: str, dtype: str, unit: int, sms: tuple[int, ...], folder: Path) -> None:
    """The kernels over narrow weights and caches of all formats alone, as the model's own library has the others.

    Without PTX, which the driver takes its time to compile: that of the demo's libraries has the same tiles.
    """
    from deepseek_trt.export.bundle.narrow import FORMATS
    from deepseek_trt.export.bundle.narrow_cache import NarrowCache
    from deepseek_trt.export.config.model_config import ModelConfig
    from deepseek_trt.plugins.aot.compile import compile_all
    from deepseek_trt.plugins.aot.narrow_use import NarrowUse
    from deepseek_trt.plugins.narrow_ops import NARROW_PLUGINS

    linear = tuple((name, unit if kind.is_blocks else kind.group) for name, kind in FORMATS.items())
    config = ModelConfig.from_hf(raw_config(model))
    int8, fp8 = (NarrowCache.of(config, name) for name in ("int8", "fp8"))
    use = NarrowUse(linear, tuple(FORMATS), whole_experts=False, cache=int8)
    binaries = compile_all(config, dtype, sms, jobs=2, fallback=False, narrow=use)
    dense = dataclasses.replace(config, n_routed_experts=0)  # attention is that of the model
    binaries += compile_all(dense, dtype, sms, jobs=2, fallback=False, narrow=NarrowUse(cache=fp8))
    ops = {op.name for op in NARROW_PLUGINS}
    _write_library(model, dtype, [b for b in binaries if b.variant.op in ops], folder)


def _write_library(model: str, dtype: str, binaries: Sequence[Binary], folder: Path) -> None:
    from deepseek_trt.export.config.model_config import ModelConfig
    from deepseek_trt.plugins.tensorrt.library import build_library

    build_library(binaries, ModelConfig.from_hf(raw_config(model)), dtype, folder)
    (folder / "config.json").write_text(json.dumps(raw_config(model), indent=1) + "\n", encoding="utf-8")


def _bundle(dtype: str, quantize: str | None, sms: tuple[int, ...], folder: Path) -> None:
    from deepseek_trt.export.exporter import ExportRequest, export_bundle
    from deepseek_trt.plugins.tensorrt.for_bundle import PluginRequest, build_plugins

    folder.rmdir()
    export_bundle(ExportRequest(DEMO, folder, dtype=dtype, quantize=quantize))
    build_plugins(PluginRequest(folder, sms))


def _tokens(checkpoint: Path, folder: Path) -> None:
    """Greedy tokens of the demo model by transformers on the CPU, which reads the checkpoint with code of its own.

    With each token what parts it from the next best, and the root mean square of the logits: near ties may fall the
    other way elsewhere.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    found: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        tokens, gaps, sizes = list(ids), [], []
        for _ in range(NEW_TOKENS):
            with torch.inference_mode():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
            best = logits.topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            sizes.append(float(logits.square().mean().sqrt()))
        found.append({"prompt": ids, "tokens": tokens[len(ids) :], "gaps": gaps, "rms": sizes})
    whole = {"by": f"transformers {transformers.__version__}", "dtype": "float32", "answers": found}
    (folder / "tokens.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _narrow_tokens(prepared: Prepared, demo: Demo, folder: Path) -> None:
    """Likewise, of the numbers that the bundle's narrow weights are."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as checkpoint:
        write_checkpoint(DEMO, prepared.demo / demo.name, Path(checkpoint))
        _tokens(Path(checkpoint), folder)
