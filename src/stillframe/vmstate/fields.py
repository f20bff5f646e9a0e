"""Device state as named, typed, versioned fields.

A device declares its state once, as a `Description`; bytes, the JSON description at the end of the stream,
and the words of a refusal all come from it. Integers are big-endian in the stream, as everything of QEMU's
format is.

A section's payload is its fields one after the other, without names, padding or lengths:

    integer           1, 2, 4 or 8 bytes; `bool` is one byte
    array             so many integers as `count`, or an earlier field, says
    buffer            so many bytes as `count`, or an earlier field, says
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from stillframe.errors import StateMismatch

IntegerType = Literal["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
FieldType = Literal[IntegerType, "buffer"]
Value = int | bool | bytes | tuple[int, ...]
Values = Mapping[str, Value]

Take = Callable[[int], bytes]
"""Hands out the next so many bytes of a stream, or raises `StreamCorrupt`."""

MAXIMUM_FIELD = 64 << 20
"""Bytes; a larger field is damage, whatever an earlier field claims its count to be."""

_CODES: Mapping[str, str] = {
    "bool": "?",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
}
INTEGER_SIZES: Mapping[str, int] = {name: struct.calcsize(">" + code) for name, code in _CODES.items()}
"""Bytes of each integer type."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field.

    :param type: an integer type, or "buffer" for bytes.
    :param count: how many: of 1 the value is an int (or bool), of more a tuple of them; for a buffer its
        bytes.
    :param count_field: instead of `count`, the name of an earlier integer field that holds it; the value is a
        tuple, or bytes.
    :param since: the first version of the description that has this field.
    :param default: what an older state means where the field is missing.
    """

    name: str
    type: FieldType
    count: int = 1
    count_field: str | None = None
    since: int = 1
    default: Value | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """The state of one kind of device.

    :param name: the kind, as "uart16550"; the stream's `vmsd_name`.
    :param version: what is written. :param minimum_version: the oldest that is read.
    :raise ValueError: the declaration contradicts itself; a defect of the device's code.
    """

    name: str
    version: int
    fields: tuple[Field, ...]
    minimum_version: int = 1

    def __post_init__(self) -> None:
        seen: dict[str, Field] = {}
        for field in self.fields:
            where = f"field '{field.name}' of '{self.name}'"
            if field.name in seen:
                raise ValueError(f"{where} is declared twice")
            if field.type not in get_args(IntegerType) and field.type != "buffer":
                raise ValueError(f"{where} is of no type that the stream knows: {field.type}")
            if field.since > self.minimum_version and field.default is None:
                raise ValueError(f"{where} is missing in version {self.minimum_version}: it needs a default")
            if field.count_field is not None:
                counter = seen.get(field.count_field)
                if counter is None or counter.type == "buffer" or counter.count != 1:
                    raise ValueError(f"{where} takes its count from no earlier single integer")
                if counter.since > field.since:
                    raise ValueError(f"{where} takes its count from a younger field")
            seen[field.name] = field


class StateDevice(Protocol):
    """Whatever has a section of its own in the machine state.

    `section_name` and `instance_id` together are unique in a machine and stable over releases.
    """

    @property
    def section_name(self) -> str: ...

    @property
    def instance_id(self) -> int: ...

    @property
    def description(self) -> Description: ...

    def save_state(self) -> Values:
        """The state, one value a field. Called with the guest at an instruction boundary and the device
        drained."""
        ...

    def check_state(self, values: Values) -> None:
        """Refuse values that this device cannot take; changes nothing, and is called while the guest runs.

        :raise StateMismatch: naming the section and the field.
        """
        ...

    def load_state(self, values: Values) -> None:
        """Take the state over. Called with the guest at an instruction boundary, after RAM and all checks."""
        ...


def encode(description: Description, values: Values, section: str) -> bytes:
    """The payload of a section, in the description's own version.

    :param section: the section's idstr, for the words of a refusal.
    :raise StateMismatch: a value is missing, of the wrong type or count, or outside of its type's range.
    """
    payload = bytearray()
    for field in description.fields:
        if field.name not in values:
            raise _unfit(section, field, "has no value", "be saved")
        value = values[field.name]
        count = _count(field, values)
        try:
            payload += _encode_field(field, value, count)
        except (struct.error, TypeError, ValueError) as error:
            raise _unfit(section, field, f"is {_short(value)}: {error}", "be saved") from error
    return bytes(payload)


def decode(description: Description, version: int, take: Take, section: str) -> dict[str, Value]:
    """The values of a section that was written in `version`; fields younger than that get their defaults.

    :raise StateMismatch: a version that this description does not read; a count beyond all bounds.
    :raise StreamCorrupt: (by `take`) the stream ends inside the section.
    """
    if not description.minimum_version <= version <= description.version:
        raise StateMismatch(
            f"savevm: unsupported version {version} for '{section}' v{description.version}",
            section=section,
            remedy="Load it with the release of stillframe that saved it, or a younger one."
            if version > description.version
            else "Load it with an older release of stillframe, and save it again there.",
        )
    values: dict[str, Value] = {}
    for field in description.fields:
        if field.since > version:
            if field.default is None:
                raise _unfit(section, field, f"is missing in version {version}", "be loaded")
            values[field.name] = field.default
            continue
        count = _count(field, values)
        size = count * INTEGER_SIZES.get(field.type, 1)
        if size > MAXIMUM_FIELD:
            raise _unfit(section, field, f"claims {count} elements", "be loaded")
        data = take(size)
        if field.type == "buffer":
            values[field.name] = data
        else:
            numbers: tuple[int, ...] = struct.unpack(f">{count}{_CODES[field.type]}", data)
            alone = field.count == 1 and field.count_field is None
            values[field.name] = numbers[0] if alone else numbers
    return values


def describe_fields(description: Description, values: Values) -> list[dict[str, Any]]:
    """The fields as QEMU's JSON description lists them; the size of an array's entry is one element's."""
    described: list[dict[str, Any]] = []
    for field in description.fields:
        count = _count(field, values)
        if field.type == "buffer":
            described.append({"name": field.name, "type": "buffer", "size": count})
            continue
        entry: dict[str, Any] = {"name": field.name}
        if field.count != 1 or field.count_field is not None:
            if count == 0:
                continue
            entry["array_len"] = count
        entry["type"] = field.type
        entry["size"] = INTEGER_SIZES[field.type]
        described.append(entry)
    return described


def _count(field: Field, values: Values) -> int:
    if field.count_field is None:
        return field.count
    count = values[field.count_field]
    return count if isinstance(count, int) and count > 0 else 0


def _encode_field(field: Field, value: Value, count: int) -> bytes:
    if field.type == "buffer":
        if not isinstance(value, bytes) or len(value) != count:
            raise ValueError(f"not {count} bytes")
        return value
    if field.count == 1 and field.count_field is None:
        if not isinstance(value, int):
            raise TypeError("not a number")
        return struct.pack(">" + _CODES[field.type], value)
    if not isinstance(value, tuple) or len(value) != count:
        raise ValueError(f"not {count} numbers")
    return struct.pack(f">{count}{_CODES[field.type]}", *value)


def _short(value: Value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _unfit(section: str, field: Field, why: str, what: str) -> StateMismatch:
    return StateMismatch(
        f"The state of device '{section}' cannot {what}: field '{field.name}' {why}",
        section=section,
        field=field.name,
    )
