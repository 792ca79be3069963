"""The compiled attention over a narrow cache beside the exported bodies, and beside itself in other batches."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.ops.cache.codes import narrowed

# Widths that are no multiples of 16.
BASE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 60,
    "hidden_size": 40,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 11,
    "num_key_value_heads": 11,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": None,
    "hidden_act": "silu",
}
# rank, format, dtype: one group with a rest, and two groups.
KINDS = [(24, "int8", "float32"), (256, "fp8", "bfloat16"), (256, "int8", "float16"), (24, "fp8", "float32")]
# Of the largest logit: sums in another order; of float16 what the exported bodies round.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-5, "float16": 8 * 2.0**-11}
A_STEP = 5e-3  # where a number lay between two codes and each took another
# Of logits, where the exported bodies round to float16 and so take other codes for some in a hundred numbers: it finds
# what is wrong altogether. tests/validate/test_narrow_cache.py follows the codes, and compares strictly.
FLOAT16 = 2.0**-5
PAGES = 200
Make = Callable[[int, str, str], Bundle]


@pytest.fixture(scope="module")
def made(weights: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Make:
    @functools.cache
    def make(rank: int, cache: str, dtype: str) -> Bundle:
        raw = {**BASE, "kv_lora_rank": rank, "torch_dtype": dtype}
        folder = tmp_path_factory.mktemp("narrow_cache")
        tensors = weights.random_weights(dict(weights.shapes_of(raw)))
        kind = getattr(torch, dtype)
        save_file({n: t.to(kind).contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(raw))
        return export_bundle(ExportRequest(folder, folder / "out", page_size=4, cache_dtype=cache)).bundle

    return make


def filled(session: Session, table: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> Session:
    """Drawn latents where the rows hold tokens, as codes and scales, and NaN everywhere else."""
    narrow, generator = session.cache.narrow, torch.Generator().manual_seed(0)
    assert narrow is not None
    session.fill(float("nan"))
    for layer in range(session.cache.layers):
        latents = torch.randn(*table.shape, 4, session.cache.latent_dim, generator=generator) * 0.5
        latents = latents.to(getattr(torch, session.cache.dtype))
        pools = session.pools(layer)
        for pool, rows in zip(pools, narrowed(latents, narrow.rank, narrow.format, narrow.group), strict=True):
            for row, length in enumerate(lengths):
                for t in range(length):
                    pool[table[row, t // 4], t % 4] = rows[row, t // 4, t % 4].numpy()
    return session


def run(session: Session, rows: slice = slice(None)) -> list[np.ndarray[Any, Any]]:
    """Ragged rows: prefill (absorbed and expanded, within a block and beyond), decode of one token, of several."""
    rng = np.random.default_rng(0)
    table = rng.permutation(np.arange(1, PAGES, dtype=np.int32))[: 2 * 95].reshape(2, 95)
    past, new = np.array([277, 9], dtype=np.int32), np.array([3, 30], dtype=np.int32)
    several = np.array([2, 5], dtype=np.int32)
    ids = rng.integers(0, 60, (2, 30))
    filled(session, table, past)
    ids, table, past, new, several = ids[rows], table[rows], past[rows], new[rows], several[rows]
    out = [session.prefill(ids, new, past, table)]
    out.append(session.decode(ids[:, :1], np.ones_like(new), past + new, table)[:, 0])
    more = session.decode(ids[:, :5], several, past + new + 1, table)
    return [*out, *(logits[:count] for logits, count in zip(more, several, strict=True))]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_is_compiled_and_computes_the_same(made: Make, kind: tuple[int, str, str]) -> None:
    bundle = made(*kind)
    exported, compiled = OrtSession(bundle, PAGES, 1, compiled=False), OrtSession(bundle, PAGES, 2)
    assert "as exported" not in compiled.note
    wanted, got = run(exported), run(compiled)
    alike = True
    for layer in range(1 if kind[2] == "float16" else exported.cache.layers):
        (ours, rest), (theirs, other) = compiled.pools(layer), exported.pools(layer)
        used = np.isfinite(other[..., 0]) & (np.arange(PAGES) > 0)[:, None]  # page 0 is scratch
        assert (np.isfinite(rest[..., 0]) == np.isfinite(other[..., 0]))[1:].all()
        tolerance = TOLERANCE[kind[2]] * np.abs(other[used].astype(np.float32)).max()
        np.testing.assert_allclose(
            rest[used].astype(np.float32), other[used].astype(np.float32), rtol=0, atol=tolerance
        )
        differ = ours[used] != theirs[used]
        assert differ.mean() < (1e-4 if kind[2] != "float16" else 0.05)
        assert np.abs(ours[used].astype(int) - theirs[used])[differ].max(initial=0) <= 1
        alike &= not differ.any()
    tolerance = FLOAT16 if kind[2] == "float16" else TOLERANCE[kind[2]] if alike else A_STEP
    for a, b in zip(wanted, got, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_threads_and_batches_change_no_bit(made: Make, kind: tuple[int, str, str]) -> None:
    bundle = made(*kind)
    one, three = OrtSession(bundle, PAGES, 1), OrtSession(bundle, PAGES, 3)
    first, second = run(one), run(three)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for row in range(2):
        alone = run(three, slice(row, row + 1))
        np.testing.assert_array_equal(alone[0][0], first[0][row])
        np.testing.assert_array_equal(alone[1][0], first[1][row])
        np.testing.assert_array_equal(alone[2], first[2 + row])


def test_several_tokens_are_those_of_one_after_the_other(made: Make) -> None:
    bundle = made(*KINDS[0])
    several, single = OrtSession(bundle, 20, 2), OrtSession(bundle, 20, 1)
    table, lengths = np.arange(1, 11, dtype=np.int32)[None], np.array([13], dtype=np.int32)
    ids = np.random.default_rng(1).integers(0, 60, (1, 6))
    together = filled(several, table, lengths).decode(ids, np.array([6], np.int32), lengths, table)[0]
    filled(single, table, lengths)
    for i in range(6):
        at = np.array([13 + i], dtype=np.int32)
        logits = single.decode(ids[:, i : i + 1], np.ones_like(at), at, table)[0, 0]
        np.testing.assert_array_equal(together[i], logits)
    for ours, theirs in zip(several.pools(1), single.pools(1), strict=True):
        np.testing.assert_array_equal(ours, theirs)
