"""Profiles: the shapes that an engine is built for, from a BuildSpec."""

from __future__ import annotations

from deepseek_trt.engines.plans.plan import BuildSpec, Profile
from deepseek_trt.export.bundle.graph import (
    BATCH,
    MOST_NEW_TOKENS,
    PAGES,
    PAST,
    SEQUENCE,
    TABLE,
    TOTAL,
    CacheSpec,
    GraphSpec,
    TensorSpec,
)
from deepseek_trt.export.errors import BuildError


def profile_of(graph: GraphSpec, cache: CacheSpec, spec: BuildSpec) -> Profile:
    """Every dynamic input's smallest, likeliest and largest shape.

    Prefill is tuned for one full prompt, decode for one token of a full batch. Raises BuildError where a size
    contradicts another.
    """
    if min(spec.max_batch_size, spec.max_input_len, spec.max_seq_len) < 1:
        raise BuildError("--max-batch-size, --max-input-len and --max-seq-len must be at least 1")
    if spec.max_input_len > spec.max_seq_len:
        raise BuildError(f"--max-input-len {spec.max_input_len} is above --max-seq-len {spec.max_seq_len}")
    table = cache.pages_for(spec.max_seq_len)
    pages = 1 + spec.max_batch_size * table
    if pages > cache.most_pages:
        raise BuildError(f"{_too_large(cache, spec)}: lower --max-seq-len or --max-batch-size to that")
    likely_batch = 1 if graph.name == "prefill" else spec.max_batch_size
    steps = (1, 1, MOST_NEW_TOKENS) if graph.name == "decode" else (1, spec.max_input_len, spec.max_input_len)
    sizes = {
        BATCH: (1, likely_batch, spec.max_batch_size),
        SEQUENCE: steps,
        TABLE: (1, table, table),
        PAGES: (2, pages, pages),
        PAST: (0, spec.max_seq_len - 1, spec.max_seq_len),
        TOTAL: (1, spec.max_seq_len, spec.max_seq_len),
    }
    dynamic = [tensor for tensor in graph.inputs if any(isinstance(d, str) for d in tensor.dims)]
    return Profile({t.name: (_shape(t, sizes, 0), _shape(t, sizes, 1), _shape(t, sizes, 2)) for t in dynamic})


def _too_large(cache: CacheSpec, spec: BuildSpec) -> str:
    """What of the spec does not go into one page pool, and the largest that does."""
    rows, tokens = spec.max_batch_size, spec.max_seq_len
    longest, most = cache.longest(rows), (cache.most_pages - 1) // cache.pages_for(tokens)
    fits = [f"{rows} sequences of {longest} tokens"] if longest else []
    fits += [f"{most} sequences of {tokens} tokens"] if most else []
    return (
        f"{rows} sequences of {tokens} tokens make a page pool of 2^31 numbers or more, which TensorRT does not take; "
        f"the largest that fit are {' or '.join(fits) or f'1 sequence of {cache.longest(1)} tokens'}"
    )


def _shape(tensor: TensorSpec, sizes: dict[str, tuple[int, int, int]], which: int) -> tuple[int, ...]:
    return tuple(sizes[d][which] if isinstance(d, str) else d for d in tensor.dims)
