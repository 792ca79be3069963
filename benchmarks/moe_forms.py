"""The forms that a mixture of experts can take in ONNX Runtime's CPU provider, measured on one layer half.

    python benchmarks/moe_forms.py [--threads 1 2]

Each form computes x + experts(norm(x)) with the same router and weights; the first is the reference of the errors.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

from deepseek_trt.export.ops import OPS
from deepseek_trt.export.ops.functions import attach_functions
from deepseek_trt.plugins.cpu.fuse import FuseForCpu
from deepseek_trt.plugins.cpu.halves import LENGTHS
from deepseek_trt.plugins.cpu.library import cpu_library

Arrays = dict[str, npt.NDArray[np.float32]]
ROUTER = {"n_group": 1, "topk_group": 1, "norm_topk_prob": 0, "routed_scaling_factor": 1.0}
LOOP = 'f = deepseek_trt.MoeExperts <activation = "silu"> (norm, weights, ids, gate, up, down)'
GATHER = """chosen_gate = Gather (gate, ids)
    chosen_up = Gather (up, ids)
    chosen_down = Gather (down, ids)
    axes = Constant <value_ints = [1, 3]> ()
    column = Unsqueeze (norm, axes)
    g = MatMul (chosen_gate, column)
    u = MatMul (chosen_up, column)
    s = Sigmoid (g)
    a = Mul (g, s)
    inner = Mul (a, u)
    outer = MatMul (chosen_down, inner)
    last = Constant <value_ints = [3]> ()
    rows = Squeeze (outer, last)
    one = Constant <value_ints = [1]> ()
    shares = Unsqueeze (weights, one)
    sum_3d = MatMul (shares, rows)
    f = Squeeze (sum_3d, one)"""
# It takes the softmax, the top-k and the sum itself. Gate and up rows alternate; with these numbers SwiGLU is
# silu(gate) * up, and weights that are not normalised would be scaled by one product more.
CONTRIB = """f = com.microsoft.MoE <k = {k}, normalize_routing_weights = 0, activation_type = "swiglu",
        swiglu_fusion = 1, activation_alpha = 1.0, activation_beta = 0.0> (norm, logits, gate_up, , down)"""
IF_START = """zero = Constant <value_float = 0.0> ()
    one = Constant <value_ints = [1]> ()
    nothing = Mul (logits, zero)
    ids_long = Cast <to = 7> (ids)
    all_shares = ScatterElements <axis = 1> (nothing, ids_long, weights)
    axis = Constant <value_ints = [0]> ()
    y0 = Mul (norm, zero)
"""
IF_EXPERT = """    id{e} = Constant <value_ints = [{e}]> ()
    share{e} = Gather <axis = 1> (all_shares, id{e})
    most{e} = ReduceMax <keepdims = 0> (share{e})
    hit{e} = Greater (most{e}, zero)
    y{n} = If (hit{e}) <then_branch = then{e} () => (float[T, H] t{e}) {{
        flat{e} = Squeeze (share{e}, one)
        found{e} = NonZero (flat{e})
        tokens{e} = Squeeze (found{e}, axis)
        x{e} = Gather (norm, tokens{e})
        part{e} = Gather (share{e}, tokens{e})
        g{e} = Gemm <transB = 1> (x{e}, gate{e})
        u{e} = Gemm <transB = 1> (x{e}, up{e})
        s{e} = Sigmoid (g{e})
        a{e} = Mul (g{e}, s{e})
        i{e} = Mul (a{e}, u{e})
        o{e} = Gemm <transB = 1> (i{e}, down{e})
        w{e} = Mul (o{e}, part{e})
        at{e} = Unsqueeze (tokens{e}, one)
        t{e} = ScatterND <reduction = "add"> (y{e}, at{e}, w{e})
    }}, else_branch = else{e} () => (float[T, H] k{e}) {{ k{e} = Identity (y{e}) }}>
"""


@dataclass(frozen=True)
class Sizes:
    hidden: int
    inner: int
    experts: int
    top_k: int


def make_weights(s: Sizes) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {
        "router": (s.experts, s.hidden),
        "gate": (s.experts, s.inner, s.hidden),
        "up": (s.experts, s.inner, s.hidden),
        "down": (s.experts, s.hidden, s.inner),
    }
    weights = {name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05) for name, shape in shapes.items()}
    return {"norm_weight": np.ones(s.hidden, np.float32), **weights}


def routed(body: str, s: Sizes) -> str:
    routing = ", ".join(f"{name} = {value}" for name, value in {"top_k": s.top_k, **ROUTER}.items())
    return f"weights, ids = deepseek_trt.MoeRouter <{routing}> (logits)\n    {body}"


def model_of(body: str, weights: Arrays) -> onnx.ModelProto:
    text = f"""<ir_version: 11, opset_import: ["" : 23, "deepseek_trt" : 1, "com.microsoft" : 1]>
