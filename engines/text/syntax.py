"""A template's syntax tree: what is asked of it, and the calls of the environment's limits that are put into it."""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import nodes
from jinja2.visitor import NodeTransformer


def none_tested_names(tree: nodes.Template) -> frozenset[str]:
    """The names in expressions of which the template asks whether they are none."""
    return frozenset(_none_tested(tree))


def metered(tree: nodes.Template) -> nodes.Template:
    """The tree with calls of the environment's `step`, `joined` and `held` where something runs, or grows, often."""
    changed: nodes.Template = _Metered().visit(tree)
    return changed


class _Metered(NodeTransformer):
    """Makes every body that may run more than once count itself; ~ and what holds values go through the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (jinja2's names)
        self.generic_visit(node)
        node.body.insert(0, _count(node))
        return node

    visit_Macro = visit_CallBlock = visit_Block = visit_For  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _environment_call(node, "joined", list(node.nodes))

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _environment_call(node, "held", [node])

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _environment_call(node, "held", [node]) if node.ctx == "load" else node


def _count(node: nodes.Node) -> nodes.Node:
    literals = (leaf.data for leaf in node.find_all(nodes.TemplateData))
    constants = (leaf.value for leaf in node.find_all(nodes.Const) if isinstance(leaf.value, str))
    characters = nodes.Const(sum(map(len, (*literals, *constants))))
    return nodes.ExprStmt(_environment_call(node, "step", [characters])).set_lineno(node.lineno)


def _environment_call(node: nodes.Node, method: str, args: list[nodes.Expr]) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)
    assert node.environment is not None
    call.set_environment(node.environment)
    call.set_lineno(node.lineno)
    return call


def _none_tested(tree: nodes.Template) -> Iterator[str]:
    for test in tree.find_all(nodes.Test):
        if test.name == "none":
            yield from _names(test)
    for comparison in tree.find_all(nodes.Compare):
        if any(isinstance(leaf, nodes.Const) and leaf.value is None for leaf in comparison.find_all(nodes.Const)):
            yield from _names(comparison)


def _names(node: nodes.Node) -> Iterator[str]:
    yield from (leaf.name for leaf in node.find_all(nodes.Name))
    yield from (leaf.attr for leaf in node.find_all(nodes.Getattr))
    yield from (leaf.value for leaf in node.find_all(nodes.Const) if isinstance(leaf.value, str))
