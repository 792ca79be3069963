"""/v1/embeddings of a feature-extraction bundle are the Embedder's."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

from deepseek_trt import Embedder

TEXTS = ["Return the number of", "Größe", "a"]


@pytest.fixture(scope="module")
def features(demo_checkpoint, bundle_of):
    return bundle_of(demo_checkpoint, task="feature-extraction", no_cache=True).path


@pytest.fixture
def served(features, start):
    with start(features, "--served-model-name", "vectors", "--max-inflight", "4") as server:
        yield server
        assert server.stop() == 0, server.said
        assert "Traceback" not in server.said


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url, api_key="unused", max_retries=0) as client:
        yield client


def test_vectors_usage_and_refusals(served, client, features, until):
    want = Embedder.open(features).embed(TEXTS)
    made = client.embeddings.create(model="vectors", input=TEXTS)  # which asks for base64
    np.testing.assert_allclose([one.embedding for one in made.data], want, rtol=1e-5, atol=1e-6)
    assert [one.index for one in made.data] == [0, 1, 2]
    plain = client.embeddings.create(model="vectors", input=TEXTS[0], encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, want[0], rtol=1e-5, atol=1e-6)
    rows = [[0, 5, 9], [0, 7]]
    of_ids = client.embeddings.create(model="vectors", input=rows)
    assert of_ids.usage.prompt_tokens == of_ids.usage.total_tokens == 5
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda text: client.embeddings.create(model="vectors", input=text), TEXTS))
    np.testing.assert_allclose([one.data[0].embedding for one in several], want, rtol=1e-4, atol=1e-5)
    refused = {
        "input": ["", [], [""], [[]], ["a", [1]], [1, "a"], "x " * 3000, [99999], 5],
        "encoding_format": ["hex"],
        "dimensions": [8],
        "foo": [1],
    }
    for field, values in refused.items():
        for value in values:
            answer = httpx.post(f"{served.url}/embeddings", json={"input": "a", field: value})
            assert answer.status_code in (400, 422), (field, value)
            assert answer.json()["error"]["message"]
    assert httpx.post(f"{served.url}/completions", json={"prompt": "a"}).status_code == 404
    until(lambda: served.metrics()["requests_total{ok}"] == 6)  # metrics come a moment after the answers
    assert served.metrics()["inflight_requests"] == 0


def test_a_killed_engine_is_said(features, start):
    with start(features) as server:
        os.kill(server.engine, signal.SIGKILL)
        assert server.wait() == 1
        assert "killed by signal 9" in server.said