half (float[T, H] x) => (float[T, H] y) {{
    norm = RMSNormalization <axis = -1, epsilon = 1.0e-6> (x, norm_weight)
    logits = Gemm <alpha = 1.0, beta = 1.0, transA = 0, transB = 1> (norm, router)
    {body}
    y = Add (x, f)
}}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    model = ir.serde.deserialize_model(proto)
    attach_functions(model, OPS)
    return ir.to_proto(model)


def loop(weights: Arrays, s: Sizes) -> onnx.ModelProto:
    return model_of(routed(LOOP, s), weights)


def gather(weights: Arrays, s: Sizes) -> onnx.ModelProto:
    return model_of(routed(GATHER, s), weights)


def if_per_expert(weights: Arrays, s: Sizes) -> onnx.ModelProto:
    one_each = {f"{n}{e}": weights[n][e] for n in ("gate", "up", "down") for e in range(s.experts)}
    body = IF_START + "".join(IF_EXPERT.format(e=e, n=e + 1) for e in range(s.experts)) + f"f = Identity (y{s.experts})"
    few = {name: weights[name] for name in ("norm_weight", "router")}
    return model_of(routed(body, s), {**few, **one_each})


def contrib(weights: Arrays, s: Sizes) -> onnx.ModelProto:
    gate_up = np.stack([weights["gate"], weights["up"]], axis=2).reshape(s.experts, 2 * s.inner, s.hidden)
    few = {name: weights[name] for name in ("norm_weight", "router", "down")}
    model = model_of(CONTRIB.format(k=s.top_k), {**few, "gate_up": gate_up})
    # An output's memory is no other's: ONNX Runtime 1.31 would write f over norm, which the kernel clears unread.
    model.graph.output.append(onnx.helper.make_tensor_value_info("norm", onnx.TensorProto.FLOAT, ["T", s.hidden]))
    return model


def compiled(weights: Arrays, s: Sizes) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(loop(weights, s))
    lengths = ir.Value(name=LENGTHS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["B"]))
    model.graph.inputs.append(lengths)  # of all graphs with a cache: the operator computes real tokens alone
    fuse = FuseForCpu()
    fuse(model)
    assert fuse.fused == 1
    return ir.to_proto(model)


FORMS: dict[str, Callable[[Arrays, Sizes], onnx.ModelProto]] = {
    "Loop over the experts hit (exported)": loop,
    "If per expert": if_per_expert,
    "Gather, batched MatMul": gather,
    "com.microsoft.MoE": contrib,
    "compiled operator": compiled,
}


def session_of(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    register(options, threads)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def register(options: ort.SessionOptions, threads: int) -> None:
    """Let a session have the compiled operators, where there are any."""
    library = cpu_library().path
    if library is not None:
        options.register_custom_ops_library(str(library))
        ctypes.CDLL(str(library)).deepseek_trt_cpu_threads(threads)


def median_ms(run: Callable[[], Any], seconds: float) -> float:
    """Time as many runs as fit, at least five; each with other experts, so that caches hold no weights."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def run_fresh(session: ort.InferenceSession, rng: np.random.Generator, tokens: int, hidden: int) -> None:
    run_once(session, rng.standard_normal((tokens, hidden), dtype=np.float32))


def run_once(session: ort.InferenceSession, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """All tokens are real, and of one sequence."""
    fed = {"x": x, LENGTHS: np.array([len(x)], np.int32)}
    found: npt.NDArray[np.float32] = session.run(None, {i.name: fed[i.name] for i in session.get_inputs()})[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 128])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each form and number of tokens")
    for name, size in (("hidden", 512), ("inner", 256), ("experts", 32), ("top-k", 6)):
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    sizes = Sizes(args.hidden, args.inner, args.experts, args.top_k)
    for threads in args.threads:
        print(f"\n{threads} thread{'s' * (threads > 1)}, {sizes}\n")
        table(sizes, threads, args.tokens, args.seconds)


def table(sizes: Sizes, threads: int, tokens: list[int], seconds: float) -> None:
    weights, rng = make_weights(sizes), np.random.default_rng(1)
    inputs = {n: rng.standard_normal((n, sizes.hidden), dtype=np.float32) for n in tokens}
    wanted: dict[int, npt.NDArray[np.float32]] = {}
    print("| form | " + " | ".join(f"{n} token{'s' * (n > 1)}, ms" for n in tokens) + " | error |")
    print("|---" * (len(tokens) + 2) + "|")
    for name, form in FORMS.items():
        session, cells, error = session_of(form(weights, sizes), threads), [], 0.0
        for n, x in inputs.items():
            y = run_once(session, x)
            error = max(error, float(np.abs(y - wanted.setdefault(n, y)).max()))
            run = functools.partial(run_fresh, session, rng, n, sizes.hidden)
            cells.append(f"{median_ms(run, seconds):.2f}")
        print(f"| {name} | {' | '.join(cells)} | {error:.0e} |", flush=True)


if __name__ == "__main__":
    main()
