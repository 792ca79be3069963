"""Consistency: whether a manifest's parts, each of its right type, can be of one bundle that export wrote."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deepseek_trt.export.bundle.graph import CacheSpec, GraphSpec, graphs_of
from deepseek_trt.export.bundle.interface import CLASSIFICATION
from deepseek_trt.export.bundle.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest, Speculation, WeightRecord
from deepseek_trt.export.bundle.narrow import CODES, FORMATS, PUBLISHED, Narrow, Quantization
from deepseek_trt.export.bundle.recipes import Piece, Recipe, narrow_pair
from deepseek_trt.export.config.family import ACTIVATIONS, DTYPES, TOPK_METHODS
from deepseek_trt.export.config.keys import KEYS
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.config.rope import RopeConfig
from deepseek_trt.export.config.rope_keys import ROPE_KEYS
from deepseek_trt.export.config.values import MAX_SIZE, Kind
from deepseek_trt.export.dtypes import computed_in
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.reading.classifier import PROBLEM_TYPES
from deepseek_trt.export.trust.real_files import flaw_of_name

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_NUMBERS = 2**48  # of one tensor
_CHOICES = {"hidden_act": ACTIVATIONS, "topk_method": tuple(TOPK_METHODS), "dtype": DTYPES}
_NONE = Quantization("", ())
_LISTED_APART = (MANIFEST_FILE, WEIGHTS_FILE)


def flaw_of(manifest: Manifest) -> str:
    """The first thing that is wrong, with its key; nothing where all fits together."""
    return next(_flaws(manifest), "")


def graph_files(graph: GraphSpec, dtype: str) -> tuple[str, ...]:
    """The files of a graph in a bundle of that dtype: the one for ONNX Runtime, then the traced one if that differs."""
    return (graph.file,) if computed_in(dtype) == dtype else (graph.file, f"{graph.name}.{dtype}.onnx")


def _flaws(manifest: Manifest) -> Iterator[str]:
    if manifest.dtype not in DTYPES:
        yield f"dtype {manifest.dtype!r} is none of {', '.join(DTYPES)}"
        return
    yield from _flaws_of_model(manifest.model)
    yield from _flaws_of_interface(manifest)
    yield from _flaws_of_names(manifest)
    yield from _flaws_of_weights(manifest)


def _flaws_of_model(model: ModelConfig) -> Iterator[str]:
    """What reading config.json would refuse."""
    for name, value in _fields(model):
        if name in _CHOICES and value not in _CHOICES[name]:
            yield f"model.{name} {value!r} is none of {', '.join(_CHOICES[name])}"
        elif name in KEYS and name not in _CHOICES:
            yield from _out_of_range(f"model.{name}", value, KEYS[name].kind)
    for token in model.eos_token_ids:
        yield from _out_of_range("model.eos_token_ids", token, KEYS["bos_token_id"].kind)
    for name, value in _fields(model.rope):
        key = ROPE_KEYS.get("rope_theta" if name == "theta" else name)
        if key is not None:
            yield from _out_of_range(f"model.rope.{name}", value, key.kind)
    if not (model.kv_lora_rank and model.qk_nope_head_dim and model.qk_rope_head_dim and model.v_head_dim):
        yield "model: a width of its attention is 0"
    try:
        model.check()
    except ConfigError as wrong:
        yield f"model: {wrong}"


def _fields(of: ModelConfig | RopeConfig) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(of, field.name)) for field in dataclasses.fields(of))


def _out_of_range(name: str, value: Any, kind: Kind) -> Iterator[str]:
    if value is not None and not kind.admits(value):
        yield f"{name} is {value!r}, where {kind.expected} is needed"


def _flaws_of_interface(manifest: Manifest) -> Iterator[str]:
    """The graphs are those that the model, the cache and the interface make."""
    cache, interface, classifier = manifest.cache, manifest.interface, manifest.classifier
    try:
        interface.check()
    except ConfigError as wrong:
        yield f"interface: {wrong}"
        return
    if (classifier is None) == (interface.task == CLASSIFICATION) or (classifier and not classifier.labels):
        yield f"classifier does not belong to the task {interface.task}"
    if classifier and classifier.problem_type not in (None, *PROBLEM_TYPES):
        yield f"classifier.problem_type {classifier.problem_type!r} is none of {', '.join(PROBLEM_TYPES)}"
    wanted = CacheSpec.of(manifest.model, manifest.dtype, cache.page_size, interface.mtp, interface.cache_dtype)
    if not 1 <= cache.page_size <= MAX_SIZE or cache != wanted:
        yield f"cache is not that of the model: {cache}"
        return
    labels = len(classifier.labels) if classifier else 0
    if manifest.graphs != graphs_of(manifest.model, cache, interface, labels):
        yield "graphs are not those of the model and its interface"
    if manifest.speculation != (Speculation("mtp", manifest.model.num_hidden_layers) if interface.mtp else None):
        yield f"speculation is not that of the interface: {manifest.speculation}"


def _flaws_of_names(manifest: Manifest) -> Iterator[str]:
    """Names lead nowhere else, hashes are hashes, and every file that a bundle has is listed once."""
    for key in ("files", "added"):
        for name, digest in getattr(manifest, key).items():
            flaw = flaw_of_name(name) or ("is listed apart" if name in _LISTED_APART else "")
            if flaw:
                yield f"{key}: the name {name!r} {flaw}"
            if not _SHA256.fullmatch(digest):
                yield f"{key}: {name!r} has the sha256 {digest[:80]!r}"
    for source in manifest.sources:
        if flaw_of_name(source.name):
            yield f"sources: the name {source.name!r} {flaw_of_name(source.name)}"
    twice = sorted(manifest.files.keys() & manifest.added.keys())
    if twice:
        yield f"added: {twice[0]!r} is one of export's own files"
    wanted = ["config.json", *(name for graph in manifest.graphs for name in graph_files(graph, manifest.dtype))]
    for name in wanted:
        if name not in manifest.files:
            yield f"files lacks {name}"
    if not manifest.checkpoint.startswith("/"):
        yield f"checkpoint {manifest.checkpoint!r} is no absolute path"


def _flaws_of_weights(manifest: Manifest) -> Iterator[str]:
    if (manifest.weights_file is None) != manifest.by_reference:
        yield "weights_file and by_reference contradict each other"
    if manifest.weights_file and not _SHA256.fullmatch(manifest.weights_file.header_sha256):
        yield f"weights_file.header_sha256 is {manifest.weights_file.header_sha256[:80]!r}"
    seen: set[str] = set()
    for record in manifest.weights:
        flaw = "is there twice" if record.recipe.name in seen else _flaw_of_weight(record, manifest)
        if flaw:
            yield f"weights: {record.recipe.name!r} {flaw}"
        seen.add(record.recipe.name)
    yield from _flaws_of_narrow(manifest)


def _flaws_of_narrow(manifest: Manifest) -> Iterator[str]:
    """Codes and scales come in pairs that fit, of a kind that the quantization names."""
    recipes = [weight.recipe for weight in manifest.weights if weight.recipe.narrow is not None]
    kinds = {(rule.format, rule.group, rule.method) for rule in (manifest.quantization or _NONE).rules}
    if (manifest.quantization is None) == bool(recipes) or (recipes and manifest.by_reference):
        yield "quantization does not belong to the weights"
        return
    for scales, codes in zip(recipes[::2], recipes[1::2], strict=False):
        a, b = scales.narrow, codes.narrow
        if a is None or b is None or (a.format, a.group, a.method) not in kinds or b != replace(a, part=CODES):
            yield f"weights: {codes.name!r} is narrow in a way that quantization does not name"
        elif not _is_known(a) or not _are_pair(scales, codes):
            yield f"weights: {codes.name!r} and {scales.name!r} do not fit together"
    if len(recipes) % 2:
        yield f"weights: {recipes[-1].name!r} lacks its other part"


def _is_known(narrow: Narrow) -> bool:
    """Whether there is such a format, of such groups, whose scales that method finds."""
    kind = FORMATS.get(narrow.format)
    return kind is not None and narrow.group == kind.group and narrow.method in (*kind.methods, PUBLISHED)


def _are_pair(scales: Recipe, codes: Recipe) -> bool:
    whole = replace(codes, shape=codes.whole_shape)
    if len(whole.shape) < 2 or codes.is_scales or not FORMATS[_kind(codes)[0]].fits(whole.shape):
        return False
    return scales.is_scales and narrow_pair(whole, *_kind(codes)) == (scales, codes)


def _kind(recipe: Recipe) -> tuple[str, int, str]:
    assert recipe.narrow is not None
    return recipe.narrow.format, recipe.narrow.group, recipe.narrow.method


def _flaw_of_weight(record: WeightRecord, manifest: Manifest) -> str:
    recipe = record.recipe
    if recipe.narrow is not None and recipe.narrow.format not in FORMATS:
        return f"has the format {recipe.narrow.format!r}"
    if min(recipe.shape, default=1) < 1 or recipe.size > _MOST_NUMBERS:
        return f"has the shape {list(recipe.shape)}"
    if record.dtype != recipe.dtype(manifest.dtype):
        return f"has the dtype {record.dtype!r} in a bundle of {manifest.dtype}"
    if bool(recipe.pieces) == recipe.is_scales or not all(map(_is_sane, recipe.pieces)):
        return "has a piece that is none"
    if manifest.by_reference != (record.sha256 is None):
        return "has a sha256 in a bundle that refers to its checkpoint, or none in one that does not"
    return "" if record.sha256 is None or _SHA256.fullmatch(record.sha256) else f"has the sha256 {record.sha256[:80]!r}"


def _is_sane(piece: Piece) -> bool:
    """Strips of rows, one after the other, an even number of them halves."""
    counts = piece.rows > 0 and piece.times > 0 and piece.start >= 0 and piece.step >= (piece.times > 1)
    return counts and 0 <= piece.halves <= piece.rows and piece.halves % 2 == 0
