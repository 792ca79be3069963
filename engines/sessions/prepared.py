"""Graphs for the compiled operators: made of the traced ones at load, or kept in a bundle that is served."""

from __future__ import annotations

from deepseek_trt.export.bundle.folder import Bundle

_AGAIN = "write the repository again with deepseek-trt model-repository"


def fused_graph(bundle: Bundle, graph: str) -> tuple[bytes, list[str]]:
    """The graph for the compiled operators, and the names of the custom operators that none of them replaces."""
    if fused_name(graph) in bundle.files:
        return bundle.files.read(fused_name(graph), _AGAIN), []
    from deepseek_trt.plugins.cpu.fuse import fused_bytes  # needs onnx

    return fused_bytes(bundle.traced_bytes(graph))


def fused_name(graph: str) -> str:
    """Its name in a bundle that is to be loaded without the onnx package."""
    return f"{graph}.cpu.onnx"
