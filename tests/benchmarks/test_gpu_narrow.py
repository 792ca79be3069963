"""scripts/gpu-check's cases of narrow weights: its own reader of codes, every binary launched, small faults seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_check import (  # noqa: E402  benchmarks are no package of the product
    checks,
    launching,
    narrow_cases,
    narrow_checkpoint,
    narrow_reference,
    rehearsal,
    shipped,
    speeds,
    speeds_narrow,
    timing,
)
from gpu_check.items import Setting  # noqa: E402
from gpu_check.models import Sizes  # noqa: E402
from gpu_check.places import Prepared  # noqa: E402

from deepseek_trt.export.bundle.narrow_cache import CACHE_DTYPES, NarrowCache  # noqa: E402
from deepseek_trt.export.config.model_config import ModelConfig  # noqa: E402
from deepseek_trt.export.ops import narrow  # noqa: E402
from deepseek_trt.plugins.aot.narrow_use import NarrowUse  # noqa: E402
from deepseek_trt.plugins.aot.variants import variants_for  # noqa: E402
from deepseek_trt.plugins.kernels import interpreter  # noqa: E402
from deepseek_trt.plugins.kernels.narrow.formats import KERNEL_FORMATS  # noqa: E402
from deepseek_trt.plugins.narrow_ops import NARROW_PLUGINS  # noqa: E402

DEMO = json.loads((ROOT / "cli" / "demo_model" / "config.json").read_text())
OPS = {op.name for op in NARROW_PLUGINS}
WEIGHT_OPS = {name for name in OPS if not name.startswith("Mla")}
CACHES = [NarrowCache.of(ModelConfig.from_hf(DEMO), format) for format in CACHE_DTYPES]
LINEAR, EXPERTS = (("fp8", 32), ("int4", 32), ("int8", 32)), ("fp8", "int4", "int8")
USES = [NarrowUse(LINEAR, EXPERTS, whole_experts=False, cache=cache) for cache in CACHES]

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled in this process")


def library_of(dtype, ops=OPS):
    """The demo's kernels over narrow weights and caches as a library has them, without images."""
    variants = dict.fromkeys(v for use in USES for v in variants_for(ModelConfig.from_hf(DEMO), dtype, 90, narrow=use))
    variants |= dict.fromkeys(v for v in variants_for(ModelConfig.from_hf(DEMO), dtype, 90) if v.op == "MlaDecode")
    facts = {"sm": 90, "is_ptx": False, "shared_bytes": 0, "threads": 128, "image": b""}
    binaries = tuple(
        shipped.ShippedBinary(
            op=v.op,
            kernel=v.kernel,
            dtype=v.dtype,
            max_tokens=v.max_tokens,
            entry=v.kernel,
            sha256=repr((v.kernel, v.constexprs)),
            constants=dict(v.constexprs),
            **facts,
        )
        for v in variants
        if v.op in ops
    )
    return shipped.ShippedLibrary(f"demo {dtype}", dtype, Sizes.of(DEMO), binaries)


def checked(library, executor=None, few=False):
    """The rows by op."""
    interpreter.enable()
    gpu = rehearsal.RehearsedGpu(90)
    if executor is not None:
        honest = gpu.executor()
        gpu.executor = lambda: lambda *given: executor(honest, *given)
    setting = Setting(Prepared(Path("none")), rehearsal=True, few=few)
    return {row.what.split()[-1]: row for row in checks.check("demo", library, (90, False), setting, gpu)}


