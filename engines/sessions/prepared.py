"""Decode for the compiled operators: made of the traced graph at load, or kept in a bundle that is served."""

from __future__ import annotations

from deepseek_trt.export.bundle.folder import Bundle

FUSED_DECODE = "decode.cpu.onnx"  # its name in a bundle that is to be loaded without the onnx package
_AGAIN = "write the repository again with deepseek-trt model-repository"


def fused_decode(bundle: Bundle) -> tuple[bytes, list[str]]:
    """Decode for the compiled operators, and the names of the custom operators that none of them replaces."""
    if FUSED_DECODE in bundle.files:
        return bundle.files.read(FUSED_DECODE, _AGAIN), []
    from deepseek_trt.plugins.cpu.fuse import fused_bytes  # needs onnx

    return fused_bytes(bundle.traced_bytes("decode"))
