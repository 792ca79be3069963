"""A bundle's weights for ONNX Runtime: mapped where they lie, copied to memory, or assembled; refused if too large."""

from __future__ import annotations

from deepseek_trt.engines.sessions.huge_pages import Progress, read_weights
from deepseek_trt.export.arrays import Arrays
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.proof import no_progress
from deepseek_trt.export.bundle.weights import WeightReader
from deepseek_trt.export.errors import BackendError
from deepseek_trt.export.free_memory import available_memory, too_much
from deepseek_trt.export.memory import generate_mapped

_COPIED = 0.5  # of the free memory, at most: the page cache keeps the file as well


def weights_fit(bundle: Bundle) -> bool:
    """Whether a copy of the weights takes less than half of the memory that is free."""
    reader = WeightReader(bundle)
    return sum(map(reader.nbytes, reader.records)) < _COPIED * available_memory()


def load_weights(bundle: Bundle, mapped: bool, progress: Progress = no_progress) -> Arrays:
    """Every tensor by name, each in memory once: those of the weights file are copied unless `mapped`.

    By reference, what lies in the checkpoint as it is gets mapped, and the rest assembled. Raises BackendError, before
    anything is read, where that does not fit.
    """
    reader = WeightReader(bundle)
    made = tuple(reader.records) if not (mapped or bundle.manifest.by_reference) else reader.assembled
    if bundle.manifest.by_reference:
        _check_assembled(bundle, sum(map(reader.nbytes, made)))
    views = {name: reader.view(name) for name in reader.records.keys() - set(made)}
    return views | (read_weights(reader, made, progress) if made else {})


def check_memory(needed: int, what: str, mend: str) -> None:
    """BackendError where `what` needs more bytes than can safely be had: it says how many, and `mend`."""
    refusal = too_much(needed)
    if refusal:
        raise BackendError(f"{what} {refusal}: {mend}")


def _check_assembled(bundle: Bundle, nbytes: int) -> None:
    manifest = bundle.manifest
    mapped = generate_mapped(
        manifest.model, manifest.dtype, [weight.recipe for weight in manifest.weights], manifest.interface.cache_dtype
    )
    check_memory(
        nbytes,
        f"{bundle.path} takes its weights by reference, and to assemble them (experts are stacked) takes",
        "export without --by-reference, as weights in a file of the bundle's own are mapped, and about "
        f"{mapped.anonymous / 1e9:,.2f} GB suffice; or take a machine with more memory",
    )
