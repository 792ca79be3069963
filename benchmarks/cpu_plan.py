"""What cpu.py measures: its runners, and the tables that it prints, each with its points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cpu_point import Point

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True)
class Runner:
    """A script beside this one.

    title: in tables. environment: what it likes best. llama: whether llama.cpp's Python runs it. form: of its weights
    (EXPORTS, of llama.cpp its own name).
    """

    script: str
    title: str
    environment: dict[str, str] = field(default_factory=dict)
    llama: bool = False
    form: str = "float32"


def _llama(title: str, form: str) -> Runner:
    return Runner("cpu_llama.py", title, HUGE_PAGES, llama=True, form=form)


RUNNERS = {  # in the order in which they measure
    "stream": Runner("cpu_stream.py", "memory", HUGE_PAGES),
    "transformers": Runner("cpu_transformers.py", "transformers"),
    "llama-exact": Runner("cpu_llama.py", "llama.cpp exact", llama=True),
    "llama-fast": _llama("llama.cpp fastest", "float32"),
    "llama-q8_0": _llama("llama.cpp Q8_0", "q8_0"),
    "llama-q4_0": _llama("llama.cpp Q4_0", "q4_0"),
    "llama-q4_k_m": _llama("llama.cpp Q4_K_M", "q4_k_m"),
    "ours": Runner("cpu_ours.py", "deepseek-trt", HUGE_PAGES),
    "ours-int8": Runner("cpu_ours.py", "deepseek-trt int8", HUGE_PAGES, form="int8"),
    "ours-int4": Runner("cpu_ours.py", "deepseek-trt int4", HUGE_PAGES, form="int4"),
    "ours-all4": Runner("cpu_ours.py", "deepseek-trt int4 everywhere", HUGE_PAGES, form="int4-everywhere"),
}
# What `export` is told for each form of our weights. Narrow ones come with float16 for the rest and for the cache, as
# llama.cpp's fastest mode has its cache. A list is a file of rules.
INT4_EVERYWHERE = [{"pattern": "lm_head.weight", "format": "int8"}, {"pattern": "*", "format": "int4"}]
EXPORTS: dict[str, str | list[dict[str, str]] | None] = {
    "float32": None,
    "int8": "int8",
    "int4": "int4",
    "int4-everywhere": INT4_EVERYWHERE,
}
REFERENCE = "transformers"  # whose logits the others' are compared with; it fills caches in every table


@dataclass(frozen=True)
class Plan:
    """A table. pairs: runners whose times are divided, the peer first. contexts: of each batch, whose logits are
    kept.
    """

    runners: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    points: Callable[[int], Iterator[Point]]
    contexts: dict[int, list[int]]
    rounds: int


def _whole(threads: int) -> Iterator[Point]:
    yield from (Point("decode", 1, context, threads) for context in (128, 512, 2048, 8192))
    yield Point("decode", 8, 512, threads)
    yield Point("prefill", 1, 512, threads)


def _long(threads: int) -> Iterator[Point]:
    yield from (Point("prefill", 1, context, threads) for context in (2048, 8192))
    yield Point("beside", 4, 2048, threads)


def _narrow(threads: int) -> Iterator[Point]:
    yield from (Point("decode", 1, context, threads) for context in (128, 512, 2048))
    yield Point("decode", 8, 512, threads)
    yield Point("prefill", 1, 512, threads)
    yield Point("quality", 64, 32, threads)


PLANS = {
    "whole": Plan(
        ("stream", "transformers", "llama-exact", "llama-fast", "ours"),
        (("transformers", "ours"), ("llama-exact", "ours"), ("llama-fast", "ours")),
        _whole,
        {1: [128, 512, 2048, 8192], 8: [512]},
        rounds=3,
    ),
    "long": Plan(
        ("transformers", "ours"),
        (("transformers", "ours"),),
        _long,
        {1: [2048, 8192]},
        rounds=1,
    ),
    "narrow": Plan(
        ("stream", "llama-q8_0", "llama-q4_0", "llama-q4_k_m", "ours-int8", "ours-int4", "ours-all4"),
        (
            ("llama-q8_0", "ours-int8"),
            *((peer, own) for own in ("ours-int4", "ours-all4") for peer in ("llama-q4_0", "llama-q4_k_m")),
        ),
        _narrow,
        {1: [128, 512, 2048], 8: [512], 64: [32]},
        rounds=3,
    ),
}
