"""Formats that are not read are called by their name, before any shape is compared; fp8 is read as V3 writes it.

How each format lays out its tensors: the writers' own sources (AutoGPTQ, AutoAWQ, compressed-tensors, bitsandbytes,
modelopt, gpt-oss, MLX); V3's fp8: its inference/kernel.py, weight * weight_scale_inv by blocks of 128 x 128.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.validate.backends.published_weights import published_weights

PROJ = "model.layers.0.self_attn.o_proj"  # [32, 20]
ONE = "model.safetensors"


def instead(**parts):
    """Tensors with `parts` in the place of one projection's weight."""

    def stored(tensors):
        left = {name: tensor for name, tensor in tensors.items() if name != f"{PROJ}.weight"}
        return left | {f"{PROJ}.{name.replace('_DOT_', '.')}": tensor for name, tensor in parts.items()}

    return stored


def ints(*shape, dtype=torch.int32):
    return torch.ones(shape, dtype=dtype)


PACKED = {
    "GPTQ": instead(qweight=ints(3, 32), qzeros=ints(1, 4), scales=torch.ones(1, 32), g_idx=ints(20)),
    "GPTQ:": instead(qweight=ints(3, 32), qzeros=ints(1, 4), scales=torch.ones(1, 32)),  # without act-order
    "AWQ": instead(qweight=ints(20, 4), qzeros=ints(1, 4), scales=torch.ones(1, 32)),
    "compressed-tensors": instead(weight_packed=ints(32, 3), weight_scale=torch.ones(32, 1), weight_shape=ints(2)),
    "compressed-tensors:": instead(weight=ints(32, 20, dtype=torch.int8), weight_scale=torch.ones(32, 1)),
    "NVFP4": instead(
        weight=ints(32, 10, dtype=torch.uint8),
        weight_scale=torch.ones(32, 2).to(torch.float8_e4m3fn),
        weight_scale_2=torch.tensor(1.0),
        input_scale=torch.tensor(1.0),
    ),
    "NVFP4:": instead(
        weight_packed=ints(32, 10, dtype=torch.uint8),
        weight_scale=torch.ones(32, 2).to(torch.float8_e4m3fn),
        weight_global_scale=torch.ones(1),
    ),
    "bitsandbytes": instead(
        weight=ints(320, 1, dtype=torch.uint8),
        weight_DOT_absmax=torch.ones(10),
        weight_DOT_quant_map=torch.ones(16),
        weight_DOT_quant_state_DOT_bitsandbytes__nf4=ints(9, dtype=torch.uint8),
    ),
    "bitsandbytes:": instead(weight=ints(32, 20, dtype=torch.int8), SCB=torch.ones(32)),
    "MXFP4": instead(weight_blocks=ints(32, 1, 16, dtype=torch.uint8), weight_scales=ints(32, 1, dtype=torch.uint8)),
    "MLX": instead(weight=ints(32, 3, dtype=torch.uint32), scales=torch.ones(32, 1), biases=torch.ones(32, 1)),
    "modelopt": instead(weight=torch.ones(32, 20).to(torch.float8_e4m3fn), weight_scale=torch.tensor(1.0)),
    "packed numbers (I8)": instead(weight=ints(32, 20, dtype=torch.int8)),
    "packed numbers (U8)": instead(weight=ints(32, 10, dtype=torch.uint8)),
    "F8_E5M2": instead(weight=torch.ones(32, 20).to(torch.float8_e5m2)),
    "F8_E4M3FNUZ": instead(weight=torch.ones(32, 20).to(torch.float8_e4m3fnuz)),
    "HQQ": instead(W_q=ints(32, 20, dtype=torch.uint8), zero=torch.ones(32), scale=torch.ones(32)),
}


@pytest.mark.parametrize("name", PACKED)
def test_named_by_the_tensors_where_config_says_nothing(made, verdict, name):
    found = verdict(made(stored=PACKED[name]).path)
    for text in (found.check, found.export):
        assert name.removesuffix(":") in text
        assert "use the bfloat16 checkpoint" in text
        assert "config.json asks for" not in text  # no shape was compared


CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "mxfp4": {"quant_method": "mxfp4"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_named_by_config(made, verdict, name):
    found = verdict(made(quantization_config=CONFIGS[name], stored=PACKED["packed numbers (I8)"]).path)
    assert name in found.check.lower()
    assert name in found.export.lower()


SIDE_FILES = {
    "NVFP4": ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}),
    "modelopt": ("hf_quant_config.json", {}),
    "GPTQ": ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}),
    "AWQ": ("quant_config.json", {"zero_point": True, "w_bit": 4}),
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_named_by_a_side_file(made, verdict, name):
    one, (file, content) = made(), SIDE_FILES[name]
    (one.path / file).write_text(json.dumps(content))
    found = verdict(one.path)
    assert name in found.check
    assert file in found.export


