"""What only a GPU can show. Every test here has the marker gpu and is skipped, with the reason, where there is none."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch

from deepseek_trt.engines.plans.flavour import open_flavour
from deepseek_trt.engines.sessions.tensorrt.cuda import open_device
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BackendError, BuildError
from deepseek_trt.plugins.aot.compile import FALLBACK_TILES_SM, compile_all

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from gpu_check.launching import DriverExecutor, ShippedKernel  # noqa: E402  benchmarks are no package of the product
from gpu_check.models import raw_config  # noqa: E402
from gpu_check.shipped import ShippedBinary  # noqa: E402


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
    return lambda model: ModelConfig.from_hf(raw_config(model))


@pytest.fixture(scope="session")
def compiled(gpu):
    """Binaries of a config and dtype for this GPU, and the PTX fallback; once for the same arguments."""

    @functools.cache
    def compile_for(config, dtype, as_ptx):
        binaries = compile_all(config, dtype, [] if as_ptx else [gpu], jobs=4, fallback=as_ptx)
        return [b for b in binaries if b.is_ptx == as_ptx]

    return compile_for


def shipped(binary):
    """A compiled binary as one that was cut out of a library."""
    v = binary.variant
    own = {key: getattr(v, key) for key in ("op", "kernel", "dtype", "max_tokens")}
    same = {
        key: getattr(binary, key) for key in ("sm", "is_ptx", "entry", "shared_bytes", "threads", "sha256", "image")
    }
    return ShippedBinary(**own, **same, constants=dict(v.constexprs))


@pytest.fixture(params=["triton", "cubin", "ptx"])
def use_kernels(request, gpu, compiled, monkeypatch):
    """use_kernels(config, dtype, op): the op's wrapper runs Triton's own compile, our cubins or our PTX fallback."""
    from cuda.bindings import driver

    from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS
    from deepseek_trt.plugins.kernels.interpreter import KERNEL_MODULES

    execute = DriverExecutor(driver, lambda: torch.cuda.current_stream().cuda_stream)
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
            own = ShippedKernel(list(map(shipped, rows)), execute, [])
            for home in modules:  # where it is written, and where it is launched from
                if hasattr(home, kernel):
                    monkeypatch.setattr(home, kernel, own)
        if as_ptx:
            for module in modules:
                if hasattr(module, "chip_of"):
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
