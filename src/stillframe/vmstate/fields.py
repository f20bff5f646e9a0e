"""Device state as named, typed, versioned fields.

A device declares its state once, as a `Description`; bytes, the JSON description at the end of the stream, and the words of a
refusal all come from it. Integers are big-endian in the stream, as everything of QEMU's format is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

IntegerType = Literal["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
FieldType = Literal[IntegerType, "buffer"]
Value = int | bool | bytes | tuple[int, ...]
Values = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Field:
    """One field.

    :param type: an integer type, or "buffer" for bytes.
    :param count: how many: of 1 the value is an int (or bool), of more a tuple of them; for a buffer its bytes.
    :param count_field: instead of `count`, the name of an earlier integer field that holds it.
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
    """

    name: str
    version: int
    fields: tuple[Field, ...]
    minimum_version: int = 1


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
        """The state, one value a field. Called with the guest at an instruction boundary and the device drained."""
        ...

    def check_state(self, values: Values) -> None:
        """Refuse values that this device cannot take; changes nothing, and is called while the guest runs.

        :raise StateMismatch: naming the section and the field.
        """
        ...

    def load_state(self, values: Values) -> None:
        """Take the state over. Called with the guest at an instruction boundary, after RAM and all checks."""
        ...
