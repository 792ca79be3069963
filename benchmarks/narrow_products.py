"""A feed-forward layer half with narrow weights beside the same with whole ones, in the compiled CPU operators.

    python benchmarks/narrow_products.py [--hidden 2048] [--inner 10944] [--threads 1 2]

x + down(silu(gate(norm(x))) * up(norm(x))), by default as V2-Lite's first layer has it. Memory's speed is measured in
the same run, before each number of threads: a share of it is what the weights' bytes take of that speed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from cpu_point import measure
from cpu_stream import gigabytes_a_second, read_in
from moe_forms import register
from onnx import TensorProto, helper

from deepseek_trt.plugins.cpu.operators import CPU_DOMAIN, FEED_FORWARD, PREFILL_FEED_FORWARD, Operator

GROUP, BLOCK = 32, 128
Tensors = dict[str, ort.OrtValue]


def whole(rng: np.random.Generator, name: str, rows: int, columns: int) -> Tensors:
    numbers = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)
    return {name: ort.OrtValue.ortvalue_from_numpy(numbers)}


def bfloat16(rng: np.random.Generator, name: str, rows: int, columns: int) -> Tensors:
    numbers = whole(rng, name, rows, columns)[name].numpy()
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return {name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)}


def narrow(codes: npt.DTypeLike, bits: int, rng: np.random.Generator, name: str, rows: int, columns: int) -> Tensors:
    made = rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)
    size = 2.0 ** (1 - bits) * 1.7 / columns**0.5
    scales = np.full((rows, columns // GROUP), size, np.float16)
    arrays = {name: made.view(codes), f"{name}_scale": scales}
    return {n: ort.OrtValue.ortvalue_from_numpy(array) for n, array in arrays.items()}


def fp8(rng: np.random.Generator, name: str, rows: int, columns: int) -> Tensors:
    codes = rng.integers(0, 0x78, (rows, columns), dtype=np.uint8) | (
        rng.integers(0, 2, (rows, columns), np.uint8) << 7
    )
    scales = np.full((-(-rows // BLOCK), -(-columns // BLOCK)), 1 / 60 / columns**0.5, np.float32)
    return {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in {name: codes, f"{name}_scale": scales}.items()}


FORMS: Mapping[str, Callable[..., Tensors]] = {
    "float32": whole,
    "bfloat16": bfloat16,
    "int8": functools.partial(narrow, np.int8, 8),
    "int4": functools.partial(narrow, np.uint8, 4),
    "fp8": fp8,
}


def weights_of(form: str, hidden: int, inner: int) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {"shared_gate": (inner, hidden), "shared_up": (inner, hidden), "shared_down": (hidden, inner)}
    made: Tensors = {}
    for name, (rows, columns) in shapes.items():
        made |= FORMS[form](rng, name, rows, columns)
    return made


def session_of(operator: Operator, given: Tensors, threads: int) -> ort.InferenceSession:
    """One node with these inputs."""
    inputs = [helper.make_tensor_value_info(name, value.element_type(), None) for name, value in given.items()]
    attributes = operator.ordered({"eps": 1e-6, "shared": 1, "bias": 0, "experts": 0, "biased": 0, "activation": 0})
    node = helper.make_node(operator.name, list(given), ["y"], domain=CPU_DOMAIN, **attributes)
    graph = helper.make_graph([node], "half", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CPU_DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    register(options, threads)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options)


def milliseconds(operator: Operator, weights: Tensors, tokens: int, threads: int, seconds: float) -> float:
    hidden = weights["norm_weight"].shape()[0]
    x = np.random.default_rng(1).standard_normal((tokens, hidden), dtype=np.float32)
    first = {"x": x, "sequence_lengths": np.array([tokens], np.int32)}
    given = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in first.items() if n in {i.name for i in operator.inputs}}
    given |= weights
    session = session_of(operator, given, threads)
    return statistics.median(measure(lambda: session.run_with_ort_values(["y"], given), seconds))


def row(form: str, hidden: int, inner: int, threads: int, memory: float, seconds: float) -> list[str]:
    made = weights_of(form, hidden, inner)
    size = sum(value.tensor_size_in_bytes() for value in made.values())
    made = {"norm_weight": ort.OrtValue.ortvalue_from_numpy(np.ones(hidden, np.float32)), **made}
    one, eight = (milliseconds(FEED_FORWARD, made, tokens, threads, seconds) for tokens in (1, 8))
    many = milliseconds(PREFILL_FEED_FORWARD, made, 128, threads, seconds)
    speed = size / 1e6 / one
    return [form, f"{size / 1e6:.0f}", f"{one:.2f}", f"{speed / memory:.0%}", f"{eight:.2f}", f"{many:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=10944)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.5, help="for each form and number of tokens")
    args = parser.parse_args()
    for threads in args.threads:
        memory = gigabytes_a_second(statistics.median(measure(read_in(threads), args.seconds)))
        print(f"\n{threads} thread{'s' * (threads > 1)}, [{args.inner}, {args.hidden}], memory {memory:.1f} GB/s\n")
        print("| weights | MB | 1 token, ms | of memory's speed | 8 tokens, ms | 128 tokens (prefill), ms |")
        print("|---" * 6 + "|")
        for form in FORMS:
            print(
                "| " + " | ".join(row(form, args.hidden, args.inner, threads, memory, args.seconds)) + " |", flush=True
            )


if __name__ == "__main__":
    main()
