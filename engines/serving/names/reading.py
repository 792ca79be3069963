"""A request's tensors and parameters, by whatever names it uses, as tensors by the own ones; RequestError else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.serving.names.guides import tensors_of_guide
from deepseek_trt.engines.serving.names.json_input import json_of
from deepseek_trt.engines.serving.names.table import KNOWN, OWN, Name
from deepseek_trt.engines.serving.tensors import Field
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.text.valid import check_text, text_of_bytes

Tensors = Mapping[str, npt.NDArray[Any]]

# What tritonserver and its clients add to a request's parameters by themselves.
_OWN_PARAMETERS = ("id", "binary_data_output", "sequence_id", "sequence_start", "sequence_end")
_OWN_PREFIX = "triton_"
_DTYPES: dict[str, tuple[str, Any]] = {  # kinds of numpy that are taken, and what values are made into
    "TYPE_STRING": ("OSU", np.object_),
    "TYPE_INT32": ("iu", np.int32),
    "TYPE_UINT64": ("iu", np.uint64),
    "TYPE_BOOL": ("b", np.bool_),
    "TYPE_FP32": ("f", np.float32),
    "TYPE_FP16": ("f", np.float16),
    "TYPE_UINT8": ("iu", np.uint8),
}
_GUIDES = ("guided_decoding", "structured_outputs")  # objects, of which a guide's type and text are made
_PARAMETERS = "sampling_parameters"
_JSON = ("messages", "tools", "chat_template_kwargs", "logit_bias")  # own inputs of JSON as text
_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class ModelIds:
    """Token ids that requests may name: those that end an answer, and the one that fills rows up."""

    end: tuple[int, ...] = ()
    pad: int | None = None


_NO_IDS = ModelIds()


@dataclass(frozen=True)
class _Said:
    """A value by the name that the request has for it."""

    name: str
    array: npt.NDArray[Any]


def own_tensors(
    tensors: Tensors, parameters: Mapping[str, Any], ids: ModelIds = _NO_IDS
) -> dict[str, npt.NDArray[Any]]:
    """Everything that was said by an own name; what changes nothing is left out, and all else is refused by name."""
    said: dict[str, _Said] = {}
    for each in _all_said(tensors, parameters):
        name = each.name
        known = KNOWN.get(name)
        if known is not None and not known.same_as:
            _check_neutral(known, each.array, ids)
            continue
        own = known.same_as if known else name
        _check_same(said.setdefault(own, each), each)
    return {name: each.array for name, each in said.items()}


def _all_said(tensors: Tensors, parameters: Mapping[str, Any]) -> Iterator[_Said]:
    """Yield tensors, request parameters and sampling_parameters' keys; guides of several parts as own inputs."""
    _check_names(parameters, "parameter")
    for name, array in tensors.items():
        _check_type(name, array)
        if name != _PARAMETERS:
            yield _Said(name, array)
    if _PARAMETERS in parameters and _PARAMETERS in tensors:
        raise RequestError(f"{_PARAMETERS} is given as an input and as a parameter: give it once")
    given = parameters.get(_PARAMETERS)
    if _PARAMETERS in tensors:
        given = _text_of(tensors[_PARAMETERS], _PARAMETERS)
    yield from _of_values({name: value for name, value in parameters.items() if name != _PARAMETERS})
    if given is not None:
        yield from _of_values(_keys(given))


def _keys(given: Any) -> dict[str, Any]:
    value = json_of(given, _PARAMETERS) if isinstance(given, str) else given
    if not isinstance(value, dict):
        raise RequestError(f"{_PARAMETERS} holds no JSON object: give {{name: value}}")
    _check_names(value, f"{_PARAMETERS}: key")
    return {name: each for name, each in value.items() if each is not None}


def _check_names(names: Mapping[str, Any], kind: str) -> None:
    known = {*OWN, *KNOWN, *(_OWN_PARAMETERS if kind == "parameter" else ())}
    unknown = sorted(set(names) - known)
    if kind == "parameter":
        unknown = [name for name in unknown if not name.startswith(_OWN_PREFIX)]
    elif _PARAMETERS in names:
        unknown.append(_PARAMETERS)
    if unknown:
        inputs = ", ".join(OWN)
        shown = ", ".join(repr(name[:_SHOWN])[1:-1] for name in unknown[:8])
        raise RequestError(f"{kind} {shown}: not known; the inputs are {inputs}")


