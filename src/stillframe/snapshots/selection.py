"""Which nodes, which of them holds the machine state, and every refusal before anything is touched.

The order of the checks and their words are QEMU's; what is checked besides, or differently, stands in
docs/differences.md under the name that the comment gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stillframe.block.graph import BlockGraph
from stillframe.block.node import Node, SnapshotInfo, SnapshotStore
from stillframe.errors import AlreadyExists, InvalidRequest, NotFound, Refused, Unsupported
from stillframe.snapshots.context import told

MAXIMUM_NAME = 255
"""Bytes of a snapshot's name; QEMU's buffer has one more."""


@dataclass(frozen=True, slots=True)
class SnapshotNode:
    """A node that takes part in snapshots. :param drive: the name of the drive that it was opened as, if it was one."""

    node: Node
    store: SnapshotStore
    drive: str | None = None

    @property
    def name(self) -> str:
        """Its node-name."""
        return self.node.node_name

    @property
    def called(self) -> str:
        """What people know it by: its drive's name, else its node-name."""
        return self.drive or self.name

    def named(self, tag: str) -> SnapshotInfo | None:
        """Its first snapshot of that name; ids are never looked at (tags-match-by-name)."""
        return next((found for found in self.store.snapshots() if found.name == tag), None)


@dataclass(frozen=True, slots=True)
class SaveSelection:
    """What a save is about. :param nodes: all, in the caller's order. :param state: the one for the machine
    state."""

    tag: str
    nodes: tuple[SnapshotNode, ...]
    state: SnapshotNode

    @property
    def members(self) -> tuple[SnapshotNode, ...]:
        """All but the state node."""
        return tuple(node for node in self.nodes if node is not self.state)


@dataclass(frozen=True, slots=True)
class Found:
    """A node's snapshot."""

    node: SnapshotNode
    snapshot: SnapshotInfo


@dataclass(frozen=True, slots=True)
class LoadSelection:
    """What a load is about. :param state: where the machine state is; one of `all`."""

    tag: str
    all: tuple[Found, ...]
    state: Found


