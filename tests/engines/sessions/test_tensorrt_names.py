"""The full TensorRT, absent here: its real Python bindings, over stand-in libraries, know every name that we use."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_trt.plugins.cxx import find_compiler

ROOT = Path(__file__).parents[3]
SOURCES = (
    "engines/plans/flavour.py",
    "engines/plans/build.py",
    "engines/plans/parse.py",
    "engines/sessions/tensorrt/session.py",
    "engines/sessions/tensorrt/engine.py",
    "plugins/tensorrt/loading.py",
)

# What the bindings need to load: functions that are never called here.
STAND_INS = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvonnxparser.so.11": (
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
}
# Methods and properties that the code calls on objects, by the class they belong to.
MEMBERS = {
    "Builder": (
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
        "build_serialized_network_to_stream",
    ),
    "IBuilderConfig": (
        "add_optimization_profile",
        "set_preview_feature",
        "set_flag",
        "clear_flag",
        "plugins_to_serialize",
        "progress_monitor",
    ),
    "IOptimizationProfile": ("set_shape",),
    "OnnxParser": ("set_flag", "parse", "parse_from_file", "num_errors", "get_error"),
    "ParserError": ("node_name", "node_operator", "desc"),
    "INetworkDefinition": ("num_layers", "get_layer", "num_inputs", "get_input", "num_outputs", "get_output"),
    "ILayer": ("type", "name"),
    "ITensor": ("name", "dtype", "shape"),
    "IPluginRegistry": ("load_library", "deregister_library"),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
    "IStreamWriter": ("write",),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "ICudaEngine": ("device_memory_size_v2", "create_runtime_config", "create_execution_context"),
    "IRuntimeConfig": ("set_execution_context_allocation_strategy",),
    "IExecutionContext": ("set_device_memory", "set_tensor_address", "set_input_shape", "execute_async_v3"),
}
# Asked for with hasattr before use: only one of the flavours has them.
GUARDED = (
    "ComputeCapability",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineValidity",
    "EngineInvalidityDiagnostics",
)


def names_used(source: str) -> set[str]:
    """Every trt.A and trt.A.B in a source, whatever object trt is held by."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            chain.append(node.id)
        chain.reverse()
        if "trt" in chain[:-1]:
            names.add(".".join(chain[chain.index("trt") + 1 :][:2]))
    return names


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Runs an expression over the bindings in a process of its own."""
    folder = tmp_path_factory.mktemp("stand_ins")
    compiler = find_compiler()
    for library, functions in STAND_INS.items():
        source = "\n".join(f'extern "C" void {name}() {{}}' for name in functions)
        (folder / "stand_in.cpp").write_text(source + "\n")
        flags = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{library}"]
        compiler.run([*flags, "stand_in.cpp", "-o", library], folder)

    def run(expression: str):
        code = (
            "import sys, json, tensorrt_bindings as trt\nsys.modules['tensorrt'] = trt\n"
            f"print(json.dumps({expression}))"
        )
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_every_name_that_we_use_is_there(ask):
    used = set().union(*(names_used((ROOT / s).read_text()) for s in SOURCES))
    used = {name for name in used if not name.startswith(GUARDED)}
    assert {"OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE", "PreviewFeature.ALIASED_PLUGIN_IO_10_03", "Builder"} <= used
    expression = (
        f"[n for n in {sorted(used)!r} if n not in ('__version__', '__name__') and "
        "not hasattr(trt, n) and not hasattr(getattr(trt, n.split('.')[0], None), n.split('.')[-1])]"
    )
    assert ask(expression) == []


def test_every_member_that_we_call_is_there(ask):
    pairs = [(owner, member) for owner, members in MEMBERS.items() for member in members]
    assert ask(f"[p for p in {pairs!r} if not hasattr(getattr(trt, p[0], None), p[1])]") == []


def test_the_adapter_takes_it(ask):
    call = "__import__('deepseek_trt.engines.plans.flavour', fromlist=['x']).open_flavour('tensorrt')"
    assert ask(f"{call}.targets_chips") is False
    assert isinstance(ask(f"{call}.network_flags()"), int)


def test_dtypes_that_a_record_may_name(ask):
    from deepseek_trt.engines.plans.parse import DTYPES

    assert ask(f"[n for n in {sorted(DTYPES)!r} if n not in trt.DataType.__members__]") == []
