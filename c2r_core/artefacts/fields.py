"""JSON's values from text, and dataclasses from these, with every field of its type."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


def from_json(text: str | bytes) -> Any:
    """JSON's values, whoever wrote them.

    Raises
    ------
    ValueError
        If it is no JSON in UTF-8, or is nested too deep to be read.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON file's values by name.

    Raises
    ------
    ValueError
        If it is no JSON, or no object; the message names the file and ends with the remedy.
    """
    try:
        values = from_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no JSON object; expected settings by name. {remedy}")
    return values


def from_values(cls: type[Made], values: object) -> Made:
    """A dataclass of JSON's values by the names of its fields.

    All must be there, those with a default too. They may be text, finite numbers, None, Literal,
    tuple[T, ...], dict[str, T], or dataclasses of them.

    Raises
    ------
    ValueError
        If a field is missing, unknown or of another type, or the class itself refuses a value; the message
        names the field.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} is {_shortly(values)}; expected values by name")
    fields = {field.name for field in dataclasses.fields(cls)}
    if missing := sorted(fields - values.keys()):
        raise ValueError(f"{cls.__name__} lacks {', '.join(missing)}")
    if unknown := sorted(values.keys() - fields):
        raise ValueError(f"{cls.__name__} has no field named {', '.join(map(_shortly, unknown))}")
    hints = get_type_hints(cls)
    return cls(**{name: _value(name, value, hints[name]) for name, value in values.items()})


def _value(name: str, value: Any, hint: Any) -> Any:
    kind, inner = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_values(hint, value)
    if kind is tuple and isinstance(value, list):
        return tuple(_value(f"{name}[{i}]", one, inner[0]) for i, one in enumerate(value))
    if kind is dict and isinstance(value, Mapping):
        return {key: _value(f"{name}[{key!r}]", one, inner[1]) for key, one in value.items()}
    if not _is(value, hint):
        expected = getattr(hint, "__name__", str(hint)) if kind is None else str(hint)
        raise ValueError(f"{name} is {_shortly(value)}; expected {expected}")
    return value


def _is(value: object, hint: Any) -> bool:
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        return any(_is(value, one) for one in get_args(hint))
    if kind is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if kind is not None or isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, hint)


def _shortly(value: object) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
