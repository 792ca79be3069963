"""The part "engines": the demo model's engines, built and run here, against tokens that a CPU gave.

The expected tokens are transformers', which reads the checkpoint with code of its own (prepare.py). With each comes the
gap to the next best logit: where an engine takes another token, the gap must be one that rounding explains.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.items import Gpu, Item, NotRunError, Setting, each
from gpu_check.models import DEMO_DTYPES
from gpu_check.rows import Row

PART = "engines"
# Of a row of logits as a whole, against float32: some hundred roundings lie one after the other in five layers, so ten
# times the unit roundoff (bfloat16 2^-8), doubled, as a near tie in a router may fall the other way. float32 engines
# multiply in float32 but sum hundreds of terms in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 8e-2}
# The difference of two logits is off by about sqrt(2) of what one is: three times that, as the largest of many counts.
SPREAD = 3 * math.sqrt(2)
PAGES, BATCH, LENGTH = 65, 8, 512  # eight rows of 512 tokens, and the scratch page
SPEED_TOKENS = 128
FLAVOURS = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class Answer:
    """A prompt's tokens by the CPU; gaps and root mean squares of the logits that each was chosen from."""

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]
    rms: list[float]


@dataclass(frozen=True)
class Demo:
    """A bundle of the demo: its folder, its dtype, and the folder of the tokens that it is to give."""

    name: str
    dtype: str
    tokens: str


DEMOS = (
    *(Demo(dtype, dtype, "tokens") for dtype in DEMO_DTYPES),
    Demo("bfloat16-int4", "bfloat16", "tokens-bfloat16-int4"),
)


def items(setting: Setting, gpu: Gpu) -> list[Item]:
    """One a flavour of TensorRT and bundle."""
    for site in setting.prepared.sites:
        _add_site(site)
    answers = {demo: _answers(setting.prepared.demo / demo.tokens / "tokens.json") for demo in DEMOS}
    if not all(answers.values()):
        note = f"no demo in {setting.prepared.folder}: make it with scripts/gpu-check --prepare"
        return [Item("demo", lambda: [Row(PART, "demo", "FAILED", note)])]
    made = []
    for flavour in FLAVOURS:
        missing = _missing(flavour)
        for demo in DEMOS:
            what = f"demo {demo.name} {flavour}"
            if missing:
                made.append(Item(what, functools.partial(list, [Row(PART, what, "not run", missing)])))
            else:
                made.append(Item(what, functools.partial(_rows, what, flavour, demo, answers[demo], setting, gpu)))
    return made


def _answers(file: Path) -> list[Answer]:
    """Those of a tokens.json; none where it is not there."""
    if not file.is_file():
        return []
    return [Answer(**found) for found in json.loads(file.read_text(encoding="utf-8"))["answers"]]


def _add_site(site: Path) -> None:
    """What was brought along comes first, where it is for this Python."""
    mark = site / "python"
    if mark.is_file() and mark.read_text().split() == [f"{sys.version_info[0]}.{sys.version_info[1]}"]:
        sys.path.insert(0, str(site))


def _missing(flavour: str) -> str:
    try:
        trt = importlib.import_module(FLAVOURS[flavour])
    except ImportError as error:
        return f"{error}: neither on this machine nor brought along"
    return "" if hasattr(trt, "Builder") else f"{FLAVOURS[flavour]} is there without its libraries"


def _rows(what: str, flavour: str, demo: Demo, answers: Sequence[Answer], setting: Setting, gpu: Gpu) -> Iterator[Row]:
    """Build, tokens, tokens a second; what an engine that did not come about would show is not run."""
    from deepseek_trt.export.errors import BackendError

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        folder = Path(shutil.copytree(setting.prepared.demo / demo.name, Path(work) / "bundle"))
        opened: list[Any] = []
        foreign: list[int] = []

        def build() -> Row:
            start = time.perf_counter()
            note, is_for_it = _build(folder, flavour, gpu.sm)
            foreign.extend([] if is_for_it else [gpu.sm])
            return Row(PART, f"{what} build", "good", f"{time.perf_counter() - start:.1f} s; {note}")

        def session() -> Any:
            if not built:
                raise NotRunError("there is no engine")
            if not opened:
                try:
                    opened.append(_session(folder, setting.rehearsal))
                except BackendError as error:
                    if foreign:  # no fault: TensorRT-RTX never said that it would
                        raise NotRunError(str(error)) from None
                    raise
            return opened[0]

        built = False
        for row in each(PART, [(f"{what} build", build)], gpu.synchronize):
            built = row.result == "good"
            yield row
        works: list[tuple[str, Callable[[], Row]]] = [
            (f"{what} tokens", lambda: _tokens(f"{what} tokens", session(), demo.dtype, answers, setting.rehearsal))
        ]
        new_tokens = 4 if setting.rehearsal else SPEED_TOKENS
        for rows in (1, BATCH):
            name = f"{what} batch {rows}"
            works.append((name, functools.partial(_speed, name, session, rows, new_tokens)))
        yield from each(PART, works, gpu.synchronize)
        for each_session in opened:
            each_session[1].close()


