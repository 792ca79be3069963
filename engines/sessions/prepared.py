"""Graphs for the compiled operators: made of the traced ones at load, or kept beside a bundle that is served."""

from __future__ import annotations

from pathlib import Path

from deepseek_trt.export.bundle.folder import Bundle


def fused_graph(bundle: Bundle, graph: str) -> tuple[Path | bytes, list[str]]:
    """The graph for the compiled operators, and the names of the custom operators that none of them replaces."""
    if fused_path(bundle, graph).is_file():
        return fused_path(bundle, graph), []
    from deepseek_trt.plugins.cpu.fuse import fused_bytes  # needs onnx

    return fused_bytes(bundle.traced_path(graph))


def fused_path(bundle: Bundle, graph: str) -> Path:
    """Where a bundle that is to be loaded without the onnx package keeps the graph for the compiled operators."""
    return bundle.path / f"{graph}.cpu.onnx"