def _of_values(values: Mapping[str, Any]) -> Iterator[_Said]:
    """Yield plain values as tensors of their names' types."""
    for name, value in values.items():
        if name in _GUIDES:
            yield from (_Said(own, _array(OWN[own], text)) for own, text in tensors_of_guide(name, value).items())
        elif name in OWN or name in KNOWN:
            yield _Said(name, _array(OWN.get(name) or KNOWN[name].field, value))


def _check_type(name: str, array: npt.NDArray[Any]) -> None:
    """Of an input; tritonserver has looked at it, others may not have."""
    field = OWN.get(name) or (KNOWN[name].field if name in KNOWN and KNOWN[name].declared else None)
    if field is None:
        raise RequestError(f"input {name[:_SHOWN]!r} of {array.dtype}: not known")
    if array.dtype.kind not in _DTYPES[field.data_type][0]:
        raise RequestError(f"input {name} of {array.dtype}: must be {field.data_type}")


def _array(field: Field, value: Any) -> npt.NDArray[Any]:
    """A plain value, or several, as the field's tensor; numbers may be written as text, as in vllm_backend."""
    many = value if isinstance(value, (list, tuple)) and field.dims != (1,) else [value]
    made = [_value(field, each) for each in many]
    array = np.empty((1, len(made)), _DTYPES[field.data_type][1])
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is refused as such
        array[0] = made
    return array


def _value(field: Field, value: Any) -> Any:
    if field.data_type == "TYPE_STRING":
        return _text(field.name, value)
    if field.data_type == "TYPE_BOOL":
        return _flag(field.name, value)
    if field.data_type.startswith("TYPE_FP"):
        return _number(field.name, value)
    return _whole(field, value)


def _text(name: str, value: Any) -> bytes:
    if name in _JSON and isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise _wrong(name, value, "must be text")
    return check_text(value, name).encode()


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _wrong(name, value, "must be true or false")
    return value


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise _wrong(name, value, "must be a number") from None


def _whole(field: Field, value: Any) -> int:
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(field.name, value, "must be a whole number")
    limits = np.iinfo(_DTYPES[field.data_type][1])
    if not limits.min <= value <= limits.max:
        raise _wrong(field.name, value, f"must lie between {limits.min} and {limits.max}")
    return value


def _wrong(name: str, value: Any, mend: str) -> RequestError:
    huge = isinstance(value, int) and value.bit_length() > 256
    shown = "(a number of many digits)" if huge else repr(value)
    return RequestError(f"{name} {shown[:_SHOWN]}: {mend}")


def _check_neutral(known: Name, array: npt.NDArray[Any], ids: ModelIds) -> None:
    """Taken where it says what is so anyway."""
    neutral: tuple[object, ...] = known.neutral
    if known.of_model == "end":
        neutral = ids.end
    elif known.of_model == "pad":  # which fills rows up, and is in no answer; clients send the end's for it
        neutral = (*(() if ids.pad is None else (ids.pad,)), *ids.end)
    for value in _values(array, known.name):
        if not any(value == each for each in neutral):
            good = f"; {' or '.join(map(repr, neutral))} is taken" if neutral else ""
            raise RequestError(f"{known.name} {repr(value)[:_SHOWN]}: not supported, as {known.why}{good}")


def _check_same(first: _Said, other: _Said) -> None:
    """Two names of one thing, or one name twice, must agree."""
    if first is other:
        return
    one, two = _values(first.array, first.name), _values(other.array, other.name)
    if one != two and not (_all_nan(one) and _all_nan(two)):
        names = f"{first.name} twice" if first.name == other.name else f"{first.name} and {other.name}, one thing"
        raise RequestError(f"{names}, with different values ({repr(one)[:_SHOWN]}, {repr(two)[:_SHOWN]}): give it once")


def _all_nan(values: list[Any]) -> bool:
    return all(isinstance(value, float) and math.isnan(value) for value in values)


def _values(array: npt.NDArray[Any], name: str) -> list[Any]:
    values: list[Any] = array.reshape(-1).tolist()
    return [text_of_bytes(value, name) if isinstance(value, bytes) else value for value in values]


def _text_of(array: npt.NDArray[Any], name: str) -> str:
    if array.size != 1:
        raise RequestError(f"{name} has shape {list(array.shape)}: give one value")
    (value,) = _values(array, name)
    return str(value)
