"""fp8 in blocks of 128 x 128: a checkpoint's own codes kept, whole weights narrowed, and what is refused.

How DeepSeek-V3 stores it: its inference/kernel.py, weight * weight_scale_inv by blocks. What a bundle holds is read
with the safetensors library and widened by torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deepseek_trt.cli.main import main
from deepseek_trt.engines.sessions.graphs import OrtGraphs, TorchGraphs
from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.weights import WeightReader

CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
# Neither rows nor columns are whole blocks; some are several.
SIZES = {"hidden_size": 136, "intermediate_size": 300, "moe_intermediate_size": 130, "q_lora_rank": 20}
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
EXPERTS = "model.layers.1.mlp.experts"
STACKS = ("gate_proj", "up_proj", "down_proj")


def is_linear(name: str) -> bool:
    return name.endswith(("_proj.weight", "_with_mqa.weight"))


def in_fp8(tensors: dict[str, torch.Tensor], kind: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Linear layers as V3 stores them: every block with a scale of its own, and codes of all sorts among the others."""
    made, drawn = {}, torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if not is_linear(name) or len(tensor.shape) != 2:
            made[name] = tensor
            continue
        codes = torch.randint(0, 256, tensor.shape, dtype=torch.uint8, generator=drawn)
        codes[(codes & 0x7F) >= 0x60] = 0x80  # neither NaN nor all too large; zeros with a sign
        codes[0, :8] = torch.arange(8, dtype=torch.uint8)[: len(codes[0, :8])]  # subnormal
        blocks = [-(-size // 128) for size in tensor.shape]
        scale = torch.exp2(-8 - torch.randint(0, 4, blocks, generator=drawn).float())
        scale = scale if kind == torch.float8_e8m0fnu else scale * (1 + torch.rand(blocks, generator=drawn))
        if scale.numel() > 1 and kind != torch.float8_e8m0fnu:
            scale[-1, -1] = 0
        made[name], made[f"{name}_scale_inv"] = codes.view(torch.float8_e4m3fn), scale.to(kind)
    return made


def export(*args: Any) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, args)])


def error(done: Any) -> str:
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    return line


