"""The block graph: nodes by name, who stands on whom, and who may do what.

    guest device        a user: holds a node by an edge of its own ("root")
         |
     qcow2 "root"       a node that the monitor owns: `blockdev_add` made it, `blockdev_del` ends it
      |        |
    file     backing    inline children: they live as long as somebody stands on them

Invariants: an edge leads only to nodes that were there before it, so there are no circles; nodes are listed
newest first; after every change each pair of users of a node agrees (`block/permissions.py`) and the image
locks say what is used. Looking things up never waits for a change that is opening files.
"""

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from stillframe.block.node import Node
from stillframe.block.opening import open_tree
from stillframe.block.options import NodeOptions, read_options
from stillframe.block.permissions import (
    DEVICE_READER,
    DEVICE_WRITER,
    EXPORT_READER,
    EXPORT_WRITER,
    FORMAT_WRITER,
    Permissions,
)
from stillframe.block.structure import Edge, Entry, Structure, close_node
from stillframe.errors import AlreadyExists, InUse, InvalidRequest, NotFound, Refused, StillframeError


class NodeUse:
    """A guest device's, an export's, or a job's, hold on a node; `release` it, or leave it as a context."""

    def __init__(self, graph: "BlockGraph", node: Node, user: str) -> None:
        self._graph = graph
        self.node = node
        self.user = user

    def release(self) -> None:
        """Give the node back; a second time does nothing."""
        self._graph._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class BlockGraph:
    """All nodes of a machine, or of one command. Any thread may call anything."""

    def __init__(self) -> None:
        self._change = threading.RLock()
        self._structure = Structure()
        self._uses: dict[NodeUse, Callable[[], None]] = {}
        self._drives: dict[str, Node | None] = {}

    # What is there.

    def get(self, node_name: str) -> Node | None:
        """The node of that name, where there is one."""
        entry = self._structure.entries.get(node_name)
        return entry.node if entry else None

    def find(self, node_name: str) -> Node:
        """The node of that name, or of the drive of that name. :raise NotFound: there is none. :raise Refused: an empty drive's."""
        node = self.get(node_name) or self._drives.get(node_name)
        if node is None:
            if node_name in self._drives:
                raise Refused(f"Device '{node_name}' has no medium")
            raise NotFound(f"Cannot find device='{node_name}' nor node-name='{node_name}'")
        return node

    def drive_of(self, node: Node) -> str | None:
        """The name of the drive that the node was opened as; None where it was none."""
        return next((name for name, found in self._drives.items() if found is node), None)

    def drives(self) -> tuple[tuple[str, Node | None], ...]:
        """All of them, the oldest first: their names and nodes; None for an empty one."""
        return tuple(self._drives.items())

    def nodes(self) -> tuple[Node, ...]:
        """All of them, the newest first."""
        return tuple(entry.node for entry in reversed(self._structure.entries.values()) if entry.node)

    def parents(self, node: Node) -> tuple[Node, ...]:
        """The nodes that stand on this one, the newest first."""
        edges = tuple(self._entry(node).parents)
        return tuple(edge.parent.node for edge in edges if edge.parent and edge.parent.node)

    def users(self, node: Node) -> tuple[str, ...]:
        """The guest devices on this very node, the newest first, by the names that `use` was given."""
        return tuple(edge.user for edge in tuple(self._entry(node).parents) if edge.parent is None)

    def options(self, node: Node) -> NodeOptions:
        """What the node was asked to be."""
        return self._entry(node).options

    # Changes.

    def blockdev_add(self, options: Mapping[str, Any] | NodeOptions) -> Node:
        """Open a node, and the nodes below it that are described inside it; all of them or none.

        :param options: QMP's arguments, or what `parse_options` made of a text.
        :raise Refused: in QEMU's words. :raise IOFailed: the storage failed. :raise ImageCorrupt: an image's
            tables.
        """
        if not isinstance(options, NodeOptions):
            options = read_options(options)
        if options.node_name is None:
            raise InvalidRequest("'node-name' must be specified for the root node")
        with self._change:
            return open_tree(self._structure, options)

    def drive_add(self, name: str, options: NodeOptions | None) -> None:
        """Open a node as QEMU's `-drive` does: by a name of its own beside the node's, and for as long as the graph is there.

        :param options: None for a drive with nothing in it.
        :raise AlreadyExists: a drive or a node has that name; otherwise as `blockdev_add`.
        """
        with self._change:
            if name in self._drives:
                raise AlreadyExists(f"Device with id '{name}' already exists")
            if self.get(name) is not None or (options is not None and options.node_name == name):
                raise AlreadyExists(f"Device name '{name}' conflicts with an existing node name")
            node = None if options is None else open_tree(self._structure, options)
            self._drives[name] = node
            self._structure.reserved.add(name)
            if node is not None:
                self._entry(node).holders.append(name)

    def blockdev_del(self, node_name: str) -> None:
        """Close a node that `blockdev_add` opened, and what only it stood on.

        :raise NotFound: no such node. :raise InUse: it has users or parents.
        :raise IOFailed: it could not be flushed; it is gone all the same.
        """
        with self._change:
            entry = self._structure.entries.get(node_name)
            if entry is None or entry.node is None:
                raise NotFound(f"Failed to find node with node-name='{node_name}'")
            users = [edge.user for edge in entry.parents if edge.parent is None]
            users += entry.holders
            if users:
                raise InUse(f"Node {node_name} is in use", remedy=f"End its user first: {users[0]}.")
            if not entry.owned:
                raise InUse(
                    f"Node {node_name} is not owned by the monitor",
                    remedy="It was opened as part of another node, and is closed with it.",
                )
            if entry.parents:
                raise InUse(f"Block device {node_name} is in use", remedy="Remove the nodes above it first.")
            failures = self._structure.drop(entry)
        _raise_first(failures)

    def use(self, node: Node, user: str, *, writable: bool) -> NodeUse:
        """Put a guest device on a node.

        :param user: the device's name, for the words of a refusal to others.
        :raise InUse: another user does not share what it needs. :raise Refused: the node is read-only.
        """
        return self._stand_on(node, user, DEVICE_WRITER if writable else DEVICE_READER)

    def export(self, node: Node, user: str, *, writable: bool) -> NodeUse:
        """Let other processes use a node; as `use`, but others may write it, too."""
        return self._stand_on(node, user, EXPORT_WRITER if writable else EXPORT_READER)

    def format(self, node: Node, user: str) -> NodeUse:
        """Write a format into a node; as `use`, but nobody else may write it, or change its size."""
        return self._stand_on(node, user, FORMAT_WRITER)

    def _stand_on(self, node: Node, user: str, demand: Permissions) -> NodeUse:
        with self._change:
            entry = self._entry(node)
            edge = Edge(entry, "root", user=user, demand=demand)
            self._structure.connect(edge)
            use = NodeUse(self, node, user)
            self._uses[use] = lambda: _raise_first(self._structure.disconnect(edge))
            return use

    def hold(self, node: Node, user: str) -> NodeUse:
        """Keep a node from being closed, as a job does; nothing else is asked of its other users."""
        with self._change:
            entry = self._entry(node)
            entry.holders.append(user)
            use = NodeUse(self, node, user)
            self._uses[use] = lambda: entry.holders.remove(user)
            return use

    def close(self) -> None:
        """Close every node, users or not; the graph is empty afterwards.

        :raise StillframeError: the first that a node's `close` raised, after all were closed.
        """
        with self._change:
            entries = tuple(self._structure.entries.values())
            self._structure.entries = {}
            self._uses, self._drives = {}, {}
            failures = [error for entry in entries for error in _close_from_above(entry)]
        _raise_first(failures)

    # Within.

    def _entry(self, node: Node) -> Entry:
        entry = self._structure.existing(node.node_name)
        if entry.node is not node:
            raise NotFound(f"Cannot find device='{node.node_name}' nor node-name='{node.node_name}'")
        return entry

    def _release(self, use: NodeUse) -> None:
        with self._change:
            end = self._uses.pop(use, None)
            if end is not None:
                end()


def _close_from_above(entry: Entry) -> list[StillframeError]:
    """Close what stands on an entry, then the entry; a second time does nothing."""
    failures = [error for edge in entry.parents if edge.parent for error in _close_from_above(edge.parent)]
    return failures + close_node(entry)


def _raise_first(failures: list[StillframeError]) -> None:
    if failures:
        raise failures[0]
