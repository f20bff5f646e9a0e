"""What was declared, for programs (`query-qmp-schema`) and for people (`docs/commands.md`).

The schema has the form of QEMU's introspection: an entry for each command, event and type. Types have numbers
for names, since only their members are an interface; "0" is the object without members, "[N]" an array of N.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from stillframe.monitor.schema import (
    COMMANDS,
    EVENTS,
    Array,
    Builtin,
    Enumeration,
    Member,
    Nothing,
    Object,
    Shape,
    Variants,
    description,
)


class _Numbering:
    """Names for types, given as they are met; every type met is described once. :param first: a number that is not taken."""

    def __init__(self, first: int = 0) -> None:
        self._first = first
        self._names: dict[Any, str] = {Object(Nothing): "0"}
        self.entries: list[dict[str, Any]] = [{"name": "0", "meta-type": "object", "members": []}]

    def name(self, shape: Shape) -> str:
        if isinstance(shape, Array):
            return self._array(shape)
        key: Any = shape.name if isinstance(shape, Builtin) else shape
        if isinstance(shape, Variants):
            key = (shape.tag, *shape.cases)
        if key not in self._names:
            self._names[key] = shape.name if isinstance(shape, Builtin) else self._number()
            self._describe(shape, self._names[key])
        return self._names[key]

    def _number(self) -> str:
        return str(self._first + len(self._names))

    def _array(self, shape: Array) -> str:
        element = self.name(shape.element)
        name = f"[{element}]"
        if name not in self._names:
            self._names[name] = name
            self.entries.append({"name": name, "meta-type": "array", "element-type": element})
        return name

    def _describe(self, shape: Shape, name: str) -> None:
        entry: dict[str, Any] = {"name": name}
        self.entries.append(entry)
        if isinstance(shape, Builtin):
            entry |= {"meta-type": "builtin", "json-type": shape.json_type}
        elif isinstance(shape, Enumeration):
            entry |= {
                "meta-type": "enum",
                "members": [{"name": word} for word in shape.words],
                "values": list(shape.words),
            }
        elif isinstance(shape, Object):
            entry |= {"meta-type": "object", "members": [self._member(each) for each in shape.members]}
        elif isinstance(shape, Variants):
            tag = _TagWords(tuple(shape.cases))
            entry |= {
                "meta-type": "object",
                "members": [{"name": shape.tag, "type": self._words(tag)}],
                "tag": shape.tag,
                "variants": [{"case": case, "type": self.name(each)} for case, each in shape.cases.items()],
            }

    def _member(self, member: Member) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": member.name, "type": self.name(member.shape)}
        if member.optional:
            entry["default"] = None
        return entry

    def _words(self, tag: "_TagWords") -> str:
        if tag not in self._names:
            self._names[tag] = self._number()
            self.entries.append(
                {
                    "name": self._names[tag],
                    "meta-type": "enum",
                    "members": [{"name": word} for word in tag],
                    "values": list(tag),
                }
            )
        return self._names[tag]


class _TagWords(tuple[str, ...]):
    """The words of a union's tag, told apart from other tuples of words by their type."""

    __slots__ = ()


def schema_entries(
    others: Sequence[Mapping[str, Any]] = (), passed: Container[str] = ()
) -> list[dict[str, Any]]:
    """The schema of all that is declared: commands, events, then the types that they use.

    :param others: the schema of another monitor, whose commands of these names are passed on to it. :param passed: the names.
        It tells of its own types by names of its own; what is declared here, it says as it is here.
    """
    numbers = [int(each["name"]) for each in others if each["name"].isdecimal()]
    numbering = _Numbering(1 + max(numbers, default=-1))
    declared: list[dict[str, Any]] = []
    for command in COMMANDS.values():
        if others and command.of_program:
            continue
        entry: dict[str, Any] = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": numbering.name(command.arguments),
            "ret-type": numbering.name(command.returns),
        }
        if command.allow_oob:
            entry["allow-oob"] = True
        if command.features:
            entry["features"] = list(command.features)
        declared.append(entry)
    for event in EVENTS.values():
        declared.append({"name": event.name, "meta-type": "event", "arg-type": numbering.name(event.data)})
    theirs = [
        dict(each)
        for each in others
        if (each["name"] in passed if each["meta-type"] == "command" else each["name"] not in EVENTS)
    ]
    there = {each["name"] for each in theirs}
    return declared + theirs + [each for each in numbering.entries if each["name"] not in there]


