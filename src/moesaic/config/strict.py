"""Turn a plain resolved tree into checked dataclasses and back.

Every key of the tree must be a field, every value of the field's type, at every depth; where a field is annotated with
a base class, `_target_` ("package.module.Class") names the subclass, so that another package can add one.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from moesaic.config.errors import ConfigError, did_you_mean
from moesaic.config.target import class_path, known_components, resolve_target

__all__ = ["ConfigError", "strict_object", "to_plain"]

T = TypeVar("T")
TARGET = "_target_"
OMEGACONF_MISSING = "???"
SCALARS = (bool, int, float, str, types.NoneType)
LIST_ORIGINS = (list, Sequence)
DICT_ORIGINS = (dict, Mapping)


def strict_object(cls: type[T], node: Mapping[str, Any], path: str = "") -> T:
    """Return an instance of `cls` (or of the subclass that `node["_target_"]` names) built from the plain tree `node`.

    `path` is where `node` sits in the whole config and starts every message. Ints become floats where a float is
    wanted, so that 1 and 1.0 have one identity; nothing else is converted except text to Path and lists to tuples.

    Raises: ConfigError for an unknown key, a missing required one, a wrong type, a number that is not finite, a bad
    `_target_`, or a ValueError from a class's own `__post_init__`, always with the full path.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(
            f"{path or 'config'}={node!r} is {_kind(node)}, but the keys of {cls.__name__} are wanted here"
        )
    chosen = resolve_target(node[TARGET], cls, _join(path, TARGET)) if TARGET in node else _concrete(cls, path)
    own = _init_fields(chosen)
    _refuse_unknown(node, own, chosen, path)
    _refuse_missing(node, own, chosen, path)
    hints = _hints(chosen)
    values = {key: _convert(hints[key], node[key], _join(path, key)) for key in own if key in node}
    try:
        return cast(T, chosen(**values))
    except ValueError as error:
        raise ConfigError(_prefixed(str(error), own, path)) from error


def to_plain(obj: Any, annotated: Any = Any, *, counted_only: bool = False) -> Any:
    """Return `obj` as dicts, lists and scalars that JSON can hold and `strict_object` reads back.

    A dataclass gets its `_target_` wherever its class is not the one that `annotated` (at the root) or its field's
    annotation names. `counted_only` leaves out the fields declared with `metadata={"identity": False}`.

    Raises: TypeError for a value that has no plain form.
    """
    if is_dataclass(obj) and not isinstance(obj, type):
        hints = _hints(type(obj))
        own = _init_fields(type(obj)).values()
        kept = [f.name for f in own if not counted_only or f.metadata.get("identity", True)]
        body = {name: to_plain(getattr(obj, name), hints[name], counted_only=counted_only) for name in kept}
        return body if _is_only_class(annotated, type(obj)) else {TARGET: class_path(type(obj)), **body}
    if isinstance(obj, Mapping):
        _, value_hint = _arguments(annotated, DICT_ORIGINS, 2)
        return {_text_key(k): to_plain(v, value_hint, counted_only=counted_only) for k, v in obj.items()}
    if isinstance(obj, list | tuple):
        return [
            to_plain(v, h, counted_only=counted_only)
            for v, h in zip(obj, _item_hints(annotated, len(obj)), strict=True)
        ]
    if isinstance(obj, Path):
        return str(obj)
    if type(obj) in SCALARS:
        return obj
    raise TypeError(
        f"{obj!r} ({type(obj).__name__}) has no plain form: config fields hold dataclasses, containers, scalars"
    )


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return _plain_any(value, path)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, path)
    if origin is Literal:
        return _convert_literal(typing.get_args(hint), value, path)
    if hint in (list, tuple, dict) or origin in (*LIST_ORIGINS, tuple, *DICT_ORIGINS):
        return _convert_container(hint, origin or hint, value, path)
    if _is_component(hint):
        return strict_object(hint, value, path)
    return _convert_scalar(hint, value, path)


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and type(value) in (int, float):
        return _finite(float(value), path)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint in (int, str, bool, types.NoneType):
        if type(value) is hint:
            return value
    elif hint not in (float, Path):
        raise TypeError(f"{path}: a config field cannot be of type {hint!r}")
    raise ConfigError(
        f"{path}={value!r} is {_kind(value)}, but {_hint_name(hint)} is wanted{_how_to_write(hint, value)}"
    )


def _convert_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    """Convert to the member that fits: null, then the value's own type, then the first that takes it."""
    if type(value) in SCALARS and type(value) in members:
        return _convert(type(value), value, path)
    candidates = [m for m in members if m is not types.NoneType and _may_hold(m, value)] or list(members)
    errors = []
    for member in candidates:
        try:
            return _convert(member, value, path)
        except ConfigError as error:
            errors.append(error)
    if len(candidates) == 1:
        raise errors[0]
    wanted = ", ".join(_hint_name(m) for m in members)
    raise ConfigError(f"{path}={value!r} fits none of: {wanted}. The last one says: {errors[-1]}")


def _may_hold(hint: Any, value: Any) -> bool:
    """Tell by the outermost type alone whether `value` was meant for `hint`, so that the error is about that one."""
    origin = typing.get_origin(hint) or hint
    if isinstance(value, Mapping):
        return origin in DICT_ORIGINS or _is_component(hint)
    if isinstance(value, list | tuple):
        return origin in (*LIST_ORIGINS, tuple)
    return origin in (Literal, Path, float, int, str, bool) and not isinstance(value, bool | None)