def _build(folder: Path, flavour: str, sm: int) -> tuple[str, bool]:
    """Plans for this chip, what is to be said of them, and whether they are for it.

    Where TensorRT-RTX does not name the chip they are for SM 80, and TensorRT-RTX is asked if they run.
    """
    from deepseek_trt.engines.plans.build import build_with_library
    from deepseek_trt.engines.plans.flavour import open_flavour
    from deepseek_trt.engines.plans.plan import BuildSpec
    from deepseek_trt.export.bundle.folder import Bundle

    found, note = open_flavour(flavour), ""
    chips: tuple[int, ...] = ()
    if found.targets_chips:
        known = f"SM{sm}" in found.trt.ComputeCapability.__members__
        chips = (sm if known else 80,)
        note = "" if known else f"it does not name SM {sm}: plans are for SM 80; "
    spec = BuildSpec(flavour, chips, max_batch_size=BATCH, max_input_len=64, max_seq_len=LENGTH)
    library = folder / "plugins" / "libdeepseek_trt_plugins.so"
    plans = build_with_library(Bundle.open(folder), spec, library)
    plugins = {name: count for plan in plans for name, count in plan.record.plugins.items()}
    return f"{note}{found.name} {found.version}, plugin layers {plugins}", not note


def _session(folder: Path, rehearsal: bool) -> Any:
    """The engines on this GPU; torch on the CPU stands in where it is rehearsed."""
    from deepseek_trt.engines.sessions.tensorrt.session import TrtSession
    from deepseek_trt.engines.sessions.torch import TorchSession
    from deepseek_trt.export.bundle.folder import Bundle

    bundle = Bundle.open(folder)
    return (bundle, TorchSession(bundle, PAGES)) if rehearsal else (bundle, TrtSession(bundle, PAGES))


def generated(opened: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt, end tokens among them."""
    from deepseek_trt.engines.generation.llm import LLM
    from deepseek_trt.engines.generation.params import SamplingParams

    bundle, session = opened
    config = dataclasses.replace(bundle.manifest.model, eos_token_ids=())
    results = LLM(session, config).generate(list(prompts), SamplingParams(new_tokens))
    return [list(result.token_ids) for result in results]


def _tokens(what: str, opened: Any, dtype: str, answers: Sequence[Answer], rehearsal: bool) -> Row:
    count = 6 if rehearsal else len(answers[0].tokens)
    made = generated(opened, [answer.prompt for answer in answers], count)
    found = [compare(tokens, answer, TOLERANCE[dtype]) for tokens, answer in zip(made, answers, strict=True)]
    equal, asked = sum(one.equal for one in found), count * len(answers)
    wrong = [one.note for one in found if not one.explained]
    ties = [one.note for one in found if one.note and one.explained]
    note = f"{equal} of {asked} tokens are the CPU's before the first other one"
    note = "; ".join((note, *wrong, *ties, *(["torch on the CPU stands in"] if rehearsal else [])))
    return Row(PART, what, "FAILED" if wrong else "good", note)


@dataclass(frozen=True)
class Compared:
    """How many tokens were equal before the first other one, and whether rounding explains that one."""

    equal: int
    explained: bool
    note: str


def compare(tokens: Sequence[int], answer: Answer, tolerance: float) -> Compared:
    """`tokens` beside the CPU's. What follows a token that differs has another text before it, and is not compared."""
    for at, (own, theirs) in enumerate(zip(tokens, answer.tokens, strict=False)):
        if own != theirs:
            gap, allowed = answer.gaps[at], SPREAD * tolerance * answer.rms[at]
            note = f"token {at} is {own}, not {theirs}: the CPU's logits are {gap:.3g} apart, {allowed:.3g} is rounding"
            return Compared(at, gap <= allowed, note)
    return Compared(len(tokens), True, "")


def _speed(what: str, session: Callable[[], Any], rows: int, new_tokens: int) -> Row:
    """The second of two runs, prompts of 16 tokens included: the first captures the graphs."""
    opened = session()
    prompts = [[5 + row] * 16 for row in range(rows)]
    generated(opened, prompts, new_tokens)
    start = time.perf_counter()
    generated(opened, prompts, new_tokens)
    seconds = time.perf_counter() - start
    note = f"{new_tokens} tokens a row, prefill and sampling included: {opened[1].note}"
    return Row(PART, what, "good", note, {"tokens/s": rows * new_tokens / seconds})
