"""All targets by name."""

from __future__ import annotations

from collections.abc import Callable

from fuzzing.adapters import Adapters
from fuzzing.bundles import Manifests, Plans, PluginManifests
from fuzzing.exports import Exports
from fuzzing.requests import Requests
from fuzzing.runner import Target
from fuzzing.texts import Templates, Texts
from fuzzing.weights import INDEX, Checkpoints, Header

TARGETS: dict[str, Callable[[], Target]] = {
    "header": Header,
    "index": lambda: Checkpoints("index", INDEX),
    "config": lambda: Checkpoints("config", "config.json"),
    "config_v3": lambda: Checkpoints("config_v3", "config.json", v3=True),
    "classifier": lambda: Checkpoints("classifier", "config.json", "model.safetensors"),
    "shard": lambda: Checkpoints("shard", "model.safetensors"),
    "tokenizer": lambda: Texts("tokenizer", "tokenizer.json"),
    "tokenizer_config": lambda: Texts(
        "tokenizer_config", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
    ),
    "generation_config": lambda: Texts("generation_config", "generation_config.json"),
    "chat_template": Templates,
    "adapter": Adapters,
    "export": Exports,
    "request": Requests,
    "manifest": Manifests,
    "plan": Plans,
    "plugins": PluginManifests,
}
