"""LoRA adapters: merged at export as peft merges them (merge_and_unload, 0.21), or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_trt.engines.sessions.torch import as_tensor
from deepseek_trt.export.bundle.assemble import assemble
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.reading.source import read_source
from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.backends.published_weights import published_weights
from deepseek_trt.validate.request import ValidateRequest

pytestmark = pytest.mark.filterwarnings("default")  # peft's
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q, O = "model.layers.0.self_attn.q_b_proj", "model.layers.1.self_attn.o_proj"  # noqa: E741
State = dict[str, torch.Tensor]
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_b_proj", "o_proj"], "bias": "none"}


def lora(tensors: dict[str, torch.Tensor], *modules: str, r: int = 2) -> dict[str, torch.Tensor]:
    """Factors for the modules' weights, under peft's names."""
    generator, found = torch.Generator().manual_seed(3), {}
    for module in modules:
        rows, columns = tensors[f"{module}.weight"].shape
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, columns, generator=generator)
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, r, generator=generator) * 0.1
    return found


def write(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir()
    settings = {key: value for key, value in {**LORA, **changes}.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(settings))
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture
def trained(tmp_path) -> Callable[..., tuple[Path, State, State]]:
    """trained(checkpoint, **LoraConfig's): an adapter as peft saves it, the weights it merges, and those before."""
    peft = pytest.importorskip("peft", reason="peft is the test extra's")
    transformers = pytest.importorskip("transformers", reason="transformers is the test extra's")

    def train(checkpoint: Path, **options: Any) -> tuple[Path, State, State]:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter", wrapped.merge_and_unload().state_dict(), before

    return train


def written(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / WEIGHTS_FILE)


def graph_tensors(state: dict[str, torch.Tensor], raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """transformers' state as the graphs hold it: kv_b_proj and gate_up_proj in two."""
    found = {}
    for name, tensor in state.items():
        at, _, last = name.removesuffix(".weight").rpartition(".")
        if last == "kv_b_proj":
            heads = tensor.view(raw["num_attention_heads"], -1, raw["kv_lora_rank"])
            nope = raw["qk_nope_head_dim"]
            found |= {f"{at}.w_uk": heads[:, :nope], f"{at}.w_uv": heads[:, nope:]}
        elif last == "gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            found |= {f"{at}.gate_proj": gate, f"{at}.up_proj": up}
        else:
            found[name] = tensor
    return found


TRAINED = {
    "attention": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "everything": {"target_modules": "all-linear"},  # in newer transformers experts are parameters
    "experts by parameter": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    "rank-stabilized": {"target_modules": ["kv_b_proj"], "use_rslora": True, "r": 4},
    "patterns": {
        "target_modules": ["kv_b_proj", "o_proj"],
        "rank_pattern": {"layers.1.self_attn.o_proj": 5},
        "alpha_pattern": {r"layers\.0\..*": 32},
    },
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole modules": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*\.1\.self_attn\.(q_b|o)_proj"},
    "fan in, fan out": {"target_modules": ["o_proj"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("base", ["v2", "v3"])
@pytest.mark.parametrize("name", TRAINED)
def test_merged_as_peft_merges(made, verdict, trained, base, name):
    one = made(base)
    adapter, state, before = trained(one.path, **{"r": 2, "lora_alpha": 6, **TRAINED[name]})
    found = verdict(one.path, "--adapter", str(adapter))
    assert "is merged: LoRA of rank" in found.check
    ours, theirs = written(found.bundle), graph_tensors(state, one.raw)
    assert ours.keys() == theirs.keys()
    for weight, tensor in theirs.items():
        # peft sums in float32; ours is rounded once
        torch.testing.assert_close(ours[weight], tensor, rtol=0, atol=4e-7 * max(1.0, tensor.abs().max().item()))
    assert any(not torch.equal(state[weight], before[weight]) for weight in before)
    bundle = Bundle.open(found.bundle)
    weights = published_weights(bundle, None)
    for weight, tensor in ours.items():
        assert torch.equal(weights(weight), tensor), weight
    assert bundle.manifest.adapter.path == str(adapter)
    assert bundle.manifest.adapter.files.keys() == {CONFIG, WEIGHTS}


def test_experts_of_older_transformers(made, verdict, tmp_path):
    """One linear layer an expert, as the published names have it, and dense and shared ones beside them."""
    one = made()
    modules = [
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.shared_experts.up_proj",
        "model.layers.1.mlp.experts.2.gate_proj",
        "model.layers.1.mlp.experts.0.down_proj",
    ]
    factors = lora(one.tensors, *modules)
    adapter = write(tmp_path / "a", factors, target_modules=["gate_proj", "up_proj", "down_proj"])
    found = verdict(one.path, "--adapter", str(adapter))
    ours, weights = written(found.bundle), published_weights(Bundle.open(found.bundle), None)
    for module in modules:
        a, b = (factors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        expected = one.tensors[f"{module}.weight"] + 3 * b @ a
        at, _, projection = module.rpartition(".")
        stack, _, expert = at.rpartition(".")
        name = f"{stack}.{projection}" if expert.isdigit() else f"{module}.weight"
        merged = ours[name][int(expert)] if expert.isdigit() else ours[name]
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
        assert torch.equal(weights(name), ours[name])


def test_stacked_base(made, verdict, tmp_path, trained):
    """The checkpoint itself holds its experts stacked."""

    def stacked(tensors):
        left = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        at = "model.layers.1.mlp.experts"
        pairs = [torch.cat([tensors[f"{at}.{e}.{p}_proj.weight"] for p in ("gate", "up")]) for e in range(4)]
        downs = [tensors[f"{at}.{e}.down_proj.weight"] for e in range(4)]
        return left | {f"{at}.gate_up_proj": torch.stack(pairs), f"{at}.down_proj": torch.stack(downs)}

    plain = made(name="plain")
    adapter, state, _ = trained(plain.path, r=2, lora_alpha=6, target_modules="all-linear")
    one = made(stored=stacked)
    found = verdict(one.path, "--adapter", str(adapter))
    ours, theirs = written(found.bundle), graph_tensors(state, one.raw)
    weights = published_weights(Bundle.open(found.bundle), None)
    for name in (f"model.layers.1.mlp.experts.{p}_proj" for p in ("gate", "up", "down")):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
        assert torch.equal(weights(name), ours[name])


def test_rounded_once_to_the_dtype(made, tmp_path):
    one = made(stored=lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    factors = lora(one.tensors, O)
    source = read_source(one.path, adapter=write(tmp_path / "a", factors, target_modules=["o_proj"]))
    assert source.plan.dtype == "bfloat16"  # the base's, not the adapter's
    recipe = next(recipe for recipe in source.plan.recipes if recipe.name == f"{O}.weight")
    merged = as_tensor(assemble(recipe, source.checkpoint.tensors, source.plan.dtype))
    a, b = (factors[f"base_model.model.{O}.lora_{half}.weight"].double() for half in "AB")
    assert torch.equal(merged, (one.tensors[f"{O}.weight"].double() + 3 * b @ a).float().bfloat16())


def test_fp8_is_dequantised_first(made, verdict, tmp_path):
    codes, scale = (torch.randn(32, 20) * 50).to(torch.float8_e4m3fn), torch.tensor([[2.0**-9]])
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    one = made(
        stored=lambda t: {**t, f"{O}.weight": codes, f"{O}.weight_scale_inv": scale.to(torch.float8_e8m0fnu)},
        quantization_config=fp8,
    )
    factors = lora(one.tensors, O)
    found = verdict(one.path, "--adapter", str(write(tmp_path / "a", factors, target_modules=["o_proj"])))
    a, b = (factors[f"base_model.model.{O}.lora_{half}.weight"].double() for half in "AB")
    expected = ((codes.float() * scale).double() + 3 * b @ a).float()
    assert torch.equal(written(found.bundle)[f"{O}.weight"], expected)
    assert torch.equal(published_weights(Bundle.open(found.bundle), None)(f"{O}.weight"), expected)


# What is refused


def rename(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def same(tensors):
    return tensors


REFUSED = {
    "DoRA": ({"use_dora": True}, same, "use_dora true"),
    "VeRA": ({"peft_type": "VERA"}, same, "peft_type 'VERA'"),
    "IA3": ({"peft_type": "IA3"}, same, "peft_type 'IA3'"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, same, "peft_type 'PROMPT_TUNING'"),
    "no type": ({"peft_type": ...}, same, "peft_type null"),
    "bias": ({"bias": "all"}, same, "bias 'all'"),
    "lora_bias": ({"lora_bias": True}, same, "lora_bias true"),
    "tokens": ({"trainable_token_indices": [1]}, same, "trainable_token_indices [1]"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, same, "layer_replication"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, same, "init_lora_weights 'pissa_niter_4' changes the base"),
    "OLoRA": ({"init_lora_weights": "olora"}, same, "init_lora_weights 'olora'"),
    "a key of the future": ({"new_method_config": {"a": 1}}, same, "new_method_config {'a': 1}"),
    "rank 0": ({"r": 0}, same, "r is 0"),
    "rank as text": ({"r": "8"}, same, "r is '8'"),
    "rank true": ({"r": True}, same, "r is true"),
    "alpha a list": ({"lora_alpha": [1]}, same, "lora_alpha is [1]"),
    "a broken pattern": ({"target_modules": "("}, same, "target_modules is '('"),
    "targets a number": ({"target_modules": 3}, same, "target_modules is 3"),
    "layers as text": ({"layers_to_transform": ["a"]}, same, "layers_to_transform is ['a']"),
    "another rank": ({"r": 4}, same, "says rank 4"),
    "another rank in a pattern": ({"rank_pattern": {"o_proj": 3}}, same, "says rank 3"),
    "not targeted": ({"target_modules": ["o_proj"]}, same, f"does not target {Q}"),
    "another layer": ({"layers_to_transform": [0]}, same, f"does not target {O}"),
    "excluded": ({"exclude_modules": ["q_b_proj"]}, same, f"does not target {Q}"),
    "no weight": ({}, rename(lambda n: n.replace("layers.0", "layers.7")), "which the checkpoint does not hold"),
    "not peft's names": ({}, rename(lambda n: n.removeprefix("base_model.")), "does not begin with base_model.model."),
    "the adapter's name inside": ({}, rename(lambda n: n.replace(".weight", ".default.weight")), "is neither a factor"),
    "half of a pair": ({}, lambda t: {n: v for n, v in t.items() if "lora_A" not in n}, "lacks its other half"),
    "magnitudes": ({}, lambda t: {**t, f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(40)}, "is neither"),
    "a bias": ({}, lambda t: {**t, f"base_model.model.{Q}.bias": torch.ones(40)}, "is neither a factor"),
    "another width": (
        {},
        lambda t: {n: v[:, : (-1 if "lora_A" in n else None)].clone() for n, v in t.items()},
        "is for a weight of",
    ),
    "integers": ({}, lambda t: {n: v.to(torch.int8) for n, v in t.items()}, "is I8"),
    "cubes": ({}, lambda t: {n: v[None] for n, v in t.items()}, "is no matrix"),
    "resized": (
        {"modules_to_save": ["lm_head"]},
        lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(50, 32)},
        "[50, 32]",
    ),
    "nothing": ({}, lambda t: {}, "holds no tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(made, verdict, tmp_path, name):
    changes, change, words = REFUSED[name]
    one = made()
    adapter = write(tmp_path / "a", change(lora(one.tensors, Q, O)), **changes)
    found = verdict(one.path, "--adapter", str(adapter))
    assert words in found.check
    assert words in found.export


def test_tied_embeddings_are_refused(made, verdict, tmp_path):
    one = made(tie_word_embeddings=True)
    tensors = {"lm_head.weight": one.tensors["model.embed_tokens.weight"].clone()}
    adapter = write(tmp_path / "a", lora(tensors, "lm_head"), target_modules=["lm_head"])
    save_file({**one.tensors, **tensors}, one.path / "model.safetensors")  # a copy, as some trainers leave it
    assert "tie_word_embeddings" in verdict(one.path, "--adapter", str(adapter)).check


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "is missing: --adapter takes"),
        ({CONFIG: "{"}, "is not JSON"),
        ({CONFIG: "[]"}, "does not hold an object"),
        ({CONFIG: json.dumps(LORA)}, f"lacks {WEIGHTS}"),
        ({CONFIG: json.dumps(LORA), "adapter_model.bin": ""}, f"lacks {WEIGHTS}: save it with peft, in safetensors"),
        ({CONFIG: json.dumps(LORA), WEIGHTS: "x"}, "is not a safetensors file"),
    ],
)
def test_folders_that_hold_no_adapter(made, verdict, tmp_path, files, words):
    (tmp_path / "a").mkdir()
    for name, text in files.items():
        (tmp_path / "a" / name).write_text(text)
    assert words in verdict(made().path, "--adapter", str(tmp_path / "a")).check


def test_text_files_of_the_adapter_are_not_used(made, tmp_path):
    one = made()
    adapter = write(tmp_path / "a", lora(one.tensors, Q, O))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert any("the adapter's differ: chat_template.jinja" in n for n in read_source(one.path, adapter=adapter).notes)


def test_no_folder(made, verdict, tmp_path):
    assert "is not a folder" in verdict(made().path, "--adapter", str(tmp_path / "none")).check


def test_an_adapter_alone_is_no_checkpoint(made, verdict, tmp_path):
    adapter = write(tmp_path / "a", lora(made().tensors, Q, O))
    for _ in range(2):
        found = verdict(adapter)
        assert f"is an adapter ({CONFIG}), not a model" in found.check
        assert f"export BASE OUT --adapter {adapter}" in found.check.replace("\n", "")
        (adapter / "config.json").write_text("{}")  # some trainers leave one


def test_an_adapter_in_the_models_own_folder(made, verdict, tmp_path):
    """transformers would load both; so the folder must be given twice, or the adapter taken away."""
    one = made()
    adapter = write(tmp_path / "a", lora(one.tensors, Q, O))
    for file in adapter.iterdir():
        shutil.copy(file, one.path)
    assert "holds an adapter beside the model" in verdict(one.path).check
    assert verdict(one.path, "--adapter", str(one.path)).accepted


@pytest.mark.parametrize("name", ["base_layer.weight", "lora_A.weight", "lora_A.default.weight", "lora_B.weight"])
def test_lora_beside_the_weights_is_named(made, verdict, name):
    one = made(stored=lambda tensors: {**tensors, f"{Q}.{name}": torch.ones(2, 2)})
    found = verdict(one.path)
    assert "is an adapter's (LoRA)" in found.check
    assert "--adapter" in found.check.replace("\n", "")


def test_by_reference_is_refused(made, tmp_path):
    from deepseek_trt.export.errors import ConfigError

    one = made()
    adapter = write(tmp_path / "a", lora(one.tensors, Q, O))
    with pytest.raises(ConfigError, match="--by-reference and --adapter"):
        export_bundle(ExportRequest(one.path, tmp_path / "out", adapter=adapter, by_reference=True))


def test_another_adapter_makes_another_bundle(made, tmp_path):
    one = made()
    adapter = write(tmp_path / "a", lora(one.tensors, Q, O))
    first = export_bundle(ExportRequest(one.path, tmp_path / "one", adapter=adapter))
    assert not export_bundle(ExportRequest(one.path, tmp_path / "one", adapter=adapter)).fresh
    (adapter / CONFIG).write_text(json.dumps({**LORA, "lora_alpha": 7}))
    second = export_bundle(ExportRequest(one.path, tmp_path / "two", adapter=adapter))
    third = export_bundle(ExportRequest(one.path, tmp_path / "three"))
    assert len({result.bundle.manifest.fingerprint for result in (first, second, third)}) == 3
    assert published_weights(first.bundle, None) is None  # the adapter that it was made of is no more


def test_merged_before_it_is_narrowed(made, verdict, tmp_path):
    """The codes are those of the merged float32 weights, not of the base's; validate's own reader says so, too."""
    one = made(hidden_size=64, q_lora_rank=32, v_head_dim=32)
    merged = made(name="merged", hidden_size=64, q_lora_rank=32, v_head_dim=32)
    added = lora(one.tensors, Q, O)
    adapter = write(tmp_path / "adapter", added)
    found = verdict(one.path, "--adapter", str(adapter), "--quantize", "int8")
    for module in (Q, O):
        a, b = (added[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        one.tensors[f"{module}.weight"] += 3 * b @ a  # alpha / r
    save_file(one.tensors, merged.path / "model.safetensors")
    theirs = export_bundle(ExportRequest(merged.path, tmp_path / "out", quantize="int8")).bundle.path
    ours, wanted = written(found.bundle), written(theirs)
    for name, tensor in wanted.items():  # a sum that is rounded otherwise moves a number by a step at most
        assert (ours[name].float() - tensor.float()).abs().max() <= (1 if tensor.dtype == torch.int8 else 1e-3), name
    assert sum(not torch.equal(ours[name], tensor) for name, tensor in wanted.items()) <= 4
    report = validate_bundle(ValidateRequest(found.bundle, ("exported",), threads=1)).report
    assert report.passed


def test_validate_and_transformers_agree(made, verdict, tmp_path, trained):
    """The reference and peft's merge on transformers' model both stand beside the bundle."""
    one = made()
    adapter, _, _ = trained(one.path, r=2, lora_alpha=6, target_modules="all-linear")
    found = verdict(one.path, "--adapter", str(adapter))
    report = validate_bundle(ValidateRequest(found.bundle, ("transformers",), threads=1)).report
    assert report.passed
    assert f"with the adapter in {adapter} merged" in report.reference
