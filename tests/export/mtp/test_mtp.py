"""The layer of multi-token prediction: what it computes, what an export of it holds, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_trt.engines.sessions.opening import BACKENDS, SessionRequest
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.mtp.model import Mtp

ROWS, STEPS = 2, 9


def session_of(bundle: Bundle, backend: str, pages: int = 5):
    return BACKENDS[backend](SessionRequest(bundle, pages, threads=1))


@pytest.fixture(scope="session")
def bundle(mtp_checkpoint, bundle_of) -> Bundle:
    return bundle_of(mtp_checkpoint(1.0), dtype="float32", mtp=True)


def test_manifest_says_how_it_drafts(bundle):
    manifest = bundle.manifest
    assert [graph.name for graph in manifest.graphs] == ["prefill", "decode", "mtp"]
    assert (manifest.speculation.kind, manifest.speculation.layer) == ("mtp", 3)
    assert manifest.cache.layers == 4
    dropped = {d.name.removeprefix("model.layers.3."): d.reason for d in manifest.dropped}
    assert dropped == {
        "embed_tokens.weight": "a copy of model.embed_tokens.weight, which the graph takes",
        "shared_head.head.weight": "a copy of lm_head.weight, which the graph takes",
    }
    names = {weight.recipe.name for weight in manifest.drafting_weights}
    assert {"model.layers.3.eh_proj.weight", "model.layers.3.self_attn.w_uk"} <= names
    assert not names & {weight.recipe.name for weight in manifest.main_weights}


def test_layer_is_the_published_one(bundle):
    """Against the equations: one sequence at once, attention expanded, no cache, other code."""
    session = session_of(bundle, "torch")
    layer, mtp = session.mtp.layer, session.mtp
    assert isinstance(mtp, Mtp)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(STEPS, mtp.config.hidden_size, generator=generator)
    tokens = torch.randint(0, mtp.config.vocab_size, (STEPS,), generator=generator)

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + mtp.config.rms_norm_eps) * weight

    embedded = mtp.model.embed_tokens.weight[tokens]
    joined = torch.cat([norm(embedded, layer.enorm.weight), norm(hidden, layer.hnorm.weight)], -1)
    x = joined @ layer.eh_proj.weight.T
    c, a = mtp.config, layer.self_attn
    normed = norm(x, layer.input_layernorm.weight)
    q = (a.q_b_proj(a.q_a_layernorm(a.q_a_proj(normed)))).view(STEPS, c.num_attention_heads, -1)
    kv = a.kv_a_proj_with_mqa(normed)
    latent, k_rope = a.kv_a_layernorm(kv[:, : c.kv_lora_rank]), kv[:, c.kv_lora_rank :]
    cos, sin = mtp.model.rope(torch.arange(STEPS)[None], torch.tensor([[STEPS]]))

    def rotated(v):  # [S, H, R], in adjacent pairs
        pairs = torch.view_as_complex(v.reshape(*v.shape[:-1], -1, 2)) * torch.complex(cos, sin)[0][:, None]
        return torch.view_as_real(pairs).flatten(-2)

    q_nope, q_rope = q[..., : c.qk_nope_head_dim], rotated(q[..., c.qk_nope_head_dim :])
    scores = torch.einsum("shn,hnl,tl->hst", q_nope, a.w_uk, latent)
    scores = scores + torch.einsum("shr,tr->hst", q_rope, rotated(k_rope[:, None])[:, 0])
    scores = (scores * c.softmax_scale).masked_fill(torch.ones(STEPS, STEPS).triu(1).bool(), -torch.inf)
    values = torch.einsum("hst,tl,hvl->shv", scores.softmax(-1), latent, a.w_uv).flatten(1)
    x = x + a.o_proj(values)
    x = x + layer.mlp(norm(x, layer.post_attention_layernorm.weight))
    expected_hidden = norm(x, layer.shared_head.norm.weight)[-1]
    expected = expected_hidden @ mtp.lm_head.weight.T

    logits = session.draft(
        tokens[None].numpy(),
        hidden[None].numpy(),
        np.array([STEPS], dtype=np.int32),
        np.zeros(1, dtype=np.int32),
        np.array([[1, 2]], dtype=np.int32),
    )
    # float32 sums of at most 96 terms in another order: some hundred roundings of 2^-24
    for ours, theirs in ((logits, expected), (session.hidden, expected_hidden)):
        limit = 200 * 2**-24 * float(theirs.abs().max())
        torch.testing.assert_close(torch.from_numpy(ours)[0], theirs, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sessions_agree(mtp_checkpoint, bundle_of, dtype):
    """Ragged rows in two calls, then one token that was drafted; hidden states come from prefill and decode."""
    bundle = bundle_of(mtp_checkpoint(1.0), dtype=dtype, mtp=True)
    rng = np.random.default_rng(3)
    ids = rng.integers(2, 256, (ROWS, STEPS), dtype=np.int64)
    lengths, none = np.array([STEPS, 4], dtype=np.int32), np.zeros(ROWS, dtype=np.int32)
    table = np.array([[1, 2], [3, 4]], dtype=np.int32)
    found = {}
    for backend in ("torch", "ort"):
        session = session_of(bundle, backend, pages=6)
        assert session.drafts
        session.prefill(ids, lengths, none, table)
        states = session.hidden
        assert states.shape == (ROWS, STEPS, 64)
        drafted = session.draft(np.roll(ids, -1, axis=1), states, lengths - 1, none, table)
        more = session.draft(ids[:, :1], session.hidden[:, None], none + 1, lengths - 1, table)
        session.decode(ids[:, :2], none + 2, lengths, table)
        found[backend] = (states[0], states[1, :4], drafted, more, session.hidden)
    # float16 rounds some 90 numbers on the way (validate's tolerances): 2 * sqrt(90) * 2^-11, of the largest
    limit = 2e-2 if dtype == "float16" else 1e-4
    for ours, theirs in zip(found["ort"], found["torch"], strict=True):
        assert np.abs(ours - theirs).max() <= limit * np.abs(theirs).max()


def test_graphs_without_mtp_are_as_before(mtp_checkpoint, bundle_of, bundle):
    plain = bundle_of(mtp_checkpoint(1.0), dtype="float32")
    assert plain.manifest.speculation is None
    assert [len(graph.outputs) for graph in plain.manifest.graphs] == [4, 4]
    assert {d.reason for d in plain.manifest.dropped} == {
        "layer 3 is beyond num_hidden_layers 3 (multi-token prediction); --mtp exports the first such layer"
    }
    ids = np.array([[5, 6, 7]], dtype=np.int64)
    given = (np.array([3], np.int32), np.zeros(1, np.int32), np.array([[1]], np.int32))
    one, other = (session_of(b, "ort").prefill(ids, *given) for b in (plain, bundle))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantize": "int8"}, "--mtp and --quantize"),
        ({"by_reference": True}, "--mtp and --by-reference"),
        ({"num_layers": 2}, "--mtp and --num-layers"),
        ({"task": "feature-extraction"}, "--mtp drafts for"),
        ({"io": "transformers"}, "--mtp drafts for"),
        ({"inputs_embeds": True}, "--mtp drafts for"),
        ({"logits_to_keep": 3}, "--mtp drafts for"),
    ],
)
def test_refused_options(mtp_checkpoint, tmp_path, options, named):
    with pytest.raises(ConfigError, match=named):
        export_bundle(ExportRequest(mtp_checkpoint(1.0), tmp_path / "out", mtp=True, **options))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_the_layer_is_refused(small_v2, tmp_path):
    with pytest.raises(CheckpointError, match=r"no layer of multi-token prediction \(model.layers.3.eh_proj.weight"):
        export_bundle(ExportRequest(small_v2.checkpoint, tmp_path / "out", mtp=True))


def test_embeddings_of_its_own_are_refused(mtp_checkpoint, tmp_path):
    source, changed = mtp_checkpoint(1.0), tmp_path / "changed"
    changed.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            name = "model.layers.3.embed_tokens.weight"
            if name in tensors:
                tensors[name][7, 7] += 1
            save_file(tensors, changed / file.name, metadata={"format": "pt"})
        else:
            (changed / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is no copy of model.embed_tokens.weight"):
        export_bundle(ExportRequest(changed, tmp_path / "out", mtp=True))
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_names_another_layer_is_refused(bundle, tmp_path):
    from deepseek_trt.export.bundle.consistency import flaw_of

    speculation = dataclasses.replace(bundle.manifest.speculation, layer=2)
    assert "speculation" in flaw_of(dataclasses.replace(bundle.manifest, speculation=speculation))
    assert "speculation" in flaw_of(dataclasses.replace(bundle.manifest, speculation=None))
    assert json.loads(bundle.manifest.to_json())["speculation"] == {"kind": "mtp", "layer": 3}
