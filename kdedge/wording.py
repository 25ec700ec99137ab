"""How messages name what was given, what was expected and what was probably meant."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

KeyPath = tuple[str | int, ...]  # ("networks", "students", "learns", 0, "loss")


def dotted(path: KeyPath) -> str:
    """`networks.students.learns[0].loss`; a key with unusual characters is quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = shorten(part if re.fullmatch(r"[\w-]+", part) else repr(part))
            text += f".{key}" if text else key
    return text


def shorten(text: str, length: int = 80) -> str:
    """`text`, cut so that a message stays on one line."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def given(value: object) -> str:
    """A value as the user wrote it; of lists and mappings only what they are."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return shorten(repr(value))


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` was probably meant to be, or None."""
    found = difflib.get_close_matches(name[:80].lower(), list(choices), n=1)
    return found[0] if found else None


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """`unknown loss 'msee'; did you mean 'mse'? Losses: cross_entropy, kd, mse`."""
    choices = list(choices)
    meant = nearest(name, choices)
    guess = f"; did you mean {meant!r}?" if meant else "."
    plural = f"{kind}es" if kind.endswith("s") else f"{kind}s"
    listed = (
        f" {plural[0].upper()}{plural[1:]}: {', '.join(choices[:30])}" if choices else f" There are no {plural} here"
    )
    return f"unknown {kind} {shorten(repr(name))}{guess}{listed}{', ...' if len(choices) > 30 else ''}"


def explain(error: ErrorDetails, key: str | int, model: type[BaseModel]) -> str:
    """What one of pydantic's errors means, for the key `key` of `model`, without pydantic's own terms."""
    field = keys(model).get(str(key))
    value = error["input"]
    match error["type"]:
        case "extra_forbidden":
            return unknown("key", str(key), keys(model))
        case "value_error":
            return str(error["ctx"]["error"])
        case "string_pattern_mismatch":
            return f"expected a name of at most 64 a-z, 0-9, - and _ that starts with a-z or 0-9, got {given(value)}"
        case "missing" if field is not None and field.examples:
            return f"missing; write for example `{key}: {_flow(field.examples[0])}`"
        case "missing":
            return "missing"
        case "too_short" if field is not None and field.examples:
            return f"empty; write for example `{key}: {_flow(field.examples[0])}`"
        case "too_short":
            return "empty; at least one entry is needed"
        case "too_long":
            return f"expected at most {error['ctx']['max_length']} entries, got {len(value)}"
        case "literal_error" if field is not None and len(get_args(_kind(field))) > 1 and isinstance(value, str):
            return unknown(str(key), value, get_args(_kind(field)))
        case name if field is None and name in _OF_ENTRIES:
            return f"expected {_OF_ENTRIES[name].format_map(error.get('ctx', {}))}, got {given(value)}"
        case _:
            return f"expected {'text' if field is None else expected(field)}, got {given(value)}"


_OF_ENTRIES = {  # of a list, which has no fields
    "int_type": "a whole number",
    "float_type": "a number",
    "greater_than_equal": "a number of at least {ge:,}",
    "less_than_equal": "a number of at most {le:,}",
}


def _flow(value: object) -> str:
    """A value as YAML on one line."""
    return json.dumps(value).replace('"', "")


def expected(field: FieldInfo) -> str:
    """What a field takes, from its type and limits: `a whole number from 1 to 100000`."""
    kind = _kind(field)
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    if kind is int or kind is float:
        return ("a whole number" if kind is int else "a number") + _limits(field)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with keys such as {next(iter(keys(kind)))}"
    if field.examples:
        return f"a value such as {_flow(field.examples[0])}"
    return "true or false" if kind is bool else "text"


def _kind(field: FieldInfo) -> Any:
    """The type of a field; of one that may be left out, without the None."""
    if get_origin(field.annotation) in (Union, UnionType):
        return next(part for part in get_args(field.annotation) if part is not NoneType)
    return field.annotation


def _limits(field: FieldInfo) -> str:
    low = high = ""
    closed: list[str] = []
    for limit in field.metadata:
        match limit:
            case annotated_types.Ge(ge=value):
                low = f" of at least {value:,}"
                closed.append(f"{value:,}")
            case annotated_types.Gt(gt=value):
                low = f" above {value:,}"
            case annotated_types.Le(le=value):
                high = f" at most {value:,}"
                closed.append(f"{value:,}")
            case annotated_types.Lt(lt=value):
                high = f" below {value:,}"
    if len(closed) == 2:
        return f" from {closed[0]} to {closed[1]}"
    return f"{low} and{high}" if low and high else low or high


def keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """A model's fields by the key that is written in YAML."""
    return {field.alias or name: field for name, field in model.model_fields.items()}
