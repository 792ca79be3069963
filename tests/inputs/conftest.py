"""What people bring, in small: checkpoints to change, and the one verdict that check and export must agree on."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from deepseek_trt.cli.main import main

TESTS = Path(__file__).parents[1]
V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
V3: dict[str, Any] = {
    **V2,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
BASES = {"v2": V2, "v3": V3}


@dataclass(frozen=True)
class Verdict:
    """What `check` and `export` say of a checkpoint; `bundle` where it was exported."""

    accepted: bool
    check: str
    export: str
    bundle: Path | None


@dataclass(frozen=True)
class Made:
    """A checkpoint folder, what its config.json says, and its tensors under the published names."""

    path: Path
    raw: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def _shared(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"shared_{file.parent.name}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def _export_tests() -> Any:
    return _shared(TESTS / "export" / "conftest.py")


@pytest.fixture(scope="session")
def packers() -> Any:
    """tests/inputs/packers.py: checkpoints that are published packed."""
    return _shared(TESTS / "inputs" / "packers.py")


@pytest.fixture(scope="session")
def bases() -> dict[str, dict[str, Any]]:
    """The config.json that `made` changes, by name."""
    return BASES


@pytest.fixture
def made(tmp_path: Path, _export_tests: Any) -> Callable[..., Made]:
    """made("v2", key=value, ...): a whole checkpoint in one file, float32 unless `dtype` says another.

    A value of ... leaves the key out. `name` is the folder's; `stored` turns the tensors into those that are saved.
    """

    def make(
        base: str = "v2",
        name: str = "checkpoint",
        stored: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda tensors: tensors,
        **changes: Any,
    ) -> Made:
        raw = {key: value for key, value in {**BASES[base], **changes}.items() if value is not ...}
        sizes = {**BASES[base], **{k: v for k, v in changes.items() if isinstance(v, (int, str, type(None)))}}
        tensors = stored(_export_tests.random_weights(dict(_export_tests.shapes_of(sizes))))
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return Made(folder, raw, tensors)

    return make


@pytest.fixture
def verdict(tmp_path: Path) -> Callable[..., Verdict]:
    """verdict(folder, *export options): runs both commands; fails unless both accept or both refuse, in one sentence.

    `check` is given those of the options that it has, too. No traceback, one `error:` line at least where refused, and
    nothing left at OUT.
    """

    def judge(folder: Path, *options: str) -> Verdict:
        out = tmp_path / f"bundle-of-{folder.name}"
        both = [
            pair for pair in itertools.pairwise(options) if pair[0] in ("--adapter", "--task", "--dtype", "--quantize")
        ]
        check = CliRunner().invoke(main, ["check", str(folder), *itertools.chain(*both)])
        export = CliRunner().invoke(main, ["export", str(folder), str(out), *options])
        for result in (check, export):
            assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
            assert result.exit_code in (0, 1), result.output
            assert result.exit_code == 0 or "error: " in result.output
        assert check.exit_code == export.exit_code, f"check: {check.output}\nexport: {export.output}"
        accepted = export.exit_code == 0
        assert out.exists() == accepted
        return Verdict(accepted, check.output, export.output, out if accepted else None)

    return judge


@pytest.fixture
def packed(made, packers) -> Callable[..., Any]:
    """packed(kind, base="v2", wanted=linear, settings={}, mutate=..., **changes of config.json)"""

    def make(
        kind: str | dict[str, Any],
        base: str = "v2",
        wanted: Callable[[str], bool] | None = None,
        settings: dict[str, Any] | None = None,
        mutate: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
        **changes: Any,
    ) -> tuple[Path, Any]:
        packing = packers.Packing(**(packers.KINDS[kind] if isinstance(kind, str) else kind))
        one = made(base, **{**packers.SIZES, **changes}, quantization_config=packing.config(**(settings or {})))
        result = packers.pack(one.tensors, packing, wanted or packers.linear)
        mutate(result.tensors)
        save_file(result.tensors, one.path / "model.safetensors", metadata={"format": "pt"})
        return one.path, result

    return make


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Any]:
    """exported(folder, *options): what the command said; the bundle is in tmp_path/out."""

    def run(folder: Path, *options: str) -> Any:
        out = tmp_path / "out"
        done = CliRunner().invoke(main, ["export", str(folder), str(out), *options])
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        assert out.exists() == (done.exit_code == 0)
        return done

    return run