def check_tag(tag: str) -> None:
    """Refuse a name that an image could not give back (no-cut-names).

    :raise InvalidRequest: over 255 bytes, a NUL in it, or no text.
    """
    try:
        length = len(tag.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("A snapshot's name must be text") from None
    if length > MAXIMUM_NAME:
        raise InvalidRequest(
            f"The snapshot name '{tag[:40]}...' has {length} bytes, {MAXIMUM_NAME} are allowed",
            remedy="Choose a shorter name.",
        )
    if "\0" in tag:
        raise InvalidRequest("A snapshot's name must not contain a NUL character")


def snapshot_node(node: Node, drive: str | None = None) -> SnapshotNode:
    """A node as one that takes part in snapshots.

    :param drive: the name of the drive that has it, by which errors call it then.
    :raise Unsupported: its driver keeps no snapshots. :raise Refused: it is read-only.
    """
    name = drive or node.node_name
    store = node.snapshot_store
    if store is None:
        raise Unsupported(
            f"Device '{name}' is writable but does not support snapshots",
            remedy="Leave it out of the list, or convert its image to qcow2.",
        )
    if node.read_only:
        # read-only-is-called-so
        raise Refused(
            f"Device '{name}' is read-only and cannot take part in snapshots",
            remedy="Leave it out of the list, or open it writable.",
        )
    return SnapshotNode(node, store, drive)


def listed(graph: BlockGraph, devices: Sequence[str]) -> tuple[SnapshotNode, ...]:
    """The nodes of an explicit list.

    :param devices: node-names; the names of guest devices do not count.
    :raise InvalidRequest: the list is empty, or names a node, or an image, twice. :raise NotFound: there is
        no such node.
    :raise Refused: one cannot take part in snapshots.
    """
    if not devices:
        raise InvalidRequest("At least one device is required for snapshot")
    nodes: list[Node] = []
    for name in devices:
        node = graph.get(name)
        if node is None:
            raise NotFound(
                f"No block device node '{name}'", remedy="query-named-block-nodes lists the names."
            )
        nodes.append(node)
    for position, name in enumerate(devices):
        if name in devices[:position]:
            # no-node-twice
            raise InvalidRequest(f"Block device node '{name}' is listed twice")
    found = tuple(snapshot_node(node, graph.drive_of(node)) for node in nodes)
    for position, each in enumerate(found):
        for other in found[:position]:
            if other.store is each.store:
                # no-node-twice
                raise InvalidRequest(
                    f"Block device nodes '{other.name}' and '{each.name}' are the same image",
                    remedy="List one of them.",
                )
    return found


def _state_node(nodes: Sequence[SnapshotNode], vmstate: str | None) -> SnapshotNode:
    for node in nodes:
        if vmstate is None or node.name == vmstate:
            return node
    if vmstate is None:
        raise NotFound("no block device can store vmstate for snapshot")
    raise InvalidRequest(
        f"vmstate block device '{vmstate}' does not exist",
        remedy="The node for the machine state must be among the devices.",
    )


def for_save(
    nodes: Sequence[SnapshotNode], tag: str, vmstate: str | None, *, replace: bool = False
) -> SaveSelection:
    """What to save where.

    :param vmstate: the node-name for the machine state; None for the first.
    :param replace: the name may be taken: the caller deletes the older snapshots once the new one is safe.
    :raise AlreadyExists: a node has a snapshot of that name (tag-on-any-node).
    :raise InvalidRequest: the name cannot be kept, or `vmstate` is not among the nodes.
    """
    check_tag(tag)
    if not replace and any(node.named(tag) is not None for node in nodes):
        raise AlreadyExists(
            f"Snapshot '{tag}' already exists in one or more devices",
            remedy="Choose another name, or delete that snapshot first.",
        )
    state = _state_node(nodes, vmstate)
    _refuse_unmarkable(nodes)
    return SaveSelection(tag, tuple(nodes), state)


def for_load(nodes: Sequence[SnapshotNode], tag: str, vmstate: str | None) -> LoadSelection:
    """What to load from where.

    Where a node has several snapshots of that name, the one made together with the state node's is taken.

    :raise NotFound: a node has no snapshot of that name. :raise Refused: there is no machine state in it.
    """
    missing = [node.name for node in nodes if node.named(tag) is None]
    if missing:
        raise NotFound(
            f"Snapshot '{tag}' does not exist in one or more devices",
            remedy=f"It is missing on {', '.join(missing)}.",
        )
    state_node = _state_node(nodes, vmstate)
    state = state_node.named(tag)
    if state is None:
        raise NotFound("Snapshot can not be found")
    if state.state_size == 0:
        raise Refused("This is a disk-only snapshot. Revert to it  offline using qemu-img")
    found = tuple(Found(node, state if node is state_node else _companion(node, state)) for node in nodes)
    _refuse_unmarkable(nodes)
    return LoadSelection(tag, found, Found(state_node, state))


def _companion(node: SnapshotNode, state: SnapshotInfo) -> SnapshotInfo:
    named = [found for found in node.store.snapshots() if found.name == state.name]
    if not named:
        raise NotFound(f"Snapshot '{state.name}' does not exist in one or more devices")
    if state.lineage is not None:
        for found in named:
            if found.lineage is not None and found.lineage.group == state.lineage.group:
                return found
    return named[0]


def for_delete(nodes: Sequence[SnapshotNode], tag: str) -> tuple[Found, ...]:
    """The first snapshot of that name on each node that has one, the one with machine state first."""
    found = [Found(node, snapshot) for node in nodes if (snapshot := node.named(tag)) is not None]
    _refuse_unmarkable([each.node for each in found])
    return tuple(sorted(found, key=lambda each: each.snapshot.state_size == 0))


def _refuse_unmarkable(nodes: Sequence[SnapshotNode]) -> None:
    """Several images carry a mark meanwhile (group.py). :raise Refused: one cannot, and why."""
    for node in nodes if len(nodes) > 1 else ():
        with told(f"Device '{node.name}' cannot take part in an operation over several images"):
            node.store.refuse_if_unmarkable()
