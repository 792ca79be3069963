"""A classifier on the real server: the command's labels, batches of several requests, refusals of one text alone."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

TEXTS = [
    "Return the number of",
    "The",
    "A list of all the words",
    "of the model that is trained",
    "When a value is given, it is used",
    "None",
]
LABELS = {"0": "dull", "1": "fair", "2": "fine"}


@pytest.fixture(scope="module")
def bundle(demo_checkpoint, bundle_of, tmp_path_factory):
    """The demo model with a random score head."""
    folder = tmp_path_factory.mktemp("classifier")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_checkpoint / name, folder / name)
    tensors = {
        name: t for shard in sorted(demo_checkpoint.glob("*.safetensors")) for name, t in load_file(shard).items()
    }
    hidden = tensors["model.norm.weight"].shape[0]
    tensors["score.weight"] = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, folder / "model.safetensors")
    raw = json.loads((demo_checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "id2label": LABELS}))
    return bundle_of(folder, task="text-classification")


@pytest.fixture(scope="module")
def repository(server_environment, run_cli, bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "repository"
    result = run_cli("model-repository", bundle.path, folder, "--name", "mood", "--json")
    assert json.loads(result.stdout)["labels"] == list(LABELS.values())
    again = run_cli("model-repository", bundle.path, folder, "--name", "mood")
    assert again.stdout.startswith("nothing to do")
    return folder


@pytest.fixture(scope="module")
def mood(repository, server_of, tmp_path_factory):
    running = server_of(repository, tmp_path_factory.mktemp("server"), models=("mood",)).start()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def expected(run_cli, bundle):
    given = [word for text in TEXTS for word in ("--text", text)]
    return [json.loads(line) for line in run_cli("classify", bundle.path, *given, "--json").stdout.splitlines()]


def infer(server, texts):
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}
    return server.post("/v2/models/mood/infer", {"inputs": [tensor]})


def outputs(reply):
    assert reply.status == 200, reply.json
    return {output["name"]: output["data"] for output in reply.json["outputs"]}


def test_labels_of_one_request_and_of_a_batch(mood, expected):
    reply = mood.generate("mood", text_input=TEXTS[0])
    assert reply.status == 200, reply.json
    assert reply.json["label"] == expected[0]["label"]
    assert reply.json["score"] == pytest.approx(expected[0]["score"], rel=1e-4)
    batch = outputs(infer(mood, TEXTS))
    assert batch["label"] == [each["label"] for each in expected]
    scores = [each["scores"][label] for each in expected for label in LABELS.values()]
    assert batch["scores"] == pytest.approx(scores, rel=1e-3, abs=1e-6)


def test_requests_at_once_are_batched_and_answered_each(mood, expected):
    with ThreadPoolExecutor(24) as threads:
        replies = list(threads.map(lambda i: infer(mood, [TEXTS[i % len(TEXTS)]]), range(24)))
    for i, reply in enumerate(replies):
        assert outputs(reply)["label"] == [expected[i % len(TEXTS)]["label"]]
    stats = mood.get("/v2/models/mood/versions/1/stats").json["model_stats"][0]
    assert stats["execution_count"] < stats["inference_count"]


def test_a_text_that_is_too_long_is_refused_alone(mood, expected):
    with ThreadPoolExecutor(4) as threads:
        texts = [TEXTS[0], "word " * 20000, TEXTS[1], TEXTS[2]]
        replies = list(threads.map(lambda text: infer(mood, [text]), texts))
    assert replies[1].status == 400
    assert "shorten it" in replies[1].json["error"]
    assert [outputs(replies[i])["label"][0] for i in (0, 2, 3)] == [each["label"] for each in expected[:3]]


def test_the_configuration_is_a_plain_batched_model(mood):
    config = mood.get("/v2/models/mood/config").json
    assert config["model_transaction_policy"]["decoupled"] is False
    assert "dynamic_batching" in config
    assert config["max_batch_size"] == 32
    assert json.loads(config["parameters"]["labels"]["string_value"]) == list(LABELS.values())


def test_the_runtime_needs_no_torch_and_no_onnx(repository):
    sources = {path.name for path in (repository / "mood" / "1" / "runtime").rglob("*.py")}
    assert {"classify.py", "classifier_model.py", "ort.py"} <= sources
    assert not sources & {"heads.py", "torch.py", "model.py", "widen.py"}
