"""Commands and events, declared once; what is checked, introspected and documented all comes from here.

A command is a function of a `Host` (or of a `Session`) and of at most one structure, its arguments:

    class JobId(Structure):
        \"\"\":param id: the job's id.\"\"\"

        id: str

    @command("job-pause")
    def job_pause(host: Host, arguments: JobId) -> None:
        \"\"\"Hold a job at its next checkpoint.\"\"\"

    @event("JOB_STATUS_CHANGE")
    class JobStatusChange(Structure): ...

Members are visited in the order of their declaration; `job_id` stands for QMP's `job-id`,
`msgspec.field(name=...)` for other names. Their types:

    str bool float Any                    as they are; `float` is QMP's number
    int, UInt8 ... UInt64                 `int` is a signed number of 64 bits
    an Enum of strings                    one of its words
    list[T], Structure                    nested
    T | msgspec.UnsetType = msgspec.UNSET optional
    A | B with the same `tag_field`       a union, told apart by that member; A alone, with a tag: a union of one

A command's function runs on a thread of its own and may block, unless it is declared `at_once`; what it returns is the reply's
`return` (None for an empty object), what it raises from the tree of errors is its `error`.
"""

import enum
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Final

import msgspec


class Structure(msgspec.Struct, rename="kebab"):
    """The base of everything that is declared: members by name, in order."""


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer of a size.

    :param c_type: what QEMU calls it where a value does not fit.
    :param wraps: negative numbers stand for large ones, as in QEMU's 64-bit sizes.
    """

    c_type: str
    minimum: int
    maximum: int
    wraps: bool = False


UInt8 = Annotated[int, Integer("uint8_t", 0, (1 << 8) - 1)]
UInt16 = Annotated[int, Integer("uint16_t", 0, (1 << 16) - 1)]
UInt32 = Annotated[int, Integer("uint32_t", 0, (1 << 32) - 1)]
UInt64 = Annotated[int, Integer("uint64_t", 0, (1 << 64) - 1, wraps=True)]

_INT64: Final = Integer("int64_t", -(1 << 63), (1 << 63) - 1)


# Shapes: what a type is on the wire


@dataclass(frozen=True, slots=True)
class Builtin:
    """A value without members. :param name: in the schema. :param expected: in the words of a refusal."""

    name: str
    json_type: str
    expected: str
    integer: Integer | None = None


@dataclass(frozen=True, slots=True)
class Array:
    """Values of one shape."""

    element: "Shape"


@dataclass(frozen=True, slots=True)
class Enumeration:
    """One word of several."""

    type: type[enum.Enum]

    @property
    def words(self) -> tuple[str, ...]:
        """In the order of declaration."""
        return tuple(member.value for member in self.type)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an object.

    :param name: on the wire. :param attribute: in the structure. :param text: what it is, for the reference.
    """

    name: str
    attribute: str
    shape: "Shape"
    optional: bool
    text: str = ""


@dataclass(frozen=True, slots=True)
class Object:
    """Named members."""

    type: type[msgspec.Struct]

    @property
    def members(self) -> tuple[Member, ...]:
        """In the order in which they are visited."""
        return _members(self.type)


@dataclass(frozen=True, slots=True)
class Variants:
    """One object of several, told apart by the member `tag`. :param name: of their common base."""

    name: str
    tag: str
    cases: Mapping[str, Object] = field(compare=False)


Shape = Builtin | Array | Enumeration | Object | Variants

STRING: Final = Builtin("str", "string", "string")
BOOLEAN: Final = Builtin("bool", "boolean", "boolean")
NUMBER: Final = Builtin("number", "number", "number")
ANY: Final = Builtin("any", "value", "any")
NULL: Final = Builtin("null", "null", "null")
_BUILTINS: Final[Mapping[Any, Builtin]] = {
    str: STRING,
    bool: BOOLEAN,
    float: NUMBER,
    Any: ANY,
    None: NULL,
    types.NoneType: NULL,
    int: Builtin("int", "int", "integer", _INT64),
}


def shape_of(annotation: Any) -> Shape:
    """The shape that a type stands for on the wire. :raise TypeError: for a type that QMP has not."""
    if annotation in _BUILTINS:
        return _BUILTINS[annotation]
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        for extra in arguments[1:]:
            if isinstance(extra, Integer):
                return Builtin("int", "int", "integer", extra)
        return shape_of(arguments[0])
    if origin in (list, Sequence, tuple):
        return Array(shape_of(arguments[0]))
    if origin in (typing.Union, types.UnionType):
        return _variants(arguments)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return Enumeration(annotation)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return _variants((annotation,)) if annotation.__struct_config__.tag else Object(annotation)
    raise TypeError(f"{annotation} has no shape in QMP")


def _variants(cases: Sequence[Any]) -> Variants:
    tags = {case.__struct_config__.tag_field for case in cases}
    if len(tags) != 1 or None in tags:
        raise TypeError(f"the cases {cases} have no tag in common")
    objects = {str(case.__struct_config__.tag): Object(case) for case in cases}
    bases = {case.__bases__[0].__name__ for case in cases} - {"Structure"}
    name = bases.pop() if len(bases) == 1 else "Or".join(case.__name__ for case in cases)
    return Variants(name, tags.pop(), objects)