def test_codes_are_read_as_documented():
    """Some by hand, then all of them beside what the exported graphs compute."""
    one = torch.ones(1, 1)
    read = lambda format, *codes: narrow_reference.numbers_of(  # noqa: E731
        format, torch.tensor([codes], dtype=torch.uint8), one.half() if format != "fp8" else one
    ).tolist()
    assert read("int8", 0, 127, 129, 255, 128) == [[0, 127, -127, -1, -128]]
    assert read("int4", 0x88, 0xF0, 0x7A) == [[0, 0, -8, 7, 2, -1]]
    assert read("fp8", 0, 1, 0x07, 0x08, 0x38, 0x7E, 0xFE) == [[0.0, 2.0**-9, 7 * 2.0**-9, 2.0**-6, 1.0, 448.0, -448.0]]
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    for format in narrow_reference.GROUPS:
        own = narrow_cases._bytes(codes, format)
        groups = own.shape[1] * (2 if format == "int4" else 1) // narrow_reference.GROUPS[format]
        scales = torch.rand(1, groups) if format == "fp8" else torch.randn(2, groups).half()
        stored = own.view(torch.int8) if format == "int8" else own
        expected = narrow.widened(stored, scales, format, narrow_reference.GROUPS[format])
        assert torch.equal(narrow_reference.numbers_of(format, own, scales).float(), expected)


def test_scales_of_other_numbers_are_refused():
    with pytest.raises(ValueError, match="are not those of numbers"):
        narrow_reference.numbers_of("int8", torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 3).half())


@interpreted
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_binary_is_launched_and_right(dtype):
    library = library_of(dtype)
    rows = checked(library)
    assert set(rows) == OPS | {"all"}
    assert {row.result for row in rows.values()} == {"good"}, rows
    assert max(row.figures.get("error", 0) for row in rows.values()) < 1
    count = len({(b.kernel, b.sha256) for b in library.binaries})
    assert rows["all"].note == f"{count} of {count} binaries launched"


@interpreted
def test_memcheck_runs_the_narrow_kernels_alone():
    """The others of such a library are the whole bundle's."""
    rows = checked(library_of("bfloat16", {"LinearNarrowInt4", "MlaDecode"}), few=True)
    assert {what: row.result for what, row in rows.items()} == {"LinearNarrowInt4": "good", "all": "good"}
    assert rows["all"].note == "4 of 4 binaries launched"


def swapped(codes):
    return ((codes.view(torch.uint8) << 4) | (codes.view(torch.uint8) >> 4)).view(codes.dtype)


FAULTS = {  # kernel, its argument's place, what is made of it before the launch, what of the output afterwards
    "halves of a byte swapped": ("linear_narrow", 1, swapped, None),
    "another group's scales": ("linear_narrow", 2, lambda scales: scales.roll(1, -1), None),
    "another row's scales": ("linear_narrow", 2, lambda scales: scales.roll(1, -2), None),
    "half an ulp": ("linear_narrow", 3, None, lambda output: output.mul_(1 + 2**-8)),
    "nan": ("linear_narrow", 3, None, lambda output: output.view(-1)[-1:].fill_(torch.nan)),
    "another expert's scales": ("moe_gate_up_narrow", 4, lambda scales: scales.roll(1, 0), None),
    "two percent": ("moe_down_narrow", 3, None, lambda outer: outer.mul_(1.02)),
    "a code is one less": ("latent_narrow", 0, None, lambda codes: codes.clamp_(max=126)),
    "another token's scales": ("mla_decode_split_narrow", 2, lambda rope: rope.roll(1, 1), None),
    "another token's codes": ("mla_prefill_expand_narrow", 0, lambda codes: codes.roll(1, 1), None),
}
OF_KERNEL = {
    "linear_narrow": "LinearNarrowInt4",
    "moe_gate_up_narrow": "MoeExpertsNarrowInt4",
    "moe_down_narrow": "MoeExpertsNarrowInt4",
    "latent_narrow": "MlaDecodeNarrowInt8",
    "mla_decode_split_narrow": "MlaDecodeNarrowFp8",
    "mla_prefill_expand_narrow": "MlaPrefillNarrowInt8",
}


