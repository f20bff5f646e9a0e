"""Snapshots without a list of nodes, as the human commands take them: every node that a guest or the user
uses.

    included    writable, and used by a guest device, or without a node above it
    skipped     read-only nodes; nodes that only stand below another (backing images, protocol layers)
    refused     an included node whose driver keeps no snapshots: leaving a writable disk out in silence would mix two times
"""

from collections.abc import Iterable
from dataclasses import dataclass

from stillframe.block.graph import BlockGraph
from stillframe.block.node import SnapshotInfo
from stillframe.errors import NotFound
from stillframe.snapshots.selection import SnapshotNode, snapshot_node


def included(graph: BlockGraph) -> tuple[SnapshotNode, ...]:
    """The nodes of a snapshot of everything: those of guest devices first, each part the oldest first.

    :raise Unsupported: one of them keeps no snapshots.
    """
    nodes = [node for node in reversed(graph.nodes()) if not node.read_only]
    used = [node for node in nodes if graph.users(node)]
    roots = [node for node in nodes if node not in used and not graph.parents(node)]
    return _each_image_once(snapshot_node(node, graph.drive_of(node)) for node in (*used, *roots))


def _each_image_once(nodes: Iterable[SnapshotNode]) -> tuple[SnapshotNode, ...]:
    """A node that hands snapshots on to the one below stands for the same image."""
    found: list[SnapshotNode] = []
    for node in nodes:
        if all(node.store is not other.store for other in found):
            found.append(node)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Listing:
    """What `info snapshots` tells.

    :param common: snapshots of the first node whose names are on all nodes.
    :param partial: for each node that has others, its drive's name or its own, and those.
    """

    common: tuple[SnapshotInfo, ...]
    partial: tuple[tuple[str, tuple[SnapshotInfo, ...]], ...]

    @property
    def empty(self) -> bool:
        """Whether there is no snapshot at all."""
        return not self.common and not self.partial


def listing(graph: BlockGraph) -> Listing:
    """The snapshots of all included nodes that can have some.

    :raise NotFound: there is no such node.
    """
    writable = [
        node
        for node in reversed(graph.nodes())
        if not node.read_only and (graph.users(node) or not graph.parents(node))
    ]
    able = [
        SnapshotNode(node, store, graph.drive_of(node))
        for node in writable
        if (store := node.snapshot_store) is not None
    ]
    able.sort(key=lambda node: not graph.users(node.node))
    nodes = _each_image_once(able)
    if not nodes:
        raise NotFound("no block device can store vmstate for snapshot")
    tables = {node.name: tuple(node.store.snapshots()) for node in nodes}
    everywhere = set.intersection(*({found.name for found in table} for table in tables.values()))
    if len(able) < len(writable):
        # A disk that keeps no snapshots has none of these.
        everywhere = set()
    partial = [
        (node.called, tuple(found for found in tables[node.name] if found.name not in everywhere))
        for node in nodes
    ]
    return Listing(
        common=tuple(found for found in tables[nodes[0].name] if found.name in everywhere),
        partial=tuple((called, table) for called, table in partial if table),
    )