def reference() -> str:
    """All commands and events, with their members and types, in Markdown."""
    lines = [
        "# Commands and events",
        "",
        "Made from the declarations in `src/stillframe/monitor/commands/` by `python -m stillframe.monitor.introspect`; a",
        "test holds the two together. How a monitor is reached and spoken to is in [monitor.md](monitor.md).",
        "",
        "## Commands",
    ]
    shapes: dict[str, Shape] = {}
    for _, command in sorted(COMMANDS.items()):
        lines += ["", f"### {command.name}", "", *_prose(command.function.__doc__)]
        lines += _arguments(command.arguments, shapes)
        if command.returns != Object(Nothing):
            lines += ["", f"Returns {_type(command.returns, shapes)}."]
    lines += ["", "## Events"]
    for _, event in sorted(EVENTS.items()):
        lines += ["", f"### {event.name}", "", *_prose(event.data.type.__doc__)]
        lines += _arguments(event.data, shapes)
    lines += ["", "## Types"]
    done: set[str] = set()
    while rest := sorted(shapes.keys() - done):
        for name in rest:
            done.add(name)
            _type_text(shapes[name], shapes)
    for name in sorted(shapes):
        lines += ["", f"### {name}", "", *_type_text(shapes[name], shapes)]
    return "\n".join(lines) + "\n"


def _prose(text: str | None) -> list[str]:
    paragraphs = [" ".join(part.split()) for part in description(text).split("\n\n")]
    return "\n\n".join(paragraphs).split("\n")


def _arguments(shape: Object | Variants, shapes: dict[str, Shape]) -> list[str]:
    if isinstance(shape, Variants):
        return ["", f"Its arguments are the members of {_type(shape, shapes)}."]
    return _members(shape.members, shapes)


_OPTIONAL = {False: "", True: ", optional"}


def _members(members: Iterable[Member], shapes: dict[str, Shape]) -> list[str]:
    rows = [
        f"| `{each.name}` | {_type(each.shape, shapes)}{_OPTIONAL[each.optional]} | {each.text} |"
        for each in members
    ]
    return ["", "| member | type | |", "|---|---|---|", *rows] if rows else []


def _type(shape: Shape, shapes: dict[str, Shape]) -> str:
    if isinstance(shape, Builtin):
        return shape.name
    if isinstance(shape, Array):
        return f"array of {_type(shape.element, shapes)}"
    name = shape.name if isinstance(shape, Variants) else shape.type.__name__
    shapes[name] = shape
    return f"[{name}](#{name.lower()})"


def _type_text(shape: Shape, shapes: dict[str, Shape]) -> list[str]:
    if isinstance(shape, Enumeration):
        return [
            *_prose(shape.type.__doc__),
            "",
            "One of " + ", ".join(f"`{word}`" for word in shape.words) + ".",
        ]
    if isinstance(shape, Object):
        return [*_prose(shape.type.__doc__), *_members(shape.members, shapes)]
    if isinstance(shape, Variants):
        lines = [f"An object whose member `{shape.tag}` says what else it has."]
        for case, each in shape.cases.items():
            lines += ["", f"`{shape.tag}` is `{case}`: {' '.join(_prose(each.type.__doc__))}"]
            lines += _members(each.members, shapes)
        return lines
    raise TypeError(f"{shape} has no text of its own")


if __name__ == "__main__":
    import stillframe.monitor.commands  # noqa: F401 (declares them)

    print(reference(), end="")