@interpreted
@pytest.mark.parametrize("fault", FAULTS)
def test_small_faults_are_seen(fault):
    kernel, at, before, after = FAULTS[fault]

    def spoiled(honest, binary, grid, arguments):
        arguments = list(arguments)
        if binary.kernel == kernel and before:
            arguments[at] = before(arguments[at])
        honest(binary, grid, arguments)
        if binary.kernel == kernel and after:
            after(arguments[at])

    op = OF_KERNEL[kernel]
    rows = checked(library_of("bfloat16", {op}), spoiled)
    assert rows[op].result == "FAILED"
    assert rows[op].figures["error"] > 1


@interpreted
def test_products_take_the_unit_of_the_library():
    """Whose columns of all matrices together are multiples of less than one matrix's are."""
    interpreter.enable()
    fp8 = KERNEL_FORMATS["fp8"]
    assert launching._unit({fp8.code: 32}, fp8, (128,)) == 32
    for columns in (48,), (128, 40):
        with pytest.raises(LookupError, match="no binary is for fp8 with"):
            launching._unit({fp8.code: 32}, fp8, columns)
    with pytest.raises(LookupError, match="no binary is for fp8"):
        launching._unit({}, fp8, (128,))


@interpreted
def test_narrow_products_are_timed():
    interpreter.enable()
    gpu, library = rehearsal.RehearsedGpu(90), library_of("bfloat16")
    timer, ceilings = timing.Timer(1, 0, gpu, calls=1), timing.Ceilings(1e9, 1e9)
    items = speeds_narrow.items("demo", library, speeds.REHEARSED, True, lambda: ceilings, timer, gpu)
    assert [item.name.removeprefix("demo ") for item in items] == sorted(WEIGHT_OPS)
    rows = {row.what.removeprefix("demo "): row for item in items for row in item.run()}
    assert {row.result for row in rows.values()} == {"good"}, rows
    for format, bits in (("int8", 8.5), ("int4", 4.5), ("fp8", 8 + 32 / 128**2)):
        figures = rows[f"linear {format} 128 x 128, 1 tokens"].figures
        assert figures["GB/s"] * figures["us"] * 1e3 == pytest.approx(128 * 128 * bits / 8 + 2 * 2 * 128)
        assert f"grouped GEMM {format}, 1 tokens" in rows


def test_a_checkpoint_has_the_numbers_of_a_bundle(tmp_path):
    """Of linear layers and of stacks of experts; other weights stay, and what is another tensor's is refused."""
    source, bundle, out = (tmp_path / name for name in ("source", "bundle", "out"))
    for folder in (source, bundle, out):
        folder.mkdir()
    linear, experts = torch.randint(-7, 8, (64, 32)), torch.randint(-7, 8, (2, 64, 32))
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(2)]
    whole = {"o_proj.weight": linear.float() + 0.1, "norm.weight": torch.rand(3)}
    whole |= {name: own.float() + 0.1 for name, own in zip(names, experts, strict=True)}
    save_file(whole, source / "model.safetensors")
    (source / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    packed = (experts[..., ::2] + 8) | ((experts[..., 1::2] + 8) << 4)
    parts = {
        "o_proj.weight": linear.to(torch.int8),
        "o_proj.weight_scale": torch.ones(64, 1).half(),
        "model.layers.1.mlp.experts.up_proj": packed.to(torch.uint8),
        "model.layers.1.mlp.experts.up_proj_scale": torch.ones(2, 64, 1).half(),
        "norm.weight": whole["norm.weight"],
    }
    save_file(parts, bundle / "weights.safetensors")
    narrow_checkpoint.write_checkpoint(source, bundle, out)
    made = load_file(out / "model.safetensors")
    assert set(made) == set(whole)
    assert torch.equal(made["o_proj.weight"], linear.float())
    assert [torch.equal(made[name], own.float()) for name, own in zip(names, experts, strict=True)] == [True, True]
    assert torch.equal(made["norm.weight"], whole["norm.weight"])
    parts["o_proj.weight"] = parts["o_proj.weight"].roll(1, 0)
    save_file(parts, bundle / "weights.safetensors")
    with pytest.raises(ValueError, match=r"o_proj.weight is not the checkpoint's"):
        narrow_checkpoint.write_checkpoint(source, bundle, out)
