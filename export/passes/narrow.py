"""A graph pass: products with weights that an export narrows take codes and scales, and get bodies that widen them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.export.bundle.narrow import SCALE, Narrow
from deepseek_trt.export.bundle.recipes import Recipe
from deepseek_trt.export.dtypes import dtype_of
from deepseek_trt.export.ops.functions import function_from_spec
from deepseek_trt.export.ops.linear_narrow import LINEAR_NARROW
from deepseek_trt.export.ops.moe_experts import MOE_EXPERTS
from deepseek_trt.export.ops.moe_experts_narrow import MOE_EXPERTS_NARROW
from deepseek_trt.export.ops.spec import OpSpec

_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}


class NarrowWeights(ir.passes.InPlacePass):
    """Gemm becomes LinearNarrow (a bias is added after it), MoeExperts becomes MoeExpertsNarrow, by the `recipes`.

    The function of each format is an overload of its own, as one graph may hold several.
    """

    def __init__(self, recipes: Iterable[Recipe]) -> None:
        super().__init__()
        self._parts = {recipe.name: recipe for recipe in recipes if recipe.narrow is not None}
        self._counts: Counter[str] = Counter()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        codes = {name: r for name, r in self._parts.items() if not r.is_scales and name in graph.initializers}
        for recipe in codes.values():
            _become(graph.initializers[recipe.name], recipe)
            scales = ir.Value(name=f"{recipe.name}{SCALE}")
            _become(scales, self._parts[f"{recipe.name}{SCALE}"])
            graph.initializers[f"{recipe.name}{SCALE}"] = scales
        for node in list(graph):
            if any(value is not None and value.name in codes for value in node.inputs):
                self._replace(model, node, codes)
        if not any(node.op_identifier() == (DOMAIN, MOE_EXPERTS.name, "") for node in graph):
            model.functions.pop((DOMAIN, MOE_EXPERTS.name, ""), None)
        return ir.passes.PassResult(model, bool(codes))

    def _replace(self, model: ir.Model, node: ir.Node, codes: Mapping[str, Recipe]) -> None:
        (narrow,) = {_kind(codes[name]) for v in node.inputs if v is not None and (name := v.name or "") in codes}
        attributes: dict[str, str | int] = {"format": narrow[0], "group": narrow[1]}
        if (node.domain, node.op_type) == (DOMAIN, MOE_EXPERTS.name):
            inputs = list(node.inputs[:3])
            for stack in node.inputs[3:]:
                inputs += [stack, model.graph.initializers[f"{_name(stack)}{SCALE}"]]
            attributes = {"activation": node.attributes["activation"].as_string(), **attributes}
            self._put(model, node, MOE_EXPERTS_NARROW, inputs, attributes, None)
            return
        if node.op_type == "Transpose":
            self._replace_products(model, node, attributes)
            return
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        assert (node.domain, node.op_type) == ("", "Gemm"), node
        assert {**_GEMM, "transB": 0, **given} == _GEMM, node
        x, weight, *bias = node.inputs
        scales = model.graph.initializers[f"{_name(weight)}{SCALE}"]
        self._put(model, node, LINEAR_NARROW, [x, weight, scales], attributes, bias[0] if bias else None)

    def _replace_products(self, model: ir.Model, transposed: ir.Node, attributes: dict[str, str | int]) -> None:
        """MatMul of tokens [B, S, K] with the transposed weight: the tokens lie side by side for the op."""
        weight = transposed.inputs[0]
        assert weight is not None
        for product in tuple(transposed.outputs[0].consumers()):
            x = product.inputs[0]
            assert product.op_type == "MatMul", product
            assert x is not None, product
            width = self._parts[_name(weight)].whole_shape[-1]
            side_by_side = ir.node("Constant", [], {"value_ints": [-1, width]})
            rows = ir.node("Reshape", [x, side_by_side.outputs[0]])
            rest = ir.node("Constant", [], {"value_ints": [-1]})
            leading = ir.node("Shape", [x], {"start": 0, "end": -1})
            dims = ir.node("Concat", [leading.outputs[0], rest.outputs[0]], {"axis": 0})
            rows.outputs[0].type = x.type
            rows.outputs[0].shape = ir.Shape([None, width])
            flat = ir.node("Gemm", [rows.outputs[0], weight], {"transB": 1}, name=product.name)
            flat.outputs[0].type = product.outputs[0].type
            back = ir.node("Reshape", [flat.outputs[0], dims.outputs[0]])
            old, new = product.outputs[0], back.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.insert_after(product, [side_by_side, rows, flat, rest, leading, dims, back])
            model.graph.remove(product, safe=True)
            scales = model.graph.initializers[f"{_name(weight)}{SCALE}"]
            self._put(model, flat, LINEAR_NARROW, [rows.outputs[0], weight, scales], attributes, None)
        model.graph.remove(transposed, safe=True)

    def _put(
        self,
        model: ir.Model,
        old: ir.Node,
        spec: OpSpec,
        inputs: list[ir.Value | None],
        attributes: dict[str, str | int],
        bias: ir.Value | None,
    ) -> None:
        """Put a node of the op, and what adds the bias, in the place of `old`."""
        overload, output = str(attributes["format"]), old.outputs[0]
        name = f"{spec.name}_{self._counts[spec.name]}"
        self._counts[spec.name] += 1
        made = ir.node(spec.name, inputs, attributes, domain=DOMAIN, overload=overload, name=name)
        nodes = [made]
        if bias is not None:
            made.outputs[0].name = f"{output.name}.unbiased"
            made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
            nodes.append(ir.node("Add", [made.outputs[0], bias], name=f"{old.name}_bias"))
        new = nodes[-1].outputs[0]
        new.name, new.type, new.shape = output.name, output.type, output.shape
        output.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.insert_after(old, nodes)
        model.graph.remove(old, safe=True)
        if made.op_identifier() not in model.functions:
            model.functions[made.op_identifier()] = function_from_spec(spec, attributes, overload)
        model.graph.opset_imports[DOMAIN] = 1


def _become(value: ir.Value, recipe: Recipe) -> None:
    """Give an initializer the dtype and shape of its recipe; data is given to it later."""
    assert recipe.narrow is not None
    value.const_value = None
    value.shape = ir.Shape(recipe.shape)
    value.type = ir.TensorType(ir.DataType(dtype_of(recipe.narrow.dtype).onnx))


def _kind(recipe: Recipe) -> tuple[str, int]:
    narrow = recipe.narrow
    assert isinstance(narrow, Narrow)
    return narrow.format, narrow.group


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name