def test_a_side_file_may_say_that_nothing_is_quantized(made, verdict):
    one = made()
    (one.path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    assert verdict(one.path).accepted


OTHER_FILES = {
    "GGUF": "model-Q4_K_M.gguf",
    "pytorch_model.bin": "pytorch_model.bin",
    "pytorch_model.bin:": "pytorch_model.bin.index.json",
    "pytorch_model.bin: ": "pytorch_model-00001-of-00002.bin",
    "consolidated": "consolidated.00.pth",
    "Flax": "flax_model.msgpack",
    "TensorFlow": "tf_model.h5",
    "MLX": "weights.npz",
    "ONNX": "model.onnx",
    "distributed": "__0_0.distcp",
    "inference": "model0-mp16.safetensors",
}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", OTHER_FILES)
def test_named_by_the_only_file(made, verdict, name, with_config):
    one = made()
    (one.path / ONE).rename(one.path / OTHER_FILES[name])
    if not with_config:
        (one.path / "config.json").unlink()
    found = verdict(one.path)
    for text in (found.check, found.export):
        assert name.rstrip(": ") in text
        assert OTHER_FILES[name] in text
        assert "safetensors" in text


# fp8


def fp8(scales):
    """Stores one projection in fp8, with scales by blocks."""
    codes = (torch.randn(32, 20, generator=torch.Generator().manual_seed(1)) * 50).to(torch.float8_e4m3fn)
    return codes, instead(weight=codes, weight_scale_inv=scales)


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
SCALES = {
    "float32": torch.tensor([[0.37]]),
    "bfloat16": torch.tensor([[0.37]]).bfloat16(),
    "float16": torch.tensor([[0.37]]).half(),
    "ue8m0": torch.tensor([[2.0**-9]]).to(torch.float8_e8m0fnu),  # V3.1
}


@pytest.mark.parametrize("kind", SCALES)
def test_fp8_by_scales_of_any_dtype(made, verdict, kind):
    codes, stored = fp8(SCALES[kind])
    expected = codes.float() * SCALES[kind].float()
    found = verdict(made(stored=stored, quantization_config=FP8).path, "--quantize", "none")
    assert torch.equal(load_file(found.bundle / WEIGHTS_FILE)[f"{PROJ}.weight"], expected)
    assert torch.equal(published_weights(Bundle.open(found.bundle), None)(f"{PROJ}.weight"), expected)


def test_every_power_of_two(tmp_path):
    """A byte b of UE8M0 is 2^(b - 127), and 255 is NaN (OCP Microscaling 1.0); read as torch reads it."""
    from deepseek_trt.export.bundle.assemble import assemble
    from deepseek_trt.export.bundle.recipes import Piece, Recipe
    from deepseek_trt.export.reading.checkpoint import Checkpoint

    bits = torch.arange(256, dtype=torch.uint8)[:, None]
    ones = torch.ones(256 * 128, 1).to(torch.float8_e4m3fn)
    scales = bits.view(torch.float8_e8m0fnu)
    save_file({"w": ones, "w_scale_inv": scales}, tmp_path / ONE)
    recipe = Recipe("w", (256 * 128, 1), (Piece("w", 0, 256 * 128, 256 * 128, 1, "w_scale_inv"),))
    found = torch.from_numpy(assemble(recipe, Checkpoint.open(tmp_path).tensors, "float32"))[::128, 0]
    assert torch.equal(found[:-1].double(), 2.0 ** (torch.arange(255).double() - 127))
    assert found[-1].isnan()
    assert torch.equal(found.nan_to_num(0), scales[:, 0].float().nan_to_num(0))


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (torch.ones(1, 1, dtype=torch.float64), "is F64; scales may be"),
        (torch.ones(1, 1, dtype=torch.uint8), "packed numbers (U8)"),
        (torch.ones(1), "asks for [1, 1]"),
        (torch.ones(32, 1), "asks for [1, 1]"),
    ],
)
def test_scales_that_cannot_be_read(made, verdict, scales, words):
    found = verdict(made(stored=fp8(scales)[1], quantization_config=FP8).path)
    assert words in found.check
    assert words in found.export


def test_fp8_without_scales(made, verdict):
    codes = torch.ones(32, 20).to(torch.float8_e4m3fn)
    assert "is fp8 without" in verdict(made(stored=instead(weight=codes), quantization_config=FP8).path).check


def test_config_and_tensors_that_do_not_agree_are_noted(made, verdict):
    assert "no tensor is quantized" in verdict(made(quantization_config=FP8).path).check
    silent = made(name="silent", stored=fp8(SCALES["float32"])[1])
    assert "has no quantization_config" in verdict(silent.path).check


def test_stacked_fp8_experts_are_refused(made, verdict):
    def stored(tensors):
        at = "model.layers.1.mlp.experts"
        left = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        both, down = torch.ones(4, 48, 32), torch.ones(4, 32, 24)
        left |= {f"{at}.gate_up_proj": both.to(torch.float8_e4m3fn), f"{at}.down_proj": down}
        return left | {f"{at}.gate_up_proj_scale_inv": torch.ones(4, 1, 1)}

    assert "only matrices may be fp8" in verdict(made(stored=stored, quantization_config=FP8).path).check
