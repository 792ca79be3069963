"""The custom ops in Triton, each beside its wrapper.

Importing this package does not import Triton: an op's module comes with its first call. On a machine with no GPU, call
`interpreter.enable()` before that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def _first_call_imports(module: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module(f"{__name__}.{module}").run(*args, **kwargs)

    return run


# Each takes what its op's reference in export.ops takes, and returns what that returns.
KERNEL_OPS: dict[str, Callable[..., Any]] = {
    "MlaPrefill": _first_call_imports("mla_prefill"),
    "MlaDecode": _first_call_imports("mla_decode"),
    "MoeRouter": _first_call_imports("moe_router"),
    "MoeBiasedRouter": _first_call_imports("moe_biased_router"),
    "MoeExperts": _first_call_imports("moe_experts"),
    "LinearNarrow": _first_call_imports("narrow.linear"),
    "MoeExpertsNarrow": _first_call_imports("narrow.experts"),
    "MlaPrefillNarrow": _first_call_imports("cache.prefill"),
    "MlaDecodeNarrow": _first_call_imports("cache.decode"),
}
# Likewise, of those in plugins.fused.
FUSED_KERNEL_OPS: dict[str, Callable[..., Any]] = {
    "MlaQuery": _first_call_imports("absorbed.query"),
    "MlaValue": _first_call_imports("absorbed.value"),
    "MoeLayer": _first_call_imports("moe.layer"),
}
