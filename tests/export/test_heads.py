"""The model's other classes and interfaces equal transformers and the numpy model, in ONNX Runtime and in torch."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification, DeepseekV2Model

from deepseek_trt.engines.sessions.graphs import GRAPH_BACKENDS
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.exporter import ExportRequest, export_bundle

# float32 keeps 2**-24 a rounding; some hundred roundings in a row over three layers stay below 1e-5 of the largest
# number, which is what two right implementations may differ by.
RELATIVE = 1e-5
PAD = 3
PAGE, PAGES = 8, 12
TABLE = np.array([[1, 3, 5, 7, 9], [2, 4, 6, 8, 10]], dtype=np.int32)
LENGTHS = np.array([21, 13], dtype=np.int32)
STEPS = 3
RAW: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 4.0,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "max_position_embeddings": 2560,
    "torch_dtype": "float32",
    "pad_token_id": PAD,
    "id2label": {"0": "dull", "1": "fair", "2": "fine"},
    "label2id": {"dull": 0, "fair": 1, "fine": 2},
}
V3 = {**RAW, "model_type": "deepseek_v3", "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
DYNAMIC = {
    **RAW,
    "topk_method": "greedy",
    "rope_scaling": {"type": "dynamic", "factor": 4.0},
    "max_position_embeddings": 16,
}
CLASSES = {
    "base": DeepseekV2Model,
    "classifier": DeepseekV2ForSequenceClassification,
    "causal": DeepseekV2ForCausalLM,
}


@dataclass(frozen=True)
class Checkpoint:
    """One of the three classes: its folder, its tensors in float64, and transformers' model of it."""

    folder: Path
    weights: dict[str, np.ndarray]
    hf: Any


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory, weights_of, save, float64_of) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def make(kind: str, raw: dict[str, Any] = RAW, oracle: bool = True) -> Checkpoint:
        key = f"{kind} {raw}"
        if key not in made:
            tensors = class_tensors(kind, weights_of(raw))
            written = {**raw, "architectures": [CLASSES[kind].__name__]}
            folder = save(tmp_path_factory.mktemp(kind) / "x", written, {"model.safetensors": tensors}, index=False)
            hf = CLASSES[kind].from_pretrained(folder, attn_implementation="eager").eval() if oracle else None
            named = ("model.", "lm_head.", "score.")
            full = {n if n.startswith(named) else f"model.{n}": tensor for n, tensor in tensors.items()}
            made[key] = Checkpoint(folder, float64_of(full), hf)
        return made[key]

    return make


