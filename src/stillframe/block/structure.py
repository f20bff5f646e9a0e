"""The structure under `block/graph.py`: entries with names, the edges between them, and what the edges
permit.

Nothing here locks: the graph's change lock is held by whoever calls, except for looking at `entries`.
"""

import random
import re
from dataclasses import dataclass, field

from stillframe.block.file import FileNode
from stillframe.block.node import Node
from stillframe.block.options import NodeOptions
from stillframe.block.permissions import (
    BACKING_READER,
    FORMAT_READER,
    FORMAT_WRITER,
    UNUSED,
    Permission,
    Permissions,
)
from stillframe.errors import AlreadyExists, InUse, InvalidRequest, NotFound, Refused, StillframeError

_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_MAX_NODE_NAME = 31
_CHANGES = Permission.WRITE | Permission.WRITE_UNCHANGED | Permission.RESIZE


@dataclass(slots=True, eq=False)
class Entry:
    """A node's place in the graph.

    :ivar node: None while it is being opened.
    :ivar owned: by the monitor; else it ends with its last parent.
    :ivar children: edges to what it stands on, by role. :ivar parents: edges from what stands on it, newest
        first. :ivar holders: names of users that keep it alive and ask for no permission.
    """

    name: str
    options: NodeOptions
    read_only: bool
    owned: bool
    node: Node | None = None
    children: dict[str, "Edge"] = field(default_factory=dict)
    parents: list["Edge"] = field(default_factory=list)
    holders: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Edge:
    """From a user to the entry that it stands on.

    :ivar parent: the user, where it is a node. :ivar user: its name, where it is a guest device.
    :ivar demand: what a guest device wants; a node's demand is derived.
    """

    child: Entry
    role: str
    parent: Entry | None = None
    user: str = ""
    demand: Permissions = UNUSED

    @property
    def words(self) -> str:
        """As QEMU writes it in a refusal."""
        who = f"node '{self.parent.name}'" if self.parent else f"block device '{self.user}'"
        return f"{who} (uses node '{self.child.name}' as '{self.role}' child)"


class Structure:
    """All entries and edges.

    :ivar entries: by name, the oldest first; replaced at each change, so that it can be read at any time.
    :ivar reserved: names that are not to be given to nodes.
    """

    def __init__(self) -> None:
        self.reserved: set[str] = set()
        self.entries: dict[str, Entry] = {}
        self._next_number = 0

    def new_entry(self, options: NodeOptions, *, read_only: bool, owned: bool) -> Entry:
        """A place for a node about to be opened; it is in the graph once `list_entry` was called."""
        name = options.node_name
        if name is None:
            # Two digits of chance keep people from relying on such names.
            name = f"#block{self._next_number}{random.randrange(100):02d}"
            self._next_number += 1
        return Entry(name, options, read_only, owned)

    def list_entry(self, entry: Entry) -> None:
        """Give the entry its name and its place in the order of the graph.

        :raise InvalidRequest: a bad name. :raise AlreadyExists: a taken one.
        """
        name = entry.name
        if entry.options.node_name is not None and not _NODE_NAME.fullmatch(name):
            raise InvalidRequest(
                f"Invalid node-name: '{name}'",
                remedy="A name is a letter, then letters, digits, '-', '.' and '_'.",
            )
        if name in self.reserved:
            raise AlreadyExists(f"node-name={name} is conflicting with a device id")
        if len(name) > _MAX_NODE_NAME:
            raise InvalidRequest("Node name too long", remedy=f"It has at most {_MAX_NODE_NAME} bytes.")
        if name in self.entries:
            raise AlreadyExists(f"Duplicate nodes with node-name='{name}'")
        self.entries = {**self.entries, name: entry}

    def existing(self, node_name: str) -> Entry:
        """:raise NotFound: no such node, or it is still being opened."""
        entry = self.entries.get(node_name)
        if entry is None or entry.node is None:
            raise NotFound(f"Cannot find device='{node_name}' nor node-name='{node_name}'")
        return entry

    def connect(self, edge: Edge) -> None:
        """Let somebody stand on an entry.

        :raise InUse: others there, or other processes, do not go together with it. :raise Refused: it is
            read-only.
        """
        edge.child.parents.insert(0, edge)
        try:
            self._apply(edge.child)
        except BaseException:
            self.disconnect(edge)
            raise
        if edge.parent is not None:
            edge.parent.children[edge.role] = edge

    def disconnect(self, edge: Edge) -> list[StillframeError]:
        """End what `connect` began; where that was the entry's last hold, `drop` it. Returns what failed."""
        edge.child.parents.remove(edge)
        if not edge.child.parents and not edge.child.owned:
            return self.drop(edge.child)
        self._apply(edge.child)
        return []

    def drop(self, entry: Entry) -> list[StillframeError]:
        """Close an entry that nobody stands on, then what only it stood on.

        Returns what failed; everything is closed all the same.
        """
        if self.entries.get(entry.name) is entry:
            self.entries = {name: other for name, other in self.entries.items() if other is not entry}
        failures = close_node(entry)
        children, entry.children = entry.children, {}
        for edge in children.values():
            failures += self.disconnect(edge)
        return failures

    def _apply(self, entry: Entry) -> None:
        _refuse_disagreement(entry)
        if isinstance(entry.node, FileNode):
            entry.node.set_permissions(_demand_on(entry))
        for edge in entry.children.values():
            self._apply(edge.child)


def close_node(entry: Entry) -> list[StillframeError]:
    """Close the entry's node; returns what that raised."""
    node, entry.node = entry.node, None
    if node is None:
        return []
    try:
        node.close()
    except StillframeError as error:
        return [error]
    return []


def _demand_on(entry: Entry) -> Permissions:
    """What all users of an entry together do, and share."""
    whole = UNUSED
    for edge in entry.parents:
        whole = whole.join(_demand_of(edge))
    return whole


def _demand_of(edge: Edge) -> Permissions:
    parent = edge.parent
    if parent is None:
        return edge.demand
    if edge.role == "backing":
        return BACKING_READER
    if parent.options.driver == "raw":
        through = _demand_on(parent)
        return Permissions(through.uses & ~_CHANGES if parent.read_only else through.uses, through.shares)
    return FORMAT_READER if parent.read_only else FORMAT_WRITER


def _refuse_disagreement(entry: Entry) -> None:
    demands = [(edge, _demand_of(edge)) for edge in entry.parents]
    for edge, demand in demands:
        if entry.read_only and demand.uses & _CHANGES:
            raise Refused(
                "Block node is read-only",
                remedy=f"Open node '{entry.name}' for writing, or its user read-only.",
            )
        for other, other_demand in demands:
            conflict = other_demand.uses & demand.unshared
            if other is not edge and conflict:
                raise InUse(
                    f"Permission conflict on node '{entry.name}': permissions '{conflict.words}' are both "
                    f"required by {other.words} and unshared by {edge.words}."
                )
