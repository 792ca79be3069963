"""Are the bundle's weights those that export wrote, and numbers at all? The reference reads the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deepseek_trt.export.arrays import Array
from deepseek_trt.export.bundle.assemble import chunks
from deepseek_trt.export.bundle.folder import MANIFEST_FILE, WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.narrow import FORMATS, PUBLISHED, Format
from deepseek_trt.export.bundle.recipes import Recipe
from deepseek_trt.export.bundle.weights import WeightReader, unchanged_checkpoint
from deepseek_trt.export.files import CHUNK, file_sha256
from deepseek_trt.export.numbers import Numbers, Tally, look, may_be_zero, sizes_of
from deepseek_trt.export.reading.checkpoint import Checkpoint


@dataclass(frozen=True)
class OddWeight:
    """A tensor with NaN or infinities, of zeros alone, or a matrix of one number: the bundle's, or by reference the
    checkpoint's. `off` is how far a narrow one lies from what the checkpoint holds, relative to it, where that is too
    far.
    """

    name: str
    nonfinite: int
    is_zero: bool
    is_constant: bool = False
    off: float = 0.0

    @property
    def sentence(self) -> str:
        if self.off:
            return (
                f"weight {self.name} is not the checkpoint's in a narrow format: it is {self.off:.2g} of its size off"
            )
        if self.is_zero:
            return f"weight {self.name} holds zeros alone"
        if self.is_constant:
            return f"weight {self.name} holds one number throughout"
        return f"weight {self.name} holds {self.nonfinite} numbers that are NaN or infinite"


@dataclass(frozen=True)
class Integrity:
    """`changed_weights` are tensors whose sha256 is not the manifest's; `changed_files` are other files. `odd_weights`
    are no weights of a trained model.

    `sha256` holds every file that the bundle lists by its path in it, plans and their plugin library among them;
    `checkpoint_sha256` the checkpoint's parts that are still as export found them.
    """

    checked_weights: int
    changed_weights: tuple[str, ...]
    changed_files: tuple[str, ...]
    sha256: dict[str, str]
    checkpoint_sha256: dict[str, str] = field(default_factory=dict)
    odd_weights: tuple[OddWeight, ...] = ()

    @property
    def passed(self) -> bool:
        """Changed weights fail: reference and candidate would agree on wrong ones. A changed graph is judged by what
        it computes.
        """
        return not self.changed_weights and not self.odd_weights


def check_integrity(bundle: Bundle) -> Integrity:
    """Hash every file and, where the bundle holds them, every weight. A by-reference bundle checks its own sources."""
    files = {name: file_sha256(path) for name, path in sorted(listed_files(bundle).items())}
    recorded = {**bundle.manifest.files, **bundle.manifest.added}
    changed_files = tuple(name for name, digest in recorded.items() if files.get(name) != digest)
    expected = {w.recipe.name: w.sha256 for w in bundle.manifest.weights if w.sha256 is not None}
    checkpoint = {path.name: file_sha256(path) for path in unchanged_parts(bundle)}
    if not bundle.manifest.by_reference and WEIGHTS_FILE not in files:
        return Integrity(0, (), changed_files, files, checkpoint)
    odd = odd_weights(bundle)
    if bundle.manifest.by_reference:
        return Integrity(0, (), changed_files, files, checkpoint, odd)
    reader = WeightReader(bundle)
    changed = tuple(name for name, digest in expected.items() if reader.sha256(name) != digest)
    return Integrity(len(expected), changed, changed_files, files, checkpoint, odd)


def odd_weights(bundle: Bundle, wanted: Callable[[str], bool] = lambda name: True) -> tuple[OddWeight, ...]:
    """Look at every number of the graph tensors that are `wanted`, in bounded memory."""
    look_at = _in_checkpoint if bundle.manifest.by_reference else _in_bundle
    return tuple(odd for odd in look_at(bundle, wanted) if odd.nonfinite or odd.is_zero or odd.is_constant)


def _in_bundle(bundle: Bundle, wanted: Callable[[str], bool]) -> Iterator[OddWeight]:
    reader = WeightReader(bundle)
    for name in filter(wanted, reader.records):
        recipe = reader.records[name].recipe
        if recipe.narrow is not None and not recipe.is_scales:
            kind = FORMATS[recipe.narrow.format]
            if kind.is_blocks:
                yield _odd_fp8(name, reader.view(name))
                continue
            least = -128 if recipe.narrow.method == PUBLISHED else kind.least  # others' codes reach further
            yield _odd_codes(name, reader.view(name), kind, least)
            continue
        flat = reader.view(name).reshape(-1)
        parts = [flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK)]
        seen, constant = [look(part) for part in parts], _Constant(recipe)
        for part in parts:
            constant.add(part)
        is_zero = not may_be_zero(name) and all(zero for _, zero in seen)
        yield OddWeight(name, sum(nonfinite for nonfinite, _ in seen), is_zero, constant.holds)


def _odd_codes(name: str, codes: Array, kind: Format, least: int) -> OddWeight:
    """Codes have no NaN; what their format does not have counts as such."""
    first = codes.reshape(-1)[0]
    constant = all(bool((rows == first).all()) for rows in codes)
    beyond = 0 if kind.packed > 1 else sum(int((rows < least).sum()) for rows in codes)
    return OddWeight(name, beyond, is_zero=constant and first in (0, 0x88), is_constant=constant)


def _odd_fp8(name: str, codes: Array) -> OddWeight:
    """Codes as bytes: NaN is all ones but for the sign, and zeros have a sign, too."""
    first, parts = codes.reshape(-1)[0], list(codes)
    nonfinite = sum(int(((rows & 0x7F) == 0x7F).sum()) for rows in parts)
    is_zero = not any((rows & 0x7F).any() for rows in parts)
    return OddWeight(name, nonfinite, is_zero, is_constant=all(bool((rows == first).all()) for rows in parts))


def _in_checkpoint(bundle: Bundle, wanted: Callable[[str], bool]) -> Iterator[OddWeight]:
    tensors = Checkpoint.open(unchanged_checkpoint(bundle)).tensors
    recipes = [w.recipe for w in bundle.manifest.weights if wanted(w.recipe.name)]
    sizes, found = sizes_of(recipes, tensors), dict[str, Numbers]()
    for recipe in recipes:
        tally, constant = Tally(recipe, tensors), _Constant(recipe)
        for chunk in chunks(recipe, tensors):
            tally.add(chunk)
            constant.add(chunk)
        if constant.holds and not tally.odd:
            yield OddWeight(recipe.name, 0, is_zero=False, is_constant=True)
        for numbers in tally.odd:
            found[numbers.source] = found.get(numbers.source, Numbers(numbers.source)) + numbers
    for name, numbers in found.items():
        yield OddWeight(name, numbers.nonfinite, numbers.zeros == sizes[name] and not may_be_zero(name))


class _Constant:
    """Whether a matrix holds one number throughout, as far as its chunks were seen; norms may be ones."""

    def __init__(self, recipe: Recipe) -> None:
        self.holds = len(recipe.shape) > 1 and recipe.size > 1 and not recipe.is_scales
        self._first: Array | None = None

    def add(self, chunk: Array) -> None:
        if self.holds and chunk.size:
            self._first = chunk[:1] if self._first is None else self._first
            few = chunk[:256]  # almost always enough to tell
            self.holds = bool((few == self._first).all() and (chunk == self._first).all())


def unchanged_parts(bundle: Bundle) -> list[Path]:
    """The checkpoint's files that export read, as far as they are there and have its size and time."""
    found = []
    for source in bundle.manifest.sources:
        path = Path(bundle.manifest.checkpoint) / source.name
        stat = path.stat() if path.is_file() else None
        if stat is not None and (stat.st_size, stat.st_mtime_ns) == (source.size, source.mtime_ns):
            found.append(path)
    return found


def listed_files(bundle: Bundle) -> dict[str, Path]:
    """What the manifest lists, the weights and the manifest itself, by their path in the bundle."""
    names = (MANIFEST_FILE, WEIGHTS_FILE, *bundle.manifest.files, *bundle.manifest.added)
    return {name: bundle.path / name for name in names if (bundle.path / name).is_file()}
