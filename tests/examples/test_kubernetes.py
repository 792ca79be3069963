"""examples/kubernetes.yaml: by Kubernetes' own schemas, and its parts name each other rightly."""

from __future__ import annotations

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from deepseek_trt.engines.serving.settings import ServingSettings

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "kubernetes.yaml"
FLAGS = ROOT / "engines" / "model_repository" / "files" / "flags.py"
VERSIONS = ("1.29.0", "1.37.0")  # among those that are in use, and the newest that the schemas are there for


@pytest.fixture(scope="module")
def documents():
    found = {document["kind"]: document for document in yaml.safe_load_all(EXAMPLE.read_text())}
    assert found.keys() == {"Deployment", "PodDisruptionBudget", "Service"}
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["Deployment", "PodDisruptionBudget", "Service"])
def test_schema(documents, kind, version):
    kubernetes_validate.validate(documents[kind], version, strict=True)


def test_a_misspelt_key_is_found(documents):
    wrong = {**documents["Service"], "spec": {**documents["Service"]["spec"], "selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_selectors_find_the_pods(documents):
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert documents["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert documents["Service"]["spec"]["selector"] == labels


def test_ports_and_volumes_are_there(documents):
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["containerPort"] for port in container["ports"]}
    assert {port["port"] for port in documents["Service"]["spec"]["ports"]} < ports
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_pod_is_given_time_to_end(documents):
    """What preStop waits, then what running answers are given, then the server's own end."""
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    _, pause = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    server = re.search(r'"exit-timeout-secs": "(\d+)"', FLAGS.read_text())[1]
    assert pod["terminationGracePeriodSeconds"] > float(pause) + ServingSettings.drain_ms / 1000 + float(server)
