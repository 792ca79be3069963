"""Graphs as ONNX Runtime computes them: made of the exported ones at load, or kept beside a bundle that is served."""

from __future__ import annotations

from pathlib import Path

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.dtypes import computed_in


def widened_graph(bundle: Bundle, graph: str) -> Path | bytes:
    """The exported graph; that of a bfloat16 bundle computes in float32."""
    exported, kept = bundle.graph_path(graph), widened_path(bundle, graph)
    if computed_in(bundle.manifest.dtype) == bundle.manifest.dtype:
        return exported
    if kept.is_file():
        return kept
    from deepseek_trt.export.passes.widen import widened_bytes  # needs onnx

    return widened_bytes(exported)


def fused_decode(bundle: Bundle) -> tuple[Path | bytes, list[str]]:
    """Decode for the compiled operators, and the names of the custom operators that none of them replaces."""
    if fused_path(bundle).is_file():
        return fused_path(bundle), []
    from deepseek_trt.plugins.cpu.fuse import fused_bytes  # needs onnx

    return fused_bytes(bundle.graph_path("decode"))


def fused_path(bundle: Bundle) -> Path:
    """Where a bundle that is to be loaded without the onnx package keeps decode for the compiled operators."""
    return bundle.path / "decode.cpu.onnx"


def widened_path(bundle: Bundle, graph: str) -> Path:
    """Where a bundle that is to be loaded without the onnx package keeps the graph that computes in float32."""
    return bundle.path / f"{graph}.float32.onnx"