@cache
def _members(structure: type[msgspec.Struct]) -> tuple[Member, ...]:
    hints = typing.get_type_hints(structure, include_extras=True)
    texts = described_parameters(structure.__doc__ or "")
    members = []
    for attribute, name in zip(structure.__struct_fields__, structure.__struct_encode_fields__, strict=True):
        annotation = hints[attribute]
        cases = typing.get_args(annotation)
        optional = msgspec.UnsetType in cases
        if optional:
            rest = tuple(case for case in cases if case is not msgspec.UnsetType)
            annotation = typing.Union[rest] if len(rest) > 1 else rest[0]  # noqa: UP007
        members.append(Member(name, attribute, shape_of(annotation), optional, texts.get(attribute, "")))
    return tuple(members)


def described_parameters(text: str) -> dict[str, str]:
    """The texts of a docstring's `:param name:` fields, white space collapsed."""
    found = {}
    for part in text.split(":param ")[1:]:
        name, _, rest = part.partition(":")
        found[name.strip()] = " ".join(rest.split("\n\n")[0].split(":raise")[0].split())
    return found


def description(text: str | None) -> str:
    """The prose of a docstring, without its fields."""
    return (text or "").split(":param ")[0].split(":raise")[0].strip()


# Declarations


class Nothing(Structure):
    """No members."""


@dataclass(frozen=True, slots=True)
class Command:
    """A declared command.

    :param of_session: its function takes the session instead of the host.
    :param on_loop: its function is called on the monitors' loop, not on a thread of its own.
    :param allow_oob: it can be executed out of band.
    :param arguments: an object, or variants of one.
    :param checked: False: the arguments are handed on as they came, a `dict`; the function checks them.
    :param of_program: it is about the program that runs the guest: where that is a QEMU, the QEMU is asked.
    """

    name: str
    function: Callable[..., Any]
    arguments: "Object | Variants"
    returns: Shape
    features: tuple[str, ...]
    of_session: bool
    on_loop: bool
    allow_oob: bool
    checked: bool
    of_program: bool

    @property
    def takes_arguments(self) -> bool:
        """Whether the function wants a second parameter."""
        return self.arguments != Object(Nothing)


@dataclass(frozen=True, slots=True)
class DeclaredEvent:
    """A declared event."""

    name: str
    data: Object


COMMANDS: Final[dict[str, Command]] = {}
"""Every declared command by name; complete once `stillframe.monitor.commands` is imported."""

EVENTS: Final[dict[str, DeclaredEvent]] = {}
"""Every declared event by name."""

Function = typing.TypeVar("Function", bound=Callable[..., Any])
Declared = typing.TypeVar("Declared", bound=type[msgspec.Struct])


def command(
    name: str,
    *,
    features: Sequence[str] = (),
    unchecked: Any = None,
    returns: Any = None,
    at_once: bool = False,
    allow_oob: bool = False,
    of_program: bool = False,
) -> Callable[[Function], Function]:
    """Declare a function as a command; see the module's text.

    :param features: as `query-qmp-schema` shows them.
    :param unchecked: publish this type as the arguments, and give the function the members as they came.
    :param returns: publish this type instead of the function's own.
    :param at_once: the function tells what is known, takes no time and waits for nothing, no lock either: it spares the way to
        a thread and back, which takes longer than the rest of such a command.
    :param allow_oob: it can overtake what its client asked for before; implies `at_once`, as what it is for is to be done
        while everything else waits.
    :param of_program: it tells what the program that runs the guest has, which a QEMU answers for itself.
    """

    def declare(function: Function) -> Function:
        hints = typing.get_type_hints(function, include_extras=True)
        result = returns or hints.pop("return", None)
        hints.pop("return", None)
        parameters = list(hints.items())
        if not parameters or len(parameters) > 2 or parameters[0][0] not in ("host", "session"):
            raise TypeError(f"{name}: a command is a function of (host or session[, arguments])")
        arguments = shape_of(unchecked or (parameters[1][1] if len(parameters) == 2 else Nothing))
        if not isinstance(arguments, (Object, Variants)):
            raise TypeError(f"{name}: arguments are the members of an object")
        COMMANDS[name] = Command(
            name,
            function,
            arguments,
            shape_of(Nothing if result in (None, types.NoneType) else result),
            tuple(features),
            of_session=parameters[0][0] == "session",
            on_loop=parameters[0][0] == "session" or at_once or allow_oob,
            allow_oob=allow_oob,
            checked=unchecked is None,
            of_program=of_program,
        )
        return function

    return declare


def event(name: str) -> Callable[[Declared], Declared]:
    """Declare a structure as the data of an event."""

    def declare(structure: Declared) -> Declared:
        EVENTS[name] = DeclaredEvent(name, Object(structure))
        return structure

    return declare
