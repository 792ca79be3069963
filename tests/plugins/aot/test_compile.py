"""Ahead-of-time compilation: the same bytes each time, within the chip's limits, whatever the environment says."""

import dataclasses
import importlib.metadata
import io
import types
from pathlib import Path

import pytest

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BuildError
from deepseek_trt.plugins.aot import compile as aot
from deepseek_trt.plugins.aot.records import Binary
from deepseek_trt.plugins.aot.variants import variants_for
from deepseek_trt.plugins.aot.worker import Compiled, Request, usage_from_log
from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS

DENSE = ModelConfig(
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=0,
)
SPARSE = dataclasses.replace(
    DENSE, hidden_size=128, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=64
)


def variant(kernel, dtype="bfloat16", sm=86):
    return next(v for v in variants_for(SPARSE, dtype, sm) if v.kernel == kernel)


def with_sizes(base, **sizes):
    return dataclasses.replace(base, constexprs=tuple({**dict(base.constexprs), **sizes}.items()))


def test_two_builds_give_the_same_bytes(tmp_path, monkeypatch):
    """Each in its own process and cache; settings and caches of Triton elsewhere do not matter."""
    monkeypatch.setenv("HOME", str(tmp_path))
    requests = [
        Request(variant("moe_router"), 80),
        Request(variant("mla_decode_split", sm=90), 90),
        Request(variant("moe_gate_up"), 120),
        Request(variant("moe_combine"), 80, as_ptx=True),
    ]
    first = aot.compile_requests(requests, jobs=1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/nowhere/ptxas")
    second = aot.compile_requests(requests, jobs=1)
    assert [c.binary for c in first] == [c.binary for c in second]
    assert [c.binary.variant for c in first] == [r.variant for r in requests]
    assert not any(tmp_path.iterdir()), "something was written outside the private cache"
    for compiled in first:
        binary = aot.checked(compiled)
        assert binary.entry == binary.variant.kernel
        assert binary.threads == 32 * binary.variant.num_warps
        assert len(binary.sha256) == 64
        assert str(Path.home()).encode() not in binary.image, "paths of this machine would change the bytes elsewhere"
        assert b"plugins/kernels" not in binary.image
    assert first[0].binary.image.startswith(b"\x7fELF")
    ptx = first[3].binary
    assert ptx.is_ptx
    assert b".version 8.0" in ptx.image
    assert b".target sm_80" in ptx.image


WAITING = ["moe_logits", "moe_choose", "moe_layer_gate_up", "mla_query", "mla_decode_split", "mla_decode_combine"]
WAITING += ["latent_write", "mla_prefill_expand", "mla_prefill_attend"]


@pytest.mark.parametrize("kernel", WAITING)
def test_memory_is_touched_after_the_kernel_before(kernel):
    """On SM 90 each kernel waits for it first; on older chips, which know no such instruction, none does."""
    requests = [Request(variant(kernel, sm=sm), sm, as_ptx=True) for sm in (86, 90)]
    old, new = (c.binary.image.decode() for c in aot.compile_requests(requests, jobs=1))
    assert "griddepcontrol" not in old
    touched = [new.index(word) for word in ("ld.global", "st.global", "cp.async") if word in new]
    assert new.index("griddepcontrol.wait") < new.index("griddepcontrol.launch_dependents") < min(touched)


def test_no_product_of_a_penalty_is_fused_with_what_follows():
    """A fused multiply-add rounds once where the CPU samplers round twice; Triton's interpreter would not show it."""
    (compiled,) = aot.compile_requests([Request(variant("sample_adjust"), 80, as_ptx=True)], jobs=1)
    assert b"mul.f32" in compiled.binary.image
    assert b"sub.f32" in compiled.binary.image
    assert b"fma" not in compiled.binary.image


def test_compiles_a_whole_model_in_order():
    calls = []
    binaries = aot.compile_all(DENSE, "float16", [90], jobs=2, on_progress=lambda *done: calls.append(done))
    wanted = [*variants_for(DENSE, "float16", 90), *variants_for(DENSE, "float16", aot.FALLBACK_TILES_SM)]
    assert [b.variant for b in binaries] == wanted
    assert [(b.sm, b.is_ptx) for b in binaries] == [(90, False)] * 11 + [(80, True)] * 11
    assert calls == [(n + 1, 22) for n in range(22)]


def test_refuses_what_does_not_fit_the_chip():
    large = with_sizes(variant("moe_gate_up"), HIDDEN=4096, BLOCK_M=64, BLOCK_N=64, BLOCK_K=128)
    large = dataclasses.replace(large, num_stages=4)
    with pytest.raises(BuildError, match=r"moe_gate_up in bfloat16 for SM 86 needs \d+ bytes.* 101376.*BLOCK_K 128"):
        aot.checked(*aot.compile_requests([Request(large, 86)], jobs=1))


def fabricated(shared=0, spill=0, scratch=0, sm=86, is_ptx=False):
    binary = Binary(variant("moe_down"), sm, is_ptx, "moe_down", shared, 128, b"", "")
    return Compiled(binary, registers=255, spill_bytes=spill, scratch_bytes=scratch, ttgir="")


@pytest.mark.parametrize(
    ("compiled", "words"),
    [
        (fabricated(spill=8), r"moe_down in bfloat16 for SM 86 spills 8 bytes a thread \(255 registers\).*BLOCK_M 16"),
        (fabricated(scratch=64), "64 bytes of scratch memory"),
        (fabricated(shared=SHARED_LIMITS[86] + 1), "101377 bytes of shared memory; a block has 101376"),
        (fabricated(shared=SHARED_LIMITS[80], sm=80, is_ptx=True), "166912 bytes of shared memory; a block has 101376"),
    ],
)
def test_refusals_name_kernel_chip_tile_and_figure(compiled, words):
    with pytest.raises(BuildError, match=words):
        aot.checked(compiled)


@pytest.mark.parametrize(
    "compiled",
    [
        fabricated(shared=SHARED_LIMITS[90], sm=90),
        fabricated(shared=SHARED_LIMITS[86], sm=80, is_ptx=True),
        fabricated(spill=8, sm=80, is_ptx=True),  # the driver allocates registers anew
    ],
)
def test_what_just_fits_is_taken(compiled):
    assert aot.checked(compiled) is compiled.binary


@pytest.mark.parametrize(("needed", "warps"), [(4, 4), (8, 8), (16, 8)])
def test_what_spills_is_tried_with_twice_the_warps(needed, warps, monkeypatch):
    def compile_one(request):
        spilled = 8 if request.variant.num_warps < needed else 0
        plain = fabricated(spill=spilled)
        return dataclasses.replace(plain, binary=dataclasses.replace(plain.binary, variant=request.variant))

    monkeypatch.setattr(aot, "compile_requests", lambda requests, *more: tuple(map(compile_one, requests)))
    (compiled,) = aot._compile_without_spills([Request(variant("moe_down"), 86)], jobs=1)
    assert compiled.binary.variant.num_warps == warps
    assert bool(compiled.spill_bytes) == (needed > 8)


def test_a_variant_that_does_not_match_its_kernel_is_said():
    wrong = dataclasses.replace(variant("moe_combine"), args=())
    with pytest.raises(BuildError, match=r"moe_combine in bfloat16 for SM 86 does not compile: .*takes"):
        aot.compile_requests([Request(wrong, 86)], jobs=1)


def test_a_dead_compiler_is_said():
    dead = types.SimpleNamespace(stdin=io.BytesIO(), stdout=io.BytesIO())
    with pytest.raises(BuildError, match="died at moe_router"):
        aot._ask(dead, Request(variant("moe_router"), 86))


def test_missing_ptxas_names_the_mend(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(BuildError, match="pip install nvidia-cuda-nvcc==13"):
        aot.find_ptxas()


def test_an_empty_wheel_names_the_mend(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(BuildError, match="--force-reinstall"):
        aot.find_ptxas()


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_86'
ptxas info    : Function properties for k
    16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 400 bytes cmem[0]
"""


def test_reads_ptxas_log():
    assert usage_from_log(LOG) == (255, 24)
    with pytest.raises(AssertionError, match="nothing"):
        usage_from_log("nothing")