def published(tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as bytes and scales in float32 under the name of a graph tensor."""
    if not name.startswith(EXPERTS):
        return tensors[name].view(torch.uint8), tensors[f"{name}_scale_inv"].float()
    sources = [f"{EXPERTS}.{e}.{name.rpartition('.')[2]}.weight" for e in range(4)]
    codes = torch.stack([tensors[source].view(torch.uint8) for source in sources])
    return codes, torch.stack([tensors[f"{source}_scale_inv"].float() for source in sources])


def narrow(bundle: Bundle) -> set[str]:
    return {w.recipe.name for w in bundle.manifest.weights if w.recipe.narrow and not w.recipe.is_scales}


@pytest.fixture
def fp8(made) -> Any:
    """fp8(kind of scales, then as `made`): a V3 checkpoint in fp8."""

    def make(kind: torch.dtype = torch.float32, **changes: Any) -> Any:
        given = {**SIZES, "quantization_config": CONFIG, "torch_dtype": "bfloat16", **changes}
        return made("v3", **{"stored": lambda tensors: in_fp8(tensors, kind), **given})

    return make


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_kept_bit_by_bit(fp8, tmp_path, kind: torch.dtype) -> None:
    one = fp8(kind)
    done = export(one.path, tmp_path / "out", "--quantize", "keep")
    assert done.exit_code == 0, done.output
    bundle = Bundle.open(tmp_path / "out", verify=True)
    found, names = load_file(tmp_path / "out" / WEIGHTS_FILE), narrow(bundle)
    linears = {name for name in one.tensors if is_linear(name) and ".experts." not in name and "kv_b" not in name}
    assert names == (linears - {"lm_head.weight"}) | {f"{EXPERTS}.{stack}" for stack in STACKS}
    for name in names:
        codes, scales = published(one.tensors, name)
        assert found[name].dtype == torch.float8_e4m3fn
        assert torch.equal(found[name].view(torch.uint8), codes), name
        assert torch.equal(found[f"{name}_scale"], scales), name
    said = " ".join(done.output.split())
    assert (
        f"--quantize keep: {len(names)} weights (3 of them stacks of experts) hold the checkpoint's fp8 codes" in said
    )
    assert "note: 4 fp8 weights are dequantised, as graphs take no codes there" in said
    reader = WeightReader(bundle)
    for name in names:
        codes, scales = published(one.tensors, name)
        spread = scales.repeat_interleave(128, -2)[..., : codes.shape[-2], :].repeat_interleave(128, -1)
        numbers = codes.view(torch.float8_e4m3fn).float() * spread[..., : codes.shape[-1]]
        assert np.array_equal(reader.numbers(name), numbers.numpy()), name


def feeds() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(2, 40, (2, 5))
    lengths, past = np.array([5, 3], np.int32), np.zeros(2, np.int32)
    return {
        "input_ids": ids,
        "sequence_lengths": lengths,
        "past_lengths": past,
        "page_table": np.array([[1], [2]], np.int32),
    }


def check_graphs(bundle: Bundle) -> None:
    """Exported bodies beside torch, and the compiled operators beside these, in prefill and in decode."""
    sessions = [OrtSession(bundle, 4, 1, compiled=compiled) for compiled in (False, True)]
    found = []
    for session in sessions:
        given = feeds()
        prefill = session.prefill(*given.values())
        decode = session.decode(
            np.array([[3], [4]]), np.ones(2, np.int32), given["sequence_lengths"], given["page_table"]
        )
        found.append((prefill, decode))
    assert not sessions[1].rounds_tokens
    for ours, theirs in zip(*found, strict=True):
        assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("quantize", ["keep", "fp8"])
def test_graphs_compute_what_torch_does(fp8, made, tmp_path, quantize: str) -> None:
    one = fp8() if quantize == "keep" else made("v3", **SIZES, attention_bias=True)
    assert export(one.path, tmp_path / "out", "--quantize", quantize).exit_code == 0
    bundle = Bundle.open(tmp_path / "out")
    check_graphs(bundle)
    shapes = {t.name: t for t in bundle.graph("prefill").inputs}
    caches = {
        name: np.zeros([3 if isinstance(d, str) else d for d in t.dims], np.float32)
        for name, t in shapes.items()
        if name.startswith("past") and len(t.dims) == 3
    }
    given = {**feeds(), **caches}
    given = {name: given[name] for name in shapes}
    ours, theirs = OrtGraphs(bundle).run("prefill", given), TorchGraphs(bundle).run("prefill", given)
    assert np.abs(ours["logits"] - theirs["logits"]).max() <= 2e-5 * np.abs(theirs["logits"]).max()


def test_halves_that_rotate_are_dequantised(fp8, tmp_path) -> None:
    """Their rows are put in another order, and the rows of a block would be of several."""
    one = fp8(rope_interleave=False)
    done = export(one.path, tmp_path / "out", "--quantize", "keep")
    assert done.exit_code == 0, done.output
    names = narrow(Bundle.open(tmp_path / "out"))
    assert not [name for name in names if "q_b_proj" in name or "kv_a_proj" in name]
    assert O_PROJ in names
    assert "8 fp8 weights are dequantised" in " ".join(done.output.split())


def test_experts_of_which_one_is_whole_are_dequantised(fp8, tmp_path) -> None:
    def stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = in_fp8(tensors)
        whole = f"{EXPERTS}.2.up_proj.weight"
        del made[f"{whole}_scale_inv"]
        return {**made, whole: tensors[whole]}

    assert export(fp8(stored=stored).path, tmp_path / "out", "--quantize", "keep").exit_code == 0
    names = narrow(Bundle.open(tmp_path / "out"))
    assert O_PROJ in names
    assert not [name for name in names if name.startswith(EXPERTS)]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "keep"),
        (["--dtype", "float16"], "keep"),
        (["--quantize", "none"], None),
        (["--by-reference"], None),
        (["--by-reference", "--quantize", "none"], None),
        (["--allow-nonfinite"], None),
    ],
)
def test_fp8_is_kept_unless_something_else_is_asked_for(fp8, tmp_path, options: list[str], name: str | None) -> None:
    done = export(fp8().path, tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    narrow = Bundle.open(tmp_path / "out").manifest.quantization
    assert (narrow.name if narrow else None) == name


def put(name: str, code: int | None = None, scale: float | None = None) -> Any:
    def stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = in_fp8(tensors)
        if code is not None:
            made[name].view(torch.uint8)[-1, -1] = code
            made[f"{name}_scale_inv"][-1, -1] = 1.0
        if scale is not None:
            made[f"{name}_scale_inv"][0, 0] = scale
        return made

    return stored


@pytest.mark.parametrize("change", [{"code": 0x7F}, {"code": 0xFF}, {"scale": float("nan")}, {"scale": float("inf")}])
@pytest.mark.parametrize("name", [O_PROJ, f"{EXPERTS}.3.down_proj.weight"])
def test_what_is_not_finite_is_refused_by_name(fp8, tmp_path, name: str, change: dict[str, Any]) -> None:
    line = error(export(fp8(stored=put(name, **change)).path, tmp_path / "out", "--quantize", "keep"))
    assert "weights are NaN or infinite, in 1 tensors of model.safetensors" in line
    assert name in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--by-reference"], "leave out --by-reference"),
        (["--allow-nonfinite"], "leave out --allow-nonfinite"),
    ],
)
def test_options_that_contradict_keep(fp8, tmp_path, options: list[str], words: str) -> None:
    assert words in error(export(fp8().path, tmp_path / "out", "--quantize", "keep", *options))


def test_a_checkpoint_without_fp8_has_nothing_to_keep(made, verdict, tmp_path) -> None:
    line = error(export(made("v2").path, tmp_path / "out", "--quantize", "keep"))
    assert "--quantize keep: no weight is fp8 with *_scale_inv" in line
    done = CliRunner().invoke(main, ["check", str(tmp_path / "checkpoint"), "--quantize", "keep"])
    assert done.exit_code == 1
    assert "no weight is fp8" in done.output


def test_a_checkpoint_whose_fp8_nobody_keeps(made, tmp_path) -> None:
    def stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made_of = in_fp8(tensors)
        return {
            name: tensor if name not in tensors or "kv_b_proj" in name else tensors[name]
            for name, tensor in made_of.items()
            if name in tensors or "kv_b_proj" in name
        }

    one = made("v3", **SIZES, quantization_config=CONFIG, stored=stored)
    assert "of the 4 fp8 weights none can be kept" in error(export(one.path, tmp_path / "out", "--quantize", "keep"))


def test_packed_checkpoints_are_taken_as_they_are_already(packed, tmp_path, packers) -> None:
    checkpoint, result = packed("compressed-tensors", "v3")
    assert export(checkpoint, tmp_path / "out", "--quantize", "keep").exit_code == 0
    packers.check_equal(tmp_path / "out", checkpoint, result)


def adapter(folder: Path, tensors: dict[str, torch.Tensor], module: str) -> Path:
    rows, columns = tensors[f"{module}.weight"].shape
    at = f"base_model.model.{module}.lora_"
    folder.mkdir()
    save_file(
        {f"{at}A.weight": torch.randn(2, columns), f"{at}B.weight": torch.randn(rows, 2)},
        folder / "adapter_model.safetensors",
    )
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(
        json.dumps({**said, "layers_to_transform": [int(module.split(".")[2])]})
    )
    return folder


def test_an_adapter_may_change_what_is_not_kept_alone(fp8, tmp_path) -> None:
    one = fp8()
    touched = adapter(tmp_path / "a", one.tensors, "model.layers.0.self_attn.o_proj")
    line = error(export(one.path, tmp_path / "out", "--quantize", "keep", "--adapter", touched))
    assert f"changes 1 weights that would be kept: {O_PROJ}" in line
    assert "leave out --quantize keep" in line
    whole = adapter(tmp_path / "b", one.tensors, "model.layers.0.self_attn.kv_b_proj")
    done = export(one.path, tmp_path / "out", "--quantize", "keep", "--adapter", whole)
    assert done.exit_code == 0, done.output
    assert O_PROJ in narrow(Bundle.open(tmp_path / "out"))
    done = export(one.path, tmp_path / "sums", "--quantize", "fp8", "--adapter", touched)
    assert done.exit_code == 0, done.output
    done = export(one.path, tmp_path / "whole", "--adapter", touched)
    assert done.exit_code == 0, done.output
    assert Bundle.open(tmp_path / "whole").manifest.quantization is None


def test_whole_weights_become_fp8_but_the_head(made, tmp_path) -> None:
    one = made("v3", **SIZES, torch_dtype="bfloat16")
    done = export(one.path, tmp_path / "out", "--quantize", "fp8", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "1 weights stay whole, as no rule names them: lm_head.weight" in " ".join(done.output.split())
    bundle = Bundle.open(tmp_path / "out", verify=True)
    found, reader = load_file(tmp_path / "out" / WEIGHTS_FILE), WeightReader(bundle)
    assert narrow(bundle) >= {O_PROJ, f"{EXPERTS}.up_proj"}
    for name in narrow(bundle):
        rows, columns = found[name].shape[-2:]
        assert found[f"{name}_scale"].shape == (*found[name].shape[:-2], -(-rows // 128), -(-columns // 128))
    near, numbers = torch.from_numpy(reader.numbers(O_PROJ)), one.tensors[O_PROJ]
    assert ((near - numbers).abs() <= numbers.abs() / 16 + numbers.abs().max() / 448 / 1024).all()


def test_rules_name_fp8(made, tmp_path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(
        json.dumps([{"pattern": f"{EXPERTS}.*", "format": "fp8"}, {"pattern": "lm_head*", "format": "int8"}])
    )
    bundle_of = made("v2", hidden_size=64)
    assert export(bundle_of.path, tmp_path / "out", "--quantize", rules).exit_code == 0
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.manifest.narrow_formats == ("fp8", "int8")
    assert bundle.manifest.quantization.rules[0].group == 128
    assert OrtSession(bundle, 4, 1).rounds_tokens


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"group": 32}, "[0].group is 32: groups are of 128 numbers in fp8"),
        ({"method": "least_squares"}, "[0].method is 'least_squares': scales of fp8 are found by absmax"),
        ({"method": "published"}, "[0].method is 'published'"),
    ],
)
def test_rules_of_fp8_that_are_wrong(made, tmp_path, rule: dict[str, Any], words: str) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"pattern": "*", "format": "fp8", **rule}]))
    assert words in error(export(made("v2").path, tmp_path / "out", "--quantize", rules))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_whole_weights_that_are_not_finite_are_refused_by_name(made, tmp_path, value: float) -> None:
    def stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[O_PROJ][3, 5] = value
        return tensors

    line = error(export(made("v2", stored=stored).path, tmp_path / "out", "--quantize", "fp8"))
    assert f"{O_PROJ} (1)" in line


def test_check_counts_a_byte_a_weight(fp8) -> None:
    checkpoint = fp8().path

    def disk(*options: str) -> int:
        done = CliRunner().invoke(main, ["check", str(checkpoint), "--json", *options])
        assert done.exit_code == 0, done.output
        return next(n["disk"] for n in json.loads(done.stdout)["facts"]["needs"] if n["step"] == "export")

    sizes = [disk("--quantize", way) for way in ("none", "fp8", "keep")]
    assert disk() == sizes[1] == sizes[2] < sizes[0]
