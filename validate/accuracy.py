"""From a bundle to an AccuracyReport: every backend against torch in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.engines.backends import SessionRequest
from deepseek_trt.export.bundle import Bundle
from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate.backends import BACKENDS, make_reference
from deepseek_trt.validate.cases import (
    Script,
    Step,
    build_case,
    pages_of_case,
    seeded_tokens,
    text_tokens,
    tokens_of_case,
)
from deepseek_trt.validate.coverage import cover_experts
from deepseek_trt.validate.integrity import check_integrity
from deepseek_trt.validate.pair import Pair, rounding_floors, run_pair
from deepseek_trt.validate.probes import PLACES, ROUTING
from deepseek_trt.validate.provenance import collect_provenance
from deepseek_trt.validate.report import AccuracyReport, backend_report
from deepseek_trt.validate.undecided import set_aside

DEFAULT_TEXT = Path(__file__).parent / "default_text.txt"


@dataclass(frozen=True)
class ValidateRequest:
    """What to validate. `text` None takes the text that ships with the package; threads 0 lets backends choose."""

    bundle: Path
    backends: tuple[str, ...] = ("ort",)
    text: Path | None = None
    seed: int = 0
    bisect: bool = False
    threads: int = 0
    command: str = ""


@dataclass(frozen=True)
class Validation:
    """The report, and each backend's comparison as Polygraphy has it."""

    report: AccuracyReport
    pairs: tuple[Pair, ...]


def validate_bundle(request: ValidateRequest, progress: Callable[[str], None] = lambda text: None) -> Validation:
    """Compare every backend asked for with the reference.

    Raises BundleError, BackendError or RequestError; a bad result is no error, but `report.passed` False.
    """
    started = time.time()
    bundle = Bundle.open(request.bundle)
    progress("hashing the bundle")
    integrity = check_integrity(bundle)
    script, cases = build_script(bundle, request)
    session = SessionRequest(bundle, script.pages, request.threads)
    places = tuple(PLACES) if request.bisect else ("hidden", *ROUTING)
    backends = _in_order(request.backends)
    progress("loading torch in float32")
    reference = make_reference(session)
    script = cover_experts(reference, script, bundle.manifest.model, request.seed)
    pairs: dict[str, Pair] = {}
    floor: Pair | None = None
    for backend in backends:
        progress(f"comparing {backend} with torch in float32")
        pairs[backend] = run_pair(session, reference, backend, script, places)
        floor = pairs.get("torch", floor)
        if pairs[backend].dtype != "float32" and backend != "torch":
            if floor is None:
                progress("measuring the rounding floor: torch in the bundle's dtype")
                floor = run_pair(session, reference, "torch", script, places)
            pairs[backend] = set_aside(pairs[backend].judged_by(rounding_floors(floor)), bundle.manifest.model)
    reports = tuple(backend_report(pairs[name], script, bundle.manifest.model) for name in request.backends)
    provenance = collect_provenance(bundle, integrity, request.seed, request.command, started)
    report = AccuracyReport(
        passed=integrity.passed and all(r.passed for r in reports),
        model=bundle.manifest.model,
        dtype=bundle.manifest.dtype,
        changed_weights=integrity.changed_weights,
        changed_files=integrity.changed_files,
        cases=cases,
        reference=reference.note or f"{bundle.manifest.dtype} weights, computed in float32",
        backends=reports,
        provenance=provenance,
    )
    return Validation(report, tuple(pairs[name] for name in request.backends))


def build_script(bundle: Bundle, request: ValidateRequest) -> tuple[Script, dict[str, str]]:
    """The steps, and what each case was made of."""
    manifest = bundle.manifest
    lengths = tokens_of_case(manifest.cache.page_size)
    limit = manifest.model.max_position_embeddings
    if max(lengths) > limit:
        raise RequestError(f"sequences of {max(lengths)} tokens are needed, the model takes {limit}: use smaller pages")
    tokens = {"seeded": seeded_tokens(manifest.model.vocab_size, lengths, request.seed)}
    cases = {"seeded": f"tokens drawn evenly from the vocabulary, seed {request.seed}"}
    if bundle.tokenizer_path is not None:
        source = request.text or DEFAULT_TEXT
        tokens["text"] = text_tokens(_encode(bundle.tokenizer_path, source), lengths)
        cases["text"] = str(request.text) if request.text else f"{DEFAULT_TEXT.name}, which ships with the package"
    elif request.text is not None:
        raise RequestError(f"{bundle.path} has no tokenizer.json: leave out --text, or export it with one")
    steps: tuple[Step, ...] = ()
    for case, rows in tokens.items():
        steps += build_case(case, rows, manifest.cache, request.seed)
    return Script(steps, pages_of_case(manifest.cache)), cases


def _in_order(backends: Sequence[str]) -> list[str]:
    """Put torch first: it measures the rounding floor of the others."""
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise RequestError(f"backend {unknown[0]!r} is unknown; use: {', '.join(BACKENDS)}")
    return sorted(dict.fromkeys(backends), key=lambda name: name != "torch")


def _encode(tokenizer: Path, text: Path) -> list[int]:
    from tokenizers import Tokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{text} cannot be read ({error}): give a text file in UTF-8") from None
    ids: list[int] = Tokenizer.from_file(str(tokenizer)).encode(content).ids
    return ids
