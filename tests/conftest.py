"""Fixtures shared by all folders: small checkpoints in published form, and bundles made of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepseek_trt.export import trace as tracing
from deepseek_trt.export.bundle.folder import MANIFEST_FILE, WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.manifest import sha256_of
from deepseek_trt.export.exporter import ExportRequest, export_bundle

# A shell that starts the tests in the background has Ctrl-C ignored, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
# V2's shape in small: query compression, group-limited routing, YaRN, two shared experts, a dense first layer.
V2: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "routed_scaling_factor": 16.0,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "max_position_embeddings": 2560,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
# V2-Lite's: no query compression, plain greedy routing.
V2_LITE: dict[str, Any] = {
    **V2,
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.0,
}
CONFIGS = {"v2": V2, "v2_lite": V2_LITE}
# V3's router, and its layer of multi-token prediction.
V3: dict[str, Any] = {
    **V2,
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}


def transformers_model(raw: dict[str, Any], seed: int = 0) -> Any:
    """transformers' model of this config with random weights, in float32."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    values = {k: v for k, v in raw.items() if k not in ("model_type", "torch_dtype")}
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**values, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.08 if parameter.dim() > 1 else 1 + 0.2 * noise)
            parameter.copy_(parameter.bfloat16())  # so that a bfloat16 checkpoint holds the same model
    return model


def published_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The model's weights under the published names, one tensor an expert."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                base = name.removesuffix("gate_up_proj")
                tensors[f"{base}{e}.gate_proj.weight"], tensors[f"{base}{e}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                tensors[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return tensors


def write_checkpoint(
    path: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16
) -> Path:
    """config.json and two shards with an index, named as DeepSeek names them."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for part in range(2):
        file = f"model-{part + 1:05d}-of-000002.safetensors"
        mine = names[part::2]
        save_file({n: tensors[n].to(dtype).contiguous().clone() for n in mine}, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@dataclasses.dataclass(frozen=True)
class Small:
    """A random model three ways: transformers', a checkpoint, and its config.json."""

    raw: dict[str, Any]
    hf: Any
    checkpoint: Path


@pytest.fixture(scope="session", params=list(CONFIGS))
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return _small(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def small_v2(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return _small("v2", tmp_path_factory)


def _small(name: str, tmp_path_factory: pytest.TempPathFactory) -> Small:
    raw = CONFIGS[name]
    hf = transformers_model(raw)
    path = tmp_path_factory.mktemp(name) / "checkpoint"
    return Small(raw, hf, write_checkpoint(path, raw, published_tensors(hf)))


@pytest.fixture(scope="session")
def mtp_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """mtp_checkpoint(strength): one of V3's kind, with a layer of multi-token prediction behind its three layers.

    Layers add so many times a random layer to the residual stream, and the join passes the embedding on. At 0.01 the
    next token follows from the last one alone, and every draft is right; at 1 few are.
    """
    made: dict[float, Path] = {}

    def make(strength: float) -> Path:
        if strength not in made:
            hidden, layer = V3["hidden_size"], f"model.layers.{V3['num_hidden_layers']}"
            layers = V3["num_hidden_layers"] + 1
            tensors = published_tensors(transformers_model({**V2, "num_hidden_layers": layers}))
            for name in tensors:
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    tensors[name] = tensors[name] * strength
            generator = torch.Generator().manual_seed(1)
            for index in range(V3["first_k_dense_replace"], layers):
                bias = torch.randn(V3["n_routed_experts"], generator=generator)
                tensors[f"model.layers.{index}.mlp.gate.e_score_correction_bias"] = bias * 0.1
            noise = torch.randn(hidden, hidden, generator=generator)
            tensors[f"{layer}.eh_proj.weight"] = torch.cat([torch.eye(hidden), noise * 0.1 * strength], dim=1)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                tensors[f"{layer}.{norm}.weight"] = torch.ones(hidden)
            tensors[f"{layer}.shared_head.norm.weight"] = tensors["model.norm.weight"]
            tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
            tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"]
            made[strength] = write_checkpoint(tmp_path_factory.mktemp("mtp") / "checkpoint", V3, tensors)
        return made[strength]

    return make


@pytest.fixture(scope="session", autouse=True)
def _graphs_traced_once() -> Iterator[None]:
    """Exports share traced graphs, which depend on the config and on no weight: tracing takes most of an export's time.

    Tests of tracing itself take `trace` at import, and so the real one.
    """
    traced: dict[str, Any] = {}

    def trace(*args: Any) -> Any:
        key = repr(args)
        if key not in traced:
            traced[key] = real(*args)
        return traced[key].clone()  # to which an export gives its own weights

    with pytest.MonkeyPatch.context() as patch:
        real = tracing.trace
        patch.setattr(tracing, "trace", trace)
        yield


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Exports a checkpoint, once for the same arguments: bundle_of(checkpoint, dtype="float32", page_size=8, ...)."""
    made: dict[str, Bundle] = {}

    def make(checkpoint: Path, **options: Any) -> Bundle:
        key = repr((checkpoint, sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("bundle") / "out"
            made[key] = export_bundle(ExportRequest(checkpoint, out, **options)).bundle
        return made[key]

    return make


@pytest.fixture(scope="session")
def relist() -> Callable[[Path], Bundle]:
    """relist(folder): the bundle there, its manifest listing what now lies in it as if export had written that."""

    def make(folder: Path) -> Bundle:
        raw = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        apart = {MANIFEST_FILE, WEIGHTS_FILE, *raw["added"]}
        names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - apart
        raw["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(names)}
        del raw["sha256"]
        (folder / MANIFEST_FILE).write_text(json.dumps({**raw, "sha256": sha256_of(raw)}), encoding="utf-8")
        return Bundle.open(folder)

    return make


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The trained model that ships with the package."""
    return Path(str(files("deepseek_trt.cli") / "demo_model"))
