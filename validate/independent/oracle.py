"""Oracle: Hugging Face's model of the checkpoint. Nothing of this project reads its config.json or its tensors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_trt.export.arrays import Floats
from deepseek_trt.export.bundle.folder import AdapterRecord, Bundle
from deepseek_trt.export.bundle.interface import CLASSIFICATION, FEATURES, GENERATION
from deepseek_trt.export.bundle.recipes import CORRECTION_BIAS
from deepseek_trt.export.bundle.weights import unchanged_checkpoint
from deepseek_trt.export.errors import BackendError, BundleError
from deepseek_trt.export.files import file_sha256
from deepseek_trt.export.free_memory import available_memory
from deepseek_trt.validate.independent.differences import known_differences
from deepseek_trt.validate.threads import torch_threads

MINIMUM = (5, 15)  # earlier versions leave out YaRN's factor on the softmax scale
# To run it unasked: loading float32 weights and computing some hundred tokens then takes about five minutes at most.
MOST_PARAMETERS = 20e9
_SILENT = 50  # logging.CRITICAL
_OVERHEAD, _ROOM = 1.2, 2**29  # of the weights in float32 while they are loaded, and bytes for what is computed
_CLASSES = {
    GENERATION: "AutoModelForCausalLM",
    FEATURES: "AutoModel",
    CLASSIFICATION: "AutoModelForSequenceClassification",
}
OUTPUTS = {GENERATION: "logits", FEATURES: "last_hidden_state", CLASSIFICATION: "logits"}  # what is compared


def why_not_transformers() -> str:
    """Why transformers cannot be a reference here; nothing where it can. Does not import it."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return "transformers is not installed: pip install 'transformers>=5.15'"
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        return f"transformers {version} computes YaRN models wrongly: use 5.15 or later"
    return ""


def why_not(bundle: Bundle, checkpoint: Path | None, is_asked_for: bool) -> str:
    """Why the checkpoint (None: the one that was exported) cannot be compared; nothing where it can.

    Known before anything is loaded.
    """
    manifest = bundle.manifest
    if manifest.interface.inputs_embeds:
        return "the graphs take embeddings, not tokens"
    if manifest.quantization is not None and manifest.quantization.is_packed:
        return f"the checkpoint is packed ({manifest.quantization.name}), and transformers has no experts of codes"
    without = why_not_transformers()
    if without:
        return without
    try:
        folder = checkpoint or unchanged_checkpoint(bundle)
    except BundleError as error:
        return str(error)
    if manifest.adapter is not None and (without := _why_not_merged(manifest.adapter, manifest.dtype)):
        return without
    differences = known_differences(_config(folder))
    if differences:
        version = importlib.metadata.version("transformers")
        return f"transformers {version} does not compute {', '.join(differences)} as the original model"
    return _too_large(manifest.parameters, is_asked_for)


def _why_not_merged(adapter: AdapterRecord, dtype: str) -> str:
    if dtype != "float32":
        return (
            f"a merged adapter is rounded to {dtype} after sums in another order; an export with --dtype float32 can be"
        )
    if importlib.util.find_spec("peft") is None:
        return "the bundle has a merged adapter, and peft is not installed: pip install peft"
    files = {Path(adapter.path) / name: digest for name, digest in adapter.files.items()}
    if not all(file.is_file() and file_sha256(file) == digest for file, digest in files.items()):
        return f"the merged adapter in {adapter.path} is gone or has changed"
    return ""


def _too_large(parameters: int, is_asked_for: bool) -> str:
    needed, free = _OVERHEAD * 4 * parameters + _ROOM, available_memory()
    if needed > free:
        return f"{parameters:,} parameters in float32 need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if parameters > MOST_PARAMETERS and not is_asked_for:
        return f"{parameters:,} parameters take transformers longer than some minutes; --independent runs it"
    return ""


def _config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # transformers says what is wrong
    return raw if isinstance(raw, dict) else {}


class Oracle:
    """The model in float32, with weights rounded to the bundle's dtype first, as export rounds them.

    Raises BackendError where transformers cannot load it, or loads other tensors than the bundle is made of.
    """

    def __init__(self, bundle: Bundle, checkpoint: Path | None) -> None:
        import torch
        import transformers

        self.name = f"transformers {transformers.__version__}"
        self._torch, self._task = torch, bundle.manifest.task
        self._parameters = bundle.manifest.parameters
        folder = checkpoint or unchanged_checkpoint(bundle)
        with self._ours():
            self._model, info = _load(folder, self._task, bundle.manifest.model.num_hidden_layers)
            if bundle.manifest.adapter is not None:
                self._model = _merged(self._model, Path(bundle.manifest.adapter.path), folder)
        self._check(bundle, info)
        _round(self._model, getattr(torch, bundle.manifest.dtype))

    def rows(self, tokens: Sequence[int]) -> Floats:
        """What the model gives at each of these tokens, which are one sequence: [tokens, width]."""
        ids = self._torch.tensor([list(tokens)])
        with self._ours(), self._torch.inference_mode():
            if self._task == CLASSIFICATION:
                found = self._model.score(self._model.model(ids, use_cache=False).last_hidden_state)
            else:
                found = getattr(self._model(ids, use_cache=False), OUTPUTS[self._task])
        rows: Floats = found[0].float().numpy()
        return rows

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """Quiet, and whatever transformers raises is a BackendError with its first line."""
        with torch_threads(self._parameters), _quiet():
            try:
                yield
            except Exception as error:
                reason = next(iter(str(error).splitlines()), "")[:300]
                what = f"{type(error).__name__}: {reason}"
                raise BackendError(f"{self.name} cannot run the checkpoint ({what})") from None

    def _check(self, bundle: Bundle, info: dict[str, Any]) -> None:
        """What it misses it has drawn at random, and what it leaves out the bundle has."""
        missing = sorted(map(str, info["missing_keys"])) + sorted(map(str, info["mismatched_keys"]))
        if missing:
            raise BackendError(f"{self.name} does not find {len(missing)} of its tensors, e.g. {missing[0]}")
        used = {piece.source for w in bundle.manifest.main_weights for piece in w.recipe.pieces}
        left_out = sorted(used & set(info["unexpected_keys"]))
        if left_out:
            raise BackendError(f"{self.name} leaves out {len(left_out)} tensors, e.g. {left_out[0]}")


def _load(folder: Path, task: str, layers: int) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    kind = getattr(transformers, _CLASSES[task])
    config = _read_config(folder)
    config.num_hidden_layers = layers
    if isinstance(getattr(config, "quantization_config", None), dict):
        config.quantization_config["dequantize"] = True  # where there is a GPU it would round activations to fp8
    model, info = kind.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    return model.eval(), info


def _merged(model: Any, adapter: Path, folder: Path) -> Any:
    """By peft; an adapter in the model's own folder has been loaded by transformers itself."""
    import peft

    if adapter == folder.resolve():
        return model
    return peft.PeftModel.from_pretrained(model, adapter, local_files_only=True).merge_and_unload().eval()


def _read_config(folder: Path) -> Any:
    """By transformers' own reader; kimi_k2, which it does not know, is DeepSeek-V3 by its published class."""
    import transformers

    if _config(folder).get("model_type") == "kimi_k2":
        config: Any = transformers.DeepseekV3Config.from_pretrained(folder, local_files_only=True)
        config.model_type = "deepseek_v3"  # by which it knows how tensors are called
        return config
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _round(model: Any, dtype: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(CORRECTION_BIAS):
                parameter.copy_(parameter.to(dtype).float())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars, no log and no warnings of transformers while it works."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(_SILENT)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
