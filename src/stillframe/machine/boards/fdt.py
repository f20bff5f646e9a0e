"""A writer of flattened device trees (devicetree specification v0.4, chapter 5).

    header          magic, sizes and offsets of the blocks, version 17, compatible down to 16
    reservations    pairs of u64 (address, size), ended by a pair of zeroes; aligned to 8
    structure       u32 tokens: BEGIN_NODE name, PROP length nameoff value, END_NODE, END; each aligned to 4
    strings         the property names, each once, NUL-terminated

Everything is big-endian. A tree is built from `Node`; references between nodes are the nodes themselves, and
their phandles are numbered when the tree is written.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stillframe.errors import InvalidRequest

_MAGIC = 0xD00DFEED
_VERSION = 17
_LAST_COMPATIBLE = 16
_BEGIN_NODE, _END_NODE, _PROP, _END = 1, 2, 3, 9
_HEADER = struct.Struct(">10I")

_NODE_NAME = re.compile(r"[a-zA-Z0-9,._+-]{1,31}(@[a-zA-Z0-9,._+-]{1,31})?")
_PROPERTY_NAME = re.compile(r"[a-zA-Z0-9,._+?#-]{1,31}")


@dataclass(frozen=True, slots=True)
class U64:
    """A number of two cells, as addresses and sizes are under `#address-cells = <2>`."""

    value: int


class Node:
    """A node of a tree, with properties and child nodes in the order they were given.

        root = Node("").set("#address-cells", 2).set("#size-cells", 2)
        plic = root.add(Node("plic@c000000").set("reg", U64(0xC000000), U64(0x600000)))
        root.add(Node("serial@10000000").set("interrupt-parent", plic).set("interrupts", 10))
        blob = root.to_dtb()

    :param name: with its unit address, as "serial@10000000"; empty for the root alone.
    :raise InvalidRequest: when the name is not one that the specification allows (2.2.1).
    """

    def __init__(self, name: str) -> None:
        if name and not _NODE_NAME.fullmatch(name):
            raise InvalidRequest(f"{name!r} is not a name for a device tree node")
        self.name = name
        self._properties: dict[str, tuple[Value, ...]] = {}
        self._children: dict[str, Node] = {}

    def set(self, name: str, *values: "Value") -> "Node":
        """Give the node a property, or replace it; returns the node, so that calls chain.

        The values are laid out one after the other: an int as a cell of u32, `U64` as two cells, a str
        NUL-terminated (several are a string list), bytes as they are, a `Node` as the cell of its phandle.
        No value at all is the empty property, which is true by being there.

        :raise InvalidRequest: when a name or a value cannot stand in a device tree, as a number out of range
            or a NUL in a string.
        """
        if not _PROPERTY_NAME.fullmatch(name) or name in ("phandle", "linux,phandle"):
            raise InvalidRequest(f"{name!r} is not a name for a device tree property")
        for value in values:
            _check(name, value)
        self._properties[name] = values
        return self

    def add(self, child: "Node") -> "Node":
        """Add a child; returns the child.

        :raise InvalidRequest: when a child of that name is there, or the name is the root's.
        """
        if not child.name or child.name in self._children:
            raise InvalidRequest(
                f"Device tree node {self.name or '/'!r} cannot have another child {child.name!r}"
            )
        self._children[child.name] = child
        return child

    def to_dtb(self, *, boot_cpu: int = 0, reservations: Sequence[tuple[int, int]] = ()) -> bytes:
        """The tree with this node as its root, as a blob of version 17.

        :param boot_cpu: `reg` of the processor that starts the guest.
        :param reservations: memory that the guest must leave alone, as pairs of address and size in bytes.
        :raise InvalidRequest: when a property refers to a node outside this tree, or a node is in it twice.
        """
        if self.name:
            raise InvalidRequest(f"Device tree node {self.name!r} cannot be a root: a root has no name")
        writer = _Writer(self)
        structure, strings = writer.structure(), bytes(writer.strings)
        reserved = b"".join(struct.pack(">QQ", *entry) for entry in (*reservations, (0, 0)))
        at_reserved = _HEADER.size
        at_structure = at_reserved + len(reserved)
        at_strings = at_structure + len(structure)
        total = at_strings + len(strings)
        header = _HEADER.pack(
            _MAGIC,
            total,
            at_structure,
            at_strings,
            at_reserved,
            _VERSION,
            _LAST_COMPATIBLE,
            boot_cpu,
            len(strings),
            len(structure),
        )
        return header + reserved + structure + strings

    def walk(self) -> Iterator["Node"]:
        """This node and all below it, parents before their children."""
        yield self
        for child in self._children.values():
            yield from child.walk()


Value = int | U64 | str | bytes | Node
"""What `Node.set` takes."""


def _check(name: str, value: Value) -> None:
    match value:
        case int():
            fits = 0 <= value < 1 << 32
        case U64(number):
            fits = 0 <= number < 1 << 64
        case str():
            fits = "\0" not in value and _encodable(value)
        case _:
            fits = True
    if not fits:
        raise InvalidRequest(f"{value!r} cannot be a value of the device tree property {name!r}")


def _encodable(text: str) -> bool:
    try:
        _encoded(text)
    except UnicodeEncodeError:
        return False
    return True


def _encoded(text: str) -> bytes:
    # A command line's bytes that are no UTF-8 reach us as surrogates; the guest gets the bytes.
    return text.encode(errors="surrogateescape")


class _Writer:
    """One pass over a tree: phandles are numbered, names of properties pooled."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self.strings = bytearray()
        self._offsets: dict[str, int] = {}
        nodes = list(root.walk())
        if len({id(node) for node in nodes}) != len(nodes):
            raise InvalidRequest("A device tree node is in the tree twice")
        targets = {id(value) for node in nodes for values in node._properties.values() for value in values}
        wanted = [node for node in nodes if id(node) in targets]
        self._phandles = {id(node): number for number, node in enumerate(wanted, start=1)}

    def structure(self) -> bytes:
        return b"".join(self._node(self._root)) + struct.pack(">I", _END)

    def _node(self, node: Node) -> Iterator[bytes]:
        yield struct.pack(">I", _BEGIN_NODE) + _aligned(node.name.encode() + b"\0")
        for name, values in node._properties.items():
            yield self._property(name, b"".join(self._value(name, value) for value in values))
        phandle = self._phandles.get(id(node))
        if phandle is not None:
            yield self._property("phandle", struct.pack(">I", phandle))
        for child in node._children.values():
            yield from self._node(child)
        yield struct.pack(">I", _END_NODE)

    def _property(self, name: str, data: bytes) -> bytes:
        offset = self._offsets.get(name)
        if offset is None:
            offset = self._offsets[name] = len(self.strings)
            self.strings += name.encode() + b"\0"
        return struct.pack(">III", _PROP, len(data), offset) + _aligned(data)

    def _value(self, name: str, value: Value) -> bytes:
        match value:
            case int():
                return struct.pack(">I", value)
            case U64(number):
                return struct.pack(">Q", number)
            case str():
                return _encoded(value) + b"\0"
            case bytes():
                return value
            case Node():
                phandle = self._phandles.get(id(value))
                if phandle is None:
                    raise InvalidRequest(
                        f"Device tree property {name!r} refers to node {value.name!r}, not in the tree"
                    )
                return struct.pack(">I", phandle)


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
