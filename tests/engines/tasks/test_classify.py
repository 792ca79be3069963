"""Classifying and embedding text: labels, scores, padding, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.engines.tasks.classify import TextClassifier, scores_of
from deepseek_trt.engines.tasks.embed import Embedder
from deepseek_trt.engines.tasks.rows import pad_rows, strip_padding
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BackendError, BundleError, RequestError

PAD = 5
LABELS = {"0": "dull", "1": "fair", "2": "fine"}
TEXTS = ["Return the number of", "The", "A list of all the words that are longer than this one"]


@pytest.fixture(scope="module")
def checkpoint_of(demo_checkpoint, tmp_path_factory):
    """The demo model with a random score head instead of its language-model head."""
    import torch
    from safetensors.torch import load_file, save_file

    def make(**config) -> Path:
        folder = tmp_path_factory.mktemp("classifier")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_checkpoint / name, folder / name)
        tensors = {}
        for shard in sorted(demo_checkpoint.glob("*.safetensors")):
            tensors.update(load_file(shard))
        tensors.pop("lm_head.weight", None)
        hidden = tensors["model.norm.weight"].shape[0]
        tensors["score.weight"] = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
        save_file(tensors, folder / "model.safetensors")
        raw = json.loads((demo_checkpoint / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, "id2label": LABELS, **config}))
        return folder

    return make


@pytest.fixture(scope="module")
def bundle(checkpoint_of, bundle_of) -> Bundle:
    return bundle_of(checkpoint_of(pad_token_id=PAD), task="text-classification", dtype="float32")


@pytest.fixture(scope="module")
def classifier(bundle) -> TextClassifier:
    return TextClassifier(bundle)


def test_a_batch_gives_what_each_text_gives_alone(classifier):
    together = classifier.classify(TEXTS)
    for text, result in zip(TEXTS, together, strict=True):
        (alone,) = classifier.classify([text])
        assert alone.label == result.label
        assert dict(alone.scores) == pytest.approx(dict(result.scores), rel=1e-4)
        assert sum(dict(result.scores).values()) == pytest.approx(1.0)
        assert set(dict(result.scores)) == set(LABELS.values())


def test_padding_on_either_side_and_all_padding(classifier):
    row, padding = [9, 8, 7], [PAD, PAD]
    expected = classifier.logits(np.array([row]))
    padded = np.array([row + padding, padding + row, [PAD, *row, PAD]])
    np.testing.assert_allclose(classifier.logits(padded), np.repeat(expected, 3, 0), rtol=1e-4, atol=1e-5)
    given = np.array([padding + row, [PAD] * 5])
    lone = classifier.logits(np.array([[PAD]]), np.array([1], np.int32))
    np.testing.assert_allclose(classifier.logits(given)[1:], lone, rtol=1e-4, atol=1e-5)


def test_torch_gives_the_same(bundle, classifier):
    ids, lengths = pad_rows([[9, 8, 7, 4], [6, 5]])
    torch_logits = TextClassifier(bundle, "torch").logits(ids, lengths)
    np.testing.assert_allclose(classifier.logits(ids, lengths), torch_logits, rtol=1e-4, atol=1e-5)


def test_a_batch_whose_padding_cannot_be_told_is_refused():
    ids = np.array([[9, 8, 7], [9, 8, 0]])
    with pytest.raises(RequestError, match="2 rows without sequence_lengths, and config"):
        strip_padding(ids, None)
    kept, lengths = strip_padding(ids[:1], None)
    assert kept.tolist() == ids[:1].tolist()
    assert lengths.tolist() == [3]


@pytest.mark.parametrize(
    ("ids", "lengths", "words"),
    [
        ([[1, 2]], [3], r"sequence_lengths \[3\] are not those of \[1, 2\]"),
        ([[1, 10**6]], [2], "the vocabulary ends at"),
        ([[1] * 5000], [5000], "the model takes at most"),
    ],
)
def test_rows_that_the_model_cannot_take(classifier, ids, lengths, words):
    with pytest.raises(RequestError, match=words):
        classifier.logits(np.array(ids), np.array(lengths, np.int32))


def test_an_input_that_the_graph_does_not_have(classifier):
    with pytest.raises(BackendError, match="what it was given lacks sequence_lengths"):
        classifier.session.run("model", {"input_ids": np.array([[1]])})


def test_scores_follow_the_activation():
    logits = np.array([[0.0, np.log(3.0)]], np.float32)
    np.testing.assert_allclose(scores_of(logits, "softmax"), [[0.25, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(scores_of(logits, "sigmoid"), [[0.5, 0.75]], rtol=1e-6)
    assert scores_of(logits, "none").tolist() == logits.tolist()


def test_command_prints_labels_and_scores(bundle):
    asked = ["classify", str(bundle.path), "--text", TEXTS[0], "--text", TEXTS[1]]
    plain = CliRunner().invoke(main, asked)
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.splitlines()[1].endswith(f": {TEXTS[1]}")
    lines = [json.loads(line) for line in CliRunner().invoke(main, [*asked, "--json"]).stdout.splitlines()]
    assert [line["text"] for line in lines] == TEXTS[:2]
    assert lines[0]["label"] == max(lines[0]["scores"], key=lines[0]["scores"].get)
    assert plain.stdout.splitlines()[0].startswith(f"{lines[0]['label']} {lines[0]['score']:.4f}, ")


def test_a_bundle_of_another_task_is_refused(demo_checkpoint, bundle_of):
    result = CliRunner().invoke(main, ["classify", str(bundle_of(demo_checkpoint).path), "--text", "x"])
    assert result.exit_code == 1
    assert "is for text-generation: export a DeepseekV2ForSequenceClassification checkpoint" in result.stderr


def test_embeddings_of_texts(demo_checkpoint, bundle_of):
    embedder = Embedder(bundle_of(demo_checkpoint, task="feature-extraction", no_cache=True))
    vectors = embedder.embed(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(embedder.embed(TEXTS[1:2]), vectors[1:2], rtol=1e-4, atol=1e-5)
    assert not np.allclose(embedder.embed(TEXTS, pooling="last"), vectors)
    with pytest.raises(RequestError, match="a text without tokens"):
        embedder.embed([[]])


def test_an_embedder_of_another_bundle_is_refused(bundle):
    with pytest.raises(BundleError, match="--task feature-extraction --no-cache"):
        Embedder(bundle)
