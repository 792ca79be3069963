"""What only a GPU can show. Every test here has the marker gpu and is skipped, with the reason, where there is none."""

from __future__ import annotations

import ctypes
import functools
import importlib
from pathlib import Path

import pytest
import torch

from deepseek_trt.engines.plans.flavour import open_flavour
from deepseek_trt.engines.sessions.tensorrt.cuda import open_device
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BackendError, BuildError
from deepseek_trt.plugins.aot.compile import FALLBACK_TILES_SM, compile_all

HERE = Path(__file__).parent
MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V2_LITE = {
    **MLA,
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "topk_method": "greedy",
}
V2 = {
    **MLA,
    "hidden_size": 5120,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 128,
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}
MODELS = {"v2-lite": V2_LITE, "v2": V2}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def gpu():
    """The SM version of the GPU; torch must see it too."""
    try:
        device = open_device()
    except BackendError as error:
        pytest.skip(str(error))
    sm, name = device.sm, device.name
    device.close()
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} does not see {name}: install torch's CUDA build")
    return sm


@pytest.fixture(scope="session")
def config_of(gpu):
    """The named model's config, its layers apart: their number changes no kernel."""
    return lambda model: ModelConfig.from_hf({"model_type": "deepseek_v2", "num_hidden_layers": 2, **MODELS[model]})


class CompiledKernel:
    """Ahead-of-time binaries in place of a Triton kernel: called as that is, launched as the plugins do."""

    def __init__(self, driver, binaries, device):
        self.driver, self.binaries, self.device = driver, binaries, device
        self.launches = 0
        self._functions = {}

    def __getitem__(self, grid):
        return functools.partial(self._launch, (*grid, 1, 1)[:3])

    def _launch(self, grid, *args, num_warps=4, num_stages=2, **constants):
        binary = next((b for b in self.binaries if dict(b.variant.constexprs) == constants), None)
        assert binary is not None, f"no binary has {constants}"
        kinds = [arg.type for arg in binary.variant.args]
        values = [value_of(kind, arg) for kind, arg in zip(kinds, args, strict=True)]
        values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # Triton's scratch pointers
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch.cuda.current_stream().cuda_stream
        block, shared = (binary.threads, 1, 1), binary.shared_bytes
        call(
            self.driver,
            "cuLaunchKernel",
            self._load(binary),
            *grid,
            *block,
            shared,
            stream,
            ctypes.addressof(pointers),
            0,
        )
        self.launches += 1

    def _load(self, binary):
        """The function, its module loaded once and never unloaded."""
        if binary.sha256 not in self._functions:
            module = call(self.driver, "cuModuleLoadData", binary.image + b"\0")
            function = call(self.driver, "cuModuleGetFunction", module, binary.entry.encode())
            limit = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            if binary.shared_bytes > 48 * 1024:
                call(self.driver, "cuFuncSetAttribute", function, limit, binary.shared_bytes)
            self._functions[binary.sha256] = function
        return self._functions[binary.sha256]


def value_of(kind, argument):
    if kind.startswith("*"):
        assert argument.is_cuda
        assert argument.is_contiguous()
        assert argument.data_ptr() % 16 == 0
        return ctypes.c_uint64(argument.data_ptr())
    return {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}[kind](argument)


def call(driver, name, *arguments):
    error, *found = getattr(driver, name)(*arguments)
    assert error == driver.CUresult.CUDA_SUCCESS, f"{name}: {error}"
    return found[0] if found else None


@pytest.fixture(scope="session")
def compiled(gpu):
    """Binaries of a config and dtype for this GPU, and the PTX fallback; once for the same arguments."""

    @functools.cache
    def compile_for(config, dtype, as_ptx):
        binaries = compile_all(config, dtype, [] if as_ptx else [gpu], jobs=4, fallback=as_ptx)
        return [b for b in binaries if b.is_ptx == as_ptx]

    return compile_for


@pytest.fixture(params=["triton", "cubin", "ptx"])
def use_kernels(request, gpu, compiled, monkeypatch):
    """use_kernels(config, dtype, op): the op's wrapper runs Triton's own compile, our cubins or our PTX fallback."""
    from cuda.bindings import driver

    from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS
    from deepseek_trt.plugins.kernels.interpreter import KERNEL_MODULES

    modules = [importlib.import_module(f"deepseek_trt.plugins.kernels.{name}") for name in KERNEL_MODULES]

    def use(config, dtype, op):
        if request.param == "triton":
            return
        as_ptx = request.param == "ptx"
        if not as_ptx and gpu not in SHARED_LIMITS:
            pytest.skip(f"no cubins are made for SM {gpu}; it runs the PTX fallback")
        binaries = [b for b in compiled(config, dtype, as_ptx) if b.variant.op == op]
        for kernel in {b.variant.kernel for b in binaries}:
            rows = [b for b in binaries if b.variant.kernel == kernel]
            home = next(m for m in modules if hasattr(m, kernel))
            monkeypatch.setattr(home, kernel, CompiledKernel(driver, rows, gpu))
        if as_ptx:
            for module in modules:
                monkeypatch.setattr(module, "chip_of", lambda tensor: FALLBACK_TILES_SM)

    return use


@pytest.fixture(params=["rtx", "tensorrt"], scope="session")
def flavour(request, gpu):
    """Both TensorRTs, as far as they are installed and build for this GPU."""
    try:
        found = open_flavour(request.param)
    except BuildError as error:
        pytest.skip(str(error))
    if found.targets_chips and f"SM{gpu}" not in found.trt.ComputeCapability.__members__:
        pytest.skip(f"{found.name} {found.version} does not build for SM {gpu}")
    return found