def _convert_literal(allowed: tuple[Any, ...], value: Any, path: str) -> Any:
    for choice in allowed:
        if type(choice) is type(value) and choice == value:
            return choice
    names = [str(choice) for choice in allowed]
    raise ConfigError(f"{path}={value!r} is not allowed{did_you_mean(str(value), names)} Allowed: {', '.join(names)}.")


def _convert_container(hint: Any, origin: Any, value: Any, path: str) -> Any:
    if origin in DICT_ORIGINS:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r} is {_kind(value)}, but keys and values are wanted")
        key_hint, value_hint = _arguments(hint, DICT_ORIGINS, 2)
        return {
            _convert(key_hint, k, f"key of {path}"): _convert(value_hint, v, _join(path, k)) for k, v in value.items()
        }
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path}={value!r} is {_kind(value)}, but a list is wanted: write [{value}]")
    item_hints = _item_hints(hint, len(value))
    if len(item_hints) != len(value):
        raise ConfigError(f"{path} has {len(value)} items, but {len(item_hints)} are wanted")
    items = [_convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(item_hints, value, strict=True))]
    return items if origin is list else tuple(items)


def _plain_any(value: Any, path: str) -> Any:
    """Copy an untyped subtree; it is checked only for what would break its identity."""
    if isinstance(value, Mapping):
        return {_text_key(k): _plain_any(v, _join(path, k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_any(v, f"{path}[{i}]") for i, v in enumerate(value)]
    return _finite(value, path) if isinstance(value, float) else value


def _finite(value: float, path: str) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{path}={value} is not a finite number; use null where there should be no value")
    return value


def _text_key(key: object) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"key {key!r} is {_kind(key)}; put it in quotes, keys are text")
    return key


def _concrete(cls: type, path: str) -> type:
    if is_dataclass(cls) and not inspect.isabstract(cls):
        return cls
    known = ", ".join(class_path(c) for c in known_components(cls)) or "none is imported yet"
    raise ConfigError(
        f"{_join(path, TARGET)} is missing: name the kind of {cls.__name__} that is wanted. Known: {known}."
    )


def _refuse_unknown(node: Mapping[str, Any], own: Mapping[str, Field[Any]], cls: type, path: str) -> None:
    unknown = [str(key) for key in node if key not in own and key != TARGET]
    if unknown:
        keys = ", ".join(sorted(own)) or "none"
        hint = did_you_mean(unknown[0], own) or "."
        raise ConfigError(f"unknown key {_join(path, unknown[0])}{hint} Keys of {cls.__name__}: {keys}.")


def _refuse_missing(node: Mapping[str, Any], own: Mapping[str, Field[Any]], cls: type, path: str) -> None:
    for name, field in own.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if (name not in node and required) or (name in node and node[name] == OMEGACONF_MISSING):
            raise ConfigError(
                f"{_join(path, name)} is required by {cls.__name__} and has no value: set {_join(path, name)}=..."
            )


def _prefixed(message: str, own: Mapping[str, Field[Any]], path: str) -> str:
    """Put `path` before a class's own message; one that starts with a field's name becomes that field's full path."""
    first = re.match(r"\w+", message)
    return f"{path}.{message}" if path and first and first[0] in own else f"{path}: {message}" if path else message


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _init_fields(cls: type) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(cls) if f.init}


def _item_hints(hint: Any, count: int) -> list[Any]:
    for member in (hint, *_union_members(hint)):
        arguments = typing.get_args(member)
        if typing.get_origin(member) is tuple and arguments[-1] is not Ellipsis:
            return list(arguments)
        if typing.get_origin(member) in (tuple, *LIST_ORIGINS):
            return [arguments[0]] * count
    return [Any] * count


def _arguments(hint: Any, origins: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    for member in (hint, *_union_members(hint)):
        if typing.get_origin(member) in origins:
            return typing.get_args(member)
    return (Any,) * count


def _union_members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()


def _is_component(hint: Any) -> bool:
    return isinstance(hint, type) and hint not in (*SCALARS, Path, list, tuple, dict)


def _is_only_class(hint: Any, cls: type) -> bool:
    """Tell whether an annotation can mean no dataclass but `cls`, so that `_target_` would say nothing new."""
    members = [m for m in (_union_members(hint) or (hint,)) if isinstance(m, type) and is_dataclass(m)]
    return members == [cls]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _kind(value: object) -> str:
    names = {bool: "true/false", int: "an integer", float: "a number with a fraction", str: "text", type(None): "null"}
    return "a list" if isinstance(value, list | tuple) else names.get(type(value), "a set of keys")


def _hint_name(hint: Any) -> str:
    names: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    names[types.NoneType] = "null"
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def _how_to_write(hint: Any, value: object) -> str:
    if hint is int and isinstance(value, float) and value.is_integer():
        return f": write {int(value)}"
    if hint is str:
        return f": write '{value}' in quotes" if isinstance(value, bool | int | float) else ""
    if hint in (int, float) and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", value):
        number = float(value)
        written = repr(number) if hint is float else str(int(number))
        return (
            f": write {written} (plain YAML reads {value} as text)"
            if "e" in value.lower()
            else ": take the quotes away"
        )
    return ""
