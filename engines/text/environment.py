"""The jinja2 environment that chat templates are written for, which is transformers', with limits."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from deepseek_trt.engines.text import limits
from deepseek_trt.engines.text.syntax import metered, none_tested_names

_LONGEST_TEMPLATE = 1_000_000  # characters; DeepSeek's own have some thousands
# Filters that make a text of whatever they are given, or a list that grows with a number.
_WEIGHED: tuple[str, ...] = (
    "batch",
    "capitalize",
    "center",
    "e",
    "escape",
    "forceescape",
    "format",
    "indent",
    "join",
    "lower",
    "pprint",
)
_WEIGHED += ("replace", "safe", "slice", "string", "striptags", "sum", "title", "tojson", "trim", "truncate")
_WEIGHED += ("upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr")
# Filters that search texts with patterns; and those that go through a list, in Python, item by item.
_SEARCHING: tuple[str, ...] = ("pprint", "striptags", "title", "truncate", "urlencode", "urlize", "wordcount")
_SEARCHING += ("wordwrap", "xmlattr")
_VISITING: tuple[str, ...] = ("dictsort", "groupby", "items", "join", "last", "list", "map", "max", "min", "random")
_VISITING += ("reject", "rejectattr", "reverse", "select", "selectattr", "sort", "sum", "unique")


@dataclass(frozen=True)
class Compiled:
    """A template ready to run; `variables` are the names it takes, `none_tested` those it compares with none."""

    template: Template
    variables: frozenset[str]
    none_tested: frozenset[str]

    def render(self, values: Mapping[str, Any]) -> str:
        """The text; raises whatever a template can raise."""
        with limits.limited():
            return self.template.render(values)


@functools.lru_cache(maxsize=16)
def compile_template(source: str, name: str) -> Compiled:
    """`name` stands in tracebacks as the file; raises TemplateSyntaxError, and what its constants raise."""
    if len(source) > _LONGEST_TEMPLATE:
        raise TemplateError(f"it has {len(source):,} characters; at most {_LONGEST_TEMPLATE:,} are read")
    with limits.limited():
        environment = _Environment()
        tree = environment.parse(source, name, name)
        variables, none_tested = frozenset(meta.find_undeclared_variables(tree)), none_tested_names(tree)
        code = environment.compile(metered(tree), name, name)
        template = environment.template_class.from_code(environment, code, environment.make_globals(None))
        return Compiled(template, variables, none_tested)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}, which marks an assistant's words for training: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """Sandboxed, and every loop, macro, operation, filter and output is counted before it is made."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # constants are computed under the same limits
            finalize=_counted,
        )
        filters = {**self.filters, "tojson": _tojson}
        self.filters = {
            name: _limited(name, filter_) if name in (*_WEIGHED, *_VISITING, "round") else filter_
            for name, filter_ in filters.items()
        }
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def step(self, literal: int) -> str:
        """Count one round; compiled templates call it, and no template can name it."""
        limits.current().step(literal)
        return ""

    def joined(self, *parts: Any) -> str:
        """Do what the operator ~ does."""
        limits.current().make(sum(map(limits.weight, parts)))
        return "".join(map(str, parts))

    def held(self, value: Any) -> Any:
        """Weigh a list, tuple or dictionary that is written down: what holds itself twice, again and again, grows."""
        limits.current().hold(limits.weight(value))
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits.current().make(limits.weight_of_operation(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (jinja2's)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        if isinstance(method, types.BuiltinMethodType) and isinstance(method.__self__, (str, bytes, int)):
            args = tuple(map(_at_hand, args))
            given = (*args, *kwargs.values())
            limits.current().make(limits.weight_of_call(method.__name__, method.__self__, given))
        return super().call(__context, __obj, *args, **kwargs)


def _limited(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    own = int(hasattr(filter_, "jinja_pass_arg"))  # jinja2 gives these its context first

    @functools.wraps(filter_)
    def counting(*args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_at_hand, args))
        subject, given = args[own], (*args[own + 1 :], *kwargs.values())
        if name in _SEARCHING:
            limits.check_line(name, subject, given)
        if name in _VISITING:
            limits.current().visit(len(subject) if hasattr(subject, "__len__") else 1)
        if name in (*_WEIGHED, "list"):
            limits.current().make(limits.weight_of_call(f"|{name}", subject, given))
        if name == "round":
            limits.check_digits(given)
        return filter_(*args, **kwargs)

    return counting


def _at_hand(value: Any) -> Any:
    """What can be weighed and then used: a generator's items are all asked for."""
    return list(value) if isinstance(value, Iterator) else value


def _counted(value: Any) -> Any:
    limits.current().make(limits.weight(value))
    return value


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON for a model to read: jinja2's own escapes what HTML would misread."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any = "") -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    limits.current().make(limits.weight_of_call("format", pattern, ()))
    return datetime.now().strftime(pattern)


class _Dict:
    """The global `dict`: makes dictionaries, and gives nothing of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        made = dict(*args, **kwargs)
        limits.current().hold(limits.weight(made))
        return made

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """The global `namespace`, without names that Python keeps for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args  # namespace(self=...) is a name like others
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # it may hold itself


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")