def class_tensors(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers saves the class: the base model alone without "model.", a classifier with score.weight."""
    if kind == "causal":
        return tensors
    layers = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    if kind == "base":
        return {name.removeprefix("model."): tensor for name, tensor in layers.items()}
    hidden = layers["model.norm.weight"].shape[0]
    return {**layers, "score.weight": torch.randn(3, hidden, generator=torch.Generator().manual_seed(5))}


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(7).integers(4, 96, (rows, length))


def close(ours: np.ndarray, theirs: Any) -> bool:
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    return bool(np.abs(ours - theirs).max() <= RELATIVE * np.abs(theirs).max())


class Paged:
    """Prefill and decode of a bundle with a paged cache, whose pools start as NaN."""

    def __init__(self, bundle, backend: str) -> None:
        self.session, self.bundle = GRAPH_BACKENDS[backend](bundle), bundle
        past = [t for t in bundle.graph("prefill").inputs if t.name.startswith("past_key")]
        self.pools = {t.name: np.full((PAGES, *t.dims[1:]), np.nan, dtype=np.float32) for t in past}

    def run(self, graph: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        out = self.session.run(graph, {**feeds, "page_table": TABLE, **self.pools})
        present = {name: array for name, array in out.items() if name.startswith("present.")}
        self.pools = {name.replace("present", "past_key_values"): array for name, array in present.items()}
        return {name: array for name, array in out.items() if name not in present}

    def prefill(self, tokens_in: np.ndarray, name: str = "input_ids") -> dict[str, np.ndarray]:
        """The first LENGTHS of each row, what follows them replaced by zeros."""
        real = np.arange(LENGTHS.max()) < LENGTHS[:, None]
        given = np.where(real.reshape(*real.shape, *[1] * (tokens_in.ndim - 2)), tokens_in[:, : LENGTHS.max()], 0)
        return self.run("prefill", **{name: given}, sequence_lengths=LENGTHS, past_lengths=LENGTHS * 0)

    def decode(self, tokens_in: np.ndarray, step: int, name: str = "input_ids") -> dict[str, np.ndarray]:
        """The token after LENGTHS + step of each row."""
        at = LENGTHS + step
        given = {name: tokens_in[[0, 1], at][:, None], "sequence_lengths": np.ones_like(at)}
        return self.run("decode", **given, past_lengths=at)


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_features_equal_transformers_and_numpy(checkpoint_of, bundle_of, reference, backend):
    base = checkpoint_of("base")
    bundle = bundle_of(base.folder, task="feature-extraction", page_size=PAGE, hidden_states=True)
    ids = tokens(2, 24)
    with torch.no_grad():
        expected = base.hf(torch.from_numpy(ids), output_hidden_states=True)
    run = Paged(bundle, backend)
    first = run.prefill(ids)
    steps = [run.decode(ids, step) for step in range(STEPS)]
    assert list(first) == ["last_hidden_state", *(f"hidden_states.{i}" for i in range(4))]
    for row, length in enumerate(LENGTHS):
        last = min(length + STEPS, 24)
        exact = reference.hidden_states(RAW, base.weights, ids[row, :last])
        for index in range(4):
            name = f"hidden_states.{index}"
            ours = np.concatenate([first[name][row, :length], *(step[name][row] for step in steps)])[:last]
            assert close(ours, expected.hidden_states[index][row, :last]), (row, name)
            assert close(ours, exact[index]), (row, name)
        assert close(first["last_hidden_state"][row, :length], expected.last_hidden_state[row, :length])


@pytest.mark.parametrize("io", ["native", "transformers"])
def test_features_without_a_cache(checkpoint_of, bundle_of, io):
    base = checkpoint_of("base")
    bundle = bundle_of(base.folder, task="feature-extraction", no_cache=True, io=io)
    assert [t.name for t in bundle.graph("model").outputs] == ["last_hidden_state"]
    ids = tokens(2, 21)
    real = np.arange(21) < LENGTHS[:, None]
    masks = [real, real[:, ::-1]] if io == "transformers" else [real]  # padded right, padded left
    with torch.no_grad():
        alone = [base.hf(torch.from_numpy(ids[row : row + 1, :n])) for row, n in enumerate(LENGTHS)]
    expected = [out.last_hidden_state[0] for out in alone]
    for mask in masks:
        padded = np.full_like(ids, PAD)
        for row, n in enumerate(LENGTHS):
            padded[row, mask[row]] = ids[row, :n]
        given = {"sequence_lengths": LENGTHS} if io == "native" else {"attention_mask": mask.astype(np.int64)}
        for make in GRAPH_BACKENDS.values():
            hidden = make(bundle).run("model", {"input_ids": padded, **given})["last_hidden_state"]
            assert np.isfinite(hidden).all()
            assert all(close(hidden[row, mask[row]], expected[row]) for row in range(2))


@pytest.mark.parametrize("io", ["native", "transformers"])
def test_classes_equal_transformers_and_numpy(checkpoint_of, bundle_of, reference, io):
    """Padded right, padded left and not at all; row 2 is padding alone: it counts as one padding token."""
    classifier = checkpoint_of("classifier")
    bundle = bundle_of(classifier.folder, task="text-classification", io=io)
    ids, lengths = tokens(3, 21), np.array([21, 13, 0], dtype=np.int32)
    lone = np.array([PAD])
    score = classifier.weights["score.weight"]
    rows = [ids[0], ids[1, :13], lone]
    exact = np.stack([reference.hidden_states(RAW, classifier.weights, row)[-1][-1] @ score.T for row in rows])
    real = np.arange(21) < lengths[:, None]
    for mask in (real, real[:, ::-1]) if io == "transformers" else (real,):
        padded = np.full_like(ids, PAD)
        for row, n in enumerate(lengths):
            padded[row, mask[row]] = ids[row, :n]
        with torch.no_grad():
            theirs = classifier.hf(torch.from_numpy(padded[:2]), attention_mask=torch.from_numpy(mask[:2].astype(int)))
        given = {"sequence_lengths": lengths} if io == "native" else {"attention_mask": mask.astype(np.int64)}
        for make in GRAPH_BACKENDS.values():
            logits = make(bundle).run("model", {"input_ids": padded, **given})["logits"]
            assert close(logits, exact)
            assert close(logits[:2], theirs.logits)
    assert bundle.manifest.classifier.labels == ("dull", "fair", "fine")


def test_a_real_token_that_equals_padding_ends_a_row_as_in_transformers(checkpoint_of, bundle_of):
    classifier = checkpoint_of("classifier")
    bundle = bundle_of(classifier.folder, task="text-classification", io="transformers")
    ids = np.array([[9, 8, 7, PAD]])
    mask = np.ones_like(ids)
    with torch.no_grad():
        theirs = classifier.hf(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
    out = GRAPH_BACKENDS["ort"](bundle).run("model", {"input_ids": ids, "attention_mask": mask})
    assert close(out["logits"], theirs)


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_inputs_embeds_give_the_logits_of_their_tokens(checkpoint_of, bundle_of, reference, backend):
    causal = checkpoint_of("causal")
    bundle = bundle_of(causal.folder, page_size=PAGE, inputs_embeds=True)
    assert ("model.embed_tokens.weight", "the graphs take inputs_embeds") in [
        (d.name, d.reason) for d in bundle.manifest.dropped
    ]
    ids = tokens(2, 24)
    embeds = causal.weights["model.embed_tokens.weight"][ids].astype(np.float32)
    with torch.no_grad():
        expected = causal.hf(torch.from_numpy(ids)).logits
    exact = np.stack([reference.logits(RAW, causal.weights, row) for row in ids])
    run = Paged(bundle, backend)
    logits = run.prefill(embeds, "inputs_embeds")["logits"]
    assert close(logits, expected[[0, 1], LENGTHS - 1])
    assert close(logits, exact[[0, 1], LENGTHS - 1])
    for step in range(STEPS):
        logits = run.decode(embeds, step, "inputs_embeds")["logits"][:, 0]
        assert close(logits, expected[[0, 1], LENGTHS + step])
        assert close(logits, exact[[0, 1], LENGTHS + step])


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_the_last_tokens_logits(checkpoint_of, bundle_of, backend):
    """Of a row shorter than K the first token's logits are repeated in front."""
    causal = checkpoint_of("causal")
    bundle = bundle_of(causal.folder, page_size=PAGE, logits_to_keep=15)
    ids = tokens(2, 24)
    with torch.no_grad():
        expected = causal.hf(torch.from_numpy(ids)).logits
    run = Paged(bundle, backend)
    logits = run.prefill(ids)["logits"]
    kept = (LENGTHS[:, None] - np.arange(15, 0, -1)).clip(0)
    assert kept[1, :3].tolist() == [0, 0, 0]
    assert close(logits, expected[[[0], [1]], kept])
    assert close(run.decode(ids, 0)["logits"][:, 0], expected[[0, 1], LENGTHS])


@pytest.mark.parametrize("raw", [V3, DYNAMIC], ids=["biased router", "dynamic NTK"])
def test_variants_of_the_model_under_other_heads(checkpoint_of, bundle_of, reference, raw):
    classifier = checkpoint_of("classifier", raw, oracle=False)
    bundle = bundle_of(classifier.folder, task="text-classification")
    features = bundle_of(classifier.folder, task="feature-extraction", no_cache=True)
    ids, lengths = tokens(2, 21 if raw is V3 else 16), np.array([16, 9], dtype=np.int32)
    exact = [reference.hidden_states(raw, classifier.weights, ids[row, :n])[-1] for row, n in enumerate(lengths)]
    feeds = {"input_ids": ids, "sequence_lengths": lengths}
    logits = GRAPH_BACKENDS["ort"](bundle).run("model", feeds)["logits"]
    assert close(logits, np.stack([row[-1] for row in exact]) @ classifier.weights["score.weight"].T)
    hidden = GRAPH_BACKENDS["ort"](features).run("model", feeds)["last_hidden_state"]
    assert all(close(hidden[row, :n], exact[row]) for row, n in enumerate(lengths))


def test_names_without_a_prefix_are_found_again_by_reference(checkpoint_of, bundle_of):
    base = checkpoint_of("base")
    bundle = bundle_of(base.folder, task="feature-extraction", no_cache=True, by_reference=True)
    ids = tokens(1, 9)
    with torch.no_grad():
        expected = base.hf(torch.from_numpy(ids)).last_hidden_state
    for make in GRAPH_BACKENDS.values():
        feeds = {"input_ids": ids, "sequence_lengths": np.array([9], np.int32)}
        assert close(make(bundle).run("model", feeds)["last_hidden_state"], expected)


GRAPHS = {
    ("base", "prefill"): {"task": "feature-extraction", "page_size": PAGE, "hidden_states": True},
    ("base", "decode"): {"task": "feature-extraction", "page_size": PAGE, "hidden_states": True},
    ("classifier", "model"): {"task": "text-classification"},
    ("causal", "prefill"): {"page_size": PAGE, "inputs_embeds": True},
}


@pytest.mark.parametrize(("kind", "graph"), GRAPHS)
def test_graphs_are_valid_and_have_one_node_an_op(checkpoint_of, bundle_of, kind, graph):
    bundle = bundle_of(checkpoint_of(kind).folder, **GRAPHS[kind, graph])
    path, spec = bundle.graph_path(graph), bundle.graph(graph)
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        dims = [tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values]
        assert [v.name for v in values] == [t.name for t in tensors]
        assert dims == [t.dims for t in tensors]
    counts = collections.Counter(node.op_type for node in model.graph.node if node.domain == "deepseek_trt")
    attention = "MlaDecode" if graph == "decode" else "MlaPrefill"
    assert counts == {attention: 3, "MoeRouter": 2, "MoeExperts": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "summarization"}, "--task 'summarization'"),
        ({"io": "caffe"}, "--io 'caffe'"),
        ({"task": "feature-extraction", "all_logits": True}, "feature-extraction has no vocabulary"),
        ({"logits_to_keep": -1}, "--logits-to-keep -1"),
        ({"logits_to_keep": 2, "all_logits": True}, "leave out one of them"),
        ({"hidden_states": True}, "--hidden-states is for --task feature-extraction"),
        ({"no_cache": True}, "--no-cache is for --task feature-extraction"),
        ({"io": "transformers", "by_reference": True}, "leave out --by-reference"),
    ],
)
def test_options_that_contradict_each_other(checkpoint_of, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        export_bundle(ExportRequest(checkpoint_of("causal").folder, tmp_path / "out", **options))


@pytest.mark.parametrize(
    ("kind", "task", "words"),
    [
        ("base", "text-generation", r"lm_head\.weight is missing: this is DeepseekV2Model; export it with --task"),
        ("classifier", "text-generation", r"lm_head\.weight is missing: this is DeepseekV2ForSequenceClassification"),
        ("base", "text-classification", r"score\.weight is missing: the checkpoint has no classification head"),
        ("causal", "text-classification", r"score\.weight is missing"),
    ],
)
def test_a_checkpoint_of_another_class_is_refused_by_name(checkpoint_of, tmp_path, kind, task, words):
    with pytest.raises(CheckpointError, match=words):
        export_bundle(ExportRequest(checkpoint_of(kind).folder, tmp_path / "out", task))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "names 2 labels, score.weight has 3 rows"),
        ({"problem_type": "guessing"}, "problem_type 'guessing'"),
    ],
)
def test_labels_that_contradict_the_head(tmp_path, weights_of, save, changes, words):
    tensors = class_tensors("classifier", weights_of(RAW))
    folder = save(tmp_path / "x", {**RAW, **changes}, {"model.safetensors": tensors}, index=False)
    with pytest.raises(ConfigError, match=words):
        export_bundle(ExportRequest(folder, tmp_path / "out", "text-classification"))


def test_which_bundles_generate(checkpoint_of, bundle_of):
    causal, classifier = checkpoint_of("causal").folder, checkpoint_of("classifier").folder
    assert "for text-classification" in bundle_of(classifier, task="text-classification").manifest.generation_refusal
    assert "inputs_embeds" in bundle_of(causal, page_size=PAGE, inputs_embeds=True).manifest.generation_refusal
    assert "--logits-to-keep 15" in bundle_of(causal, page_size=PAGE, logits_to_keep=15).manifest.generation_refusal
