"""Decode for the compiled operators: made of the traced graph at load, or kept beside a bundle that is served."""

from __future__ import annotations

from pathlib import Path

from deepseek_trt.export.bundle.folder import Bundle


def fused_decode(bundle: Bundle) -> tuple[Path | bytes, list[str]]:
    """Decode for the compiled operators, and the names of the custom operators that none of them replaces."""
    if fused_path(bundle).is_file():
        return fused_path(bundle), []
    from deepseek_trt.plugins.cpu.fuse import fused_bytes  # needs onnx

    return fused_bytes(bundle.traced_path("decode"))


def fused_path(bundle: Bundle) -> Path:
    """Where a bundle that is to be loaded without the onnx package keeps decode for the compiled operators."""
    return bundle.path / "decode.cpu.onnx"
