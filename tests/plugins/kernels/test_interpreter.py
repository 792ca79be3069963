"""The mended interpreter: bfloat16 arithmetic, and its errors."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from deepseek_trt.export.errors import BackendError
from deepseek_trt.plugins.kernels import chips, interpreter


def test_bf16_rounds_like_torch():
    torch.manual_seed(0)
    halves = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.0e38, 3.4e38, 0.0, -0.0, 1e-40])
    values = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), halves, torch.tensor([torch.inf])])
    rounded = interpreter.floats_from_bf16(interpreter.bf16_from_floats(values.numpy()))
    np.testing.assert_array_equal(rounded, values.bfloat16().float().numpy())


def test_bf16_keeps_nan():
    bits = interpreter.bf16_from_floats(np.array([np.nan, -np.nan], dtype=np.float32))
    assert np.isnan(interpreter.floats_from_bf16(bits)).all()


def test_fused_multiply_add_rounds_once():
    from triton.language import float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    near = np.array([1 + 2**-12], dtype=np.float32)
    x, y = TensorHandle(near, float32), TensorHandle(-(near * near), float32)
    assert InterpreterBuilder().create_fma(x, x, y).data == [2.0**-24], "the part that the product's rounding dropped"


def test_too_late_is_said(monkeypatch):
    monkeypatch.setattr(interpreter, "_enabled", False)
    monkeypatch.setitem(sys.modules, "deepseek_trt.plugins.kernels.mla_decode", types.ModuleType("mla_decode"))
    with pytest.raises(BackendError, match=r"too late .*mla_decode.* fresh process"):
        interpreter.enable()


AFTER_TRITON = """
import triton.language  # as torch.compile and others do, with the interpreter off
from deepseek_trt.plugins.kernels import KERNEL_OPS, interpreter
interpreter.enable()
import torch
print(KERNEL_OPS["MoeRouter"](torch.tensor([[0.0, 2.0, 1.0]]), 2, 1, 1, 0, 1.0)[1].tolist())
"""


def test_triton_may_be_imported_before():
    """Triton's own functions, decorated for compilation by then, are interpreted all the same."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", AFTER_TRITON]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[[1, 2]]\n"


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(interpreter, "_enabled", False)
    with pytest.raises(BackendError, match=r"interpreter\.enable\(\)"):
        chips.chip_of(torch.empty(1))
