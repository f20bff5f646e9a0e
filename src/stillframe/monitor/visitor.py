"""Arguments against their declaration: in QEMU's order, in QEMU's words.

Members are visited as declared, each wholly (is it there, is it of the type, what is inside) before the next;
only when all known ones have passed is an unknown one reported. The first error wins. Names in errors are
paths from the arguments on, as `actions[0].data`, except in the two kinds where QEMU prints the last name
alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from stillframe.errors import InvalidRequest
from stillframe.monitor.schema import ANY, Array, Builtin, Enumeration, Object, Shape, Variants
from stillframe.monitor.wire import members_in_order


def check_arguments(declared: Object | Variants, given: Mapping[str, Any]) -> Any:
    """The structure that `declared` describes, made from `given`.

    :raise InvalidRequest: naming the first member that is missing, wrong or unknown.
    """
    return _value(declared, given, "", "")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _object(declared: Object, given: Any, path: str, name: str, tag: str | None = None) -> Any:
    if not isinstance(given, dict):
        raise _wrong_type(path, "object")
    values = {}
    for member in declared.members:
        inner = _join(path, member.name)
        if member.name not in given:
            if member.optional:
                continue
            raise InvalidRequest(f"Parameter '{inner}' is missing")
        values[member.attribute] = _value(member.shape, given[member.name], inner, member.name)
    known = {member.name for member in declared.members}
    unknown = first_unknown(given, known | {tag} if tag else known)
    if unknown is not None:
        raise InvalidRequest(f"Parameter '{_join(path, unknown)}' is unexpected")
    return declared.type(**values)


def _value(shape: Shape, given: Any, path: str, name: str) -> Any:
    if isinstance(shape, Builtin):
        return _builtin(shape, given, path, name)
    if isinstance(shape, Enumeration):
        if not isinstance(given, str):
            raise _wrong_type(path, "string")
        if given not in shape.words:
            raise InvalidRequest(f"Parameter '{name}' does not accept value '{given}'")
        return shape.type(given)
    if isinstance(shape, Array):
        if not isinstance(given, list):
            raise _wrong_type(path, "array")
        return [_value(shape.element, each, f"{path}[{index}]", "null") for index, each in enumerate(given)]
    if isinstance(shape, Variants):
        return _variants(shape, given, path, name)
    return _object(shape, given, path, name)


def _variants(shape: Variants, given: Any, path: str, name: str) -> Any:
    if not isinstance(given, dict):
        raise _wrong_type(path, "object")
    tag = _join(path, shape.tag)
    if shape.tag not in given:
        raise InvalidRequest(f"Parameter '{tag}' is missing")
    case = given[shape.tag]
    if not isinstance(case, str):
        raise _wrong_type(tag, "string")
    if case not in shape.cases:
        raise InvalidRequest(f"Parameter '{shape.tag}' does not accept value '{case}'")
    return _object(shape.cases[case], given, path, name, shape.tag)


def _builtin(shape: Builtin, given: Any, path: str, name: str) -> Any:
    if shape is ANY:
        return given
    if shape.integer is not None:
        return _integer(shape, given, path, name)
    if shape.json_type == "number":
        fits = isinstance(given, (int, float)) and not isinstance(given, bool)
    elif shape.json_type == "null":
        fits = given is None
    else:
        fits = isinstance(given, {"string": str, "boolean": bool}[shape.json_type])
    if not fits:
        raise _wrong_type(path, shape.expected)
    return given


def _integer(shape: Builtin, given: Any, path: str, name: str) -> int:
    bounds = shape.integer
    if bounds is None or not isinstance(given, int) or isinstance(given, bool):
        raise _wrong_type(path, "integer")
    if bounds.wraps and -(1 << 63) <= given < 0:
        return given + (1 << 64)
    if not bounds.wraps and given >= 1 << 63:
        raise _wrong_type(path, "integer")
    if not bounds.minimum <= given <= bounds.maximum:
        raise InvalidRequest(f"Parameter '{name}' expects {bounds.c_type}")
    return given


def _wrong_type(path: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid parameter type for '{path}', expected: {expected}")


def first_unknown(given: Mapping[str, Any], known: Iterable[str]) -> str | None:
    """The member that is reported as unexpected; where there are several, the one that QEMU names."""
    unknown = given.keys() - set(known)
    if len(unknown) <= 1:
        return next(iter(unknown), None)
    return next(name for name in _table_order(dict(given)) if name in unknown)


_SLOTS = 8
_PRIME = 7


def _table_order(given: dict[str, Any]) -> list[str]:
    """The members as they lie in QEMU's table of what has not been visited: a hash of the name, then the next
    free slot.

    Exact for the seven members that fit before the table grows; beyond them any unknown member is as good as
    another.
    """
    names = members_in_order(given)
    if len(names) >= _SLOTS:
        return list(names)
    slots: list[str | None] = [None] * _SLOTS
    for name in names:
        code = 5381
        for byte in name.encode():
            code = (code * 33 + (byte - 256 if byte > 127 else byte)) & 0xFFFFFFFF
        index = (max(code, 2) * 11 & 0xFFFFFFFF) % _PRIME
        step = 0
        while slots[index] is not None:
            step += 1
            index = (index + step) % _SLOTS
        slots[index] = name
    return [name for name in slots if name is not None]
