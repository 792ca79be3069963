"""Backend and sizes of a served model: what was asked for, within what the bundle and its plans allow."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.drafting.drafter import check_drafts
from deepseek_trt.engines.generation.pages import MIB, pages_needed, pages_within, sequence_pages
from deepseek_trt.engines.generation.speculation import OFF
from deepseek_trt.engines.plans.check import Limits, chunk_of, limits_of, read_plans
from deepseek_trt.engines.plans.plan import has_plan
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.sessions.opening import AUTO, Choice, choose_backend
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import RequestError

DEFAULT_CACHE_MIB = 1024
SERVED = (AUTO, "ort", "tensorrt")


@dataclass(frozen=True)
class SizeRequest:
    """What the user asked for; None where the bundle decides. `pages` and `cache_mib` are not given together.

    max_model_len None is the model's or the plans', or fewer tokens where the cache of `cache_mib` holds fewer.
    """

    backend: str = AUTO
    max_inflight: int = 64
    max_running: int = 32
    max_model_len: int | None = None
    pages: int | None = None
    cache_mib: int | None = None
    threads: int = 0
    prefix_reuse: bool = True
    generation_config: bool = True
    speculate: str = OFF


def settings_for(bundle: Bundle, request: SizeRequest) -> ServingSettings:
    """The settings of a generator. RequestError where it cannot be so: a cache too small for one sequence, e.g."""
    for name in ("max_inflight", "max_running"):
        if getattr(request, name) < 1:
            raise RequestError(f"{name} {getattr(request, name)}: must be at least 1")
    check_drafts(bundle, request.speculate)
    backend = serving_backend(bundle, request.backend).backend
    plans = limits_of(read_plans(bundle)) if backend == "tensorrt" else None
    running = min(request.max_running, request.max_inflight, plans.batch if plans else request.max_running)
    length = _model_len(bundle, request, plans)
    limits = SchedulerLimits().on(chunk_of(plans)) if plans else SchedulerLimits()
    return ServingSettings(
        backend=backend,
        max_inflight=request.max_inflight,
        max_running=running,
        max_model_len=length,
        pages=_pages(bundle, request, running, length, plans),
        prefill_chunk=int(limits.prefill_chunk),
        token_budget=max(limits.token_budget, running),
        threads=request.threads,
        prefix_reuse=request.prefix_reuse,
        generation_config=request.generation_config,
        speculate=request.speculate,
    )


def serving_backend(bundle: Bundle, wanted: str) -> Choice:
    """The backend `wanted`, and for auto that of `choose_backend`, as far as a server has it: plans or ONNX Runtime.

    RequestError for another one.
    """
    if wanted not in SERVED:
        raise RequestError(f"backend {wanted!r}: must be one of {', '.join(SERVED)}")
    choice = choose_backend(bundle, wanted) if wanted == AUTO else Choice(wanted, "it was asked for")
    if choice.backend == "tensorrt":
        return choice
    planned = wanted == AUTO and all(has_plan(bundle, graph.name) for graph in bundle.manifest.graphs)
    return Choice("ort", f"{choice.why} (for its plans, give --backend tensorrt)" if planned else choice.why)


def _model_len(bundle: Bundle, request: SizeRequest, plans: Limits | None) -> int:
    longest, reason = bundle.manifest.model.max_position_embeddings, "the model's"
    if plans and plans.table * bundle.manifest.cache.page_size < longest:
        longest, reason = plans.table * bundle.manifest.cache.page_size, "the plans'"
    if request.max_model_len is not None and not 2 <= request.max_model_len <= longest:
        raise RequestError(f"max_model_len {request.max_model_len}: must lie between 2 and {reason} {longest}")
    if request.max_model_len is not None or request.pages is not None:
        return request.max_model_len or longest
    held = (_room(bundle, request, plans) - 1) * bundle.manifest.cache.page_size + 1  # the last token is never cached
    return min(longest, held) if held > 1 else longest


def _room(bundle: Bundle, request: SizeRequest, plans: Limits | None) -> int:
    """Pages that cache_mib holds and the plans take."""
    pages = pages_within(bundle.manifest.cache, request.cache_mib or DEFAULT_CACHE_MIB)
    return min(pages, plans.pages) if plans else pages


def _pages(bundle: Bundle, request: SizeRequest, running: int, length: int, plans: Limits | None) -> int:
    """Pages of the pool: as asked, else for `running` sequences of full length as far as cache_mib holds them."""
    cache = bundle.manifest.cache
    each = sequence_pages(cache, length)
    pages = request.pages
    if pages is None:
        pages = min(pages_needed(cache, [length] * running), _room(bundle, request, plans))
    if pages < 1 + each:
        mib = -(-(1 + each) * cache.page_size * cache.bytes_per_token // MIB)
        raise RequestError(
            f"a cache of {pages} pages does not hold one sequence of {length} tokens, which takes {each} and the "
            f"scratch page: give --cache-mib {mib}, --pages {1 + each}, or a smaller --max-model-len"
        )
    if plans and pages > plans.pages:
        raise RequestError(f"pages {pages}: the plans take at most {plans.pages}; build with larger sizes")
    return pages
