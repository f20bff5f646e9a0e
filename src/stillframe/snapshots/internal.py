"""Snapshots of one disk alone, without machine state: `blockdev-snapshot-internal-sync` and its
counterpart."""

import time
from collections.abc import Callable
from uuid import uuid4

from stillframe.block.graph import BlockGraph
from stillframe.block.node import GroupKind, GroupMember, Lineage, Node, SnapshotInfo, SnapshotRecord
from stillframe.errors import AlreadyExists, InvalidRequest, NotFound, Refused, Unsupported
from stillframe.machine.control import MachineControl
from stillframe.snapshots.context import AtRest
from stillframe.snapshots.group import Step, all_or_none, frozen_nodes
from stillframe.snapshots.selection import SnapshotNode, check_tag


def _refuse_below(graph: BlockGraph, node: Node) -> None:
    if graph.parents(node):
        raise Refused("Need a root block node", remedy="Name the node above it.")


class Instant:
    """Snapshots of single disks, and whatever else is to see the same instant of them: all of it, or nothing.

    `add` refuses, in order; `happen` does it. The caller keeps the nodes open from the one to the other.
    """

    def __init__(self, machine: MachineControl, graph: BlockGraph, at_rest: AtRest) -> None:
        self._machine = machine
        self._at_rest = at_rest
        self._graph = graph
        self._wanted: dict[str, tuple[SnapshotNode, str]] = {}

    def add(self, node: Node, device: str, name: str) -> None:
        """Snapshot the content of a node. :param device: what it was called. :raise Refused: in QEMU's words."""
        _refuse_below(self._graph, node)
        if node.read_only:
            raise Refused(f"Device '{device}' is read only")
        store = node.snapshot_store
        if store is None:
            raise Unsupported(
                f"Block format '{node.driver}' used by device '{device}' does not support internal snapshots"
            )
        if not name:
            raise InvalidRequest("Name is empty")
        check_tag(name)
        root = SnapshotNode(node, store, device)
        wanted = self._wanted.get(node.node_name)
        if root.named(name) is not None or (wanted is not None and wanted[1] == name):
            raise AlreadyExists(
                f"Snapshot with name '{name}' already exists on device '{device}'",
                remedy="Choose another name, or delete that snapshot first.",
            )
        if wanted is not None:
            raise Refused(f"Device '{device}' is listed twice", remedy="Make one snapshot of each device.")
        self._wanted[node.node_name] = root, name

    def happen(self, also: Callable[[], None] = lambda: None) -> None:
        """The guest goes on; its requests wait for the instant alone.

        :param also: called in the instant; what it raises ends it all.
        :raise Refused: nothing was touched. :raise Failed: storage; nothing has changed.
        """
        roots = [root for root, _ in self._wanted.values()]
        for root in roots:
            if len(roots) > 1:
                root.store.refuse_if_unmarkable()
            root.node.flush()
        members = tuple(GroupMember(root.name, uuid4()) for root in roots)
        group = uuid4()
        with frozen_nodes() as frozen:

            def freeze() -> None:
                frozen.freeze(roots)
                also()

            with self._at_rest():
                vm_clock_ns = self._machine.at_instant(freeze)
            date_sec, date_nsec = divmod(time.time_ns(), 1_000_000_000)
            steps = []
            for (root, name), member in zip(self._wanted.values(), members, strict=True):
                lineage = Lineage(member.snapshot, None, group, members)
                record = SnapshotRecord(name, date_sec, date_nsec, vm_clock_ns, lineage=lineage)
                failing = f"Failed to create snapshot '{name}' on device '{root.called}'"
                steps.append(Step(root.name, frozen.step(root, record).prepare, failing))
            with all_or_none(steps, kind=GroupKind.SAVE):
                pass


def delete(graph: BlockGraph, node: Node, device: str, *, id: str | None, name: str | None) -> SnapshotInfo:
    """Delete one snapshot of one node, by id, by name, or by both.

    :param device: what the node was called.
    :return: what was deleted. :raise InvalidRequest: neither id nor name.
    :raise NotFound: no snapshot fits what was given.
    """
    _refuse_below(graph, node)
    if id is None and name is None:
        raise InvalidRequest("Name or id must be provided")
    store = node.snapshot_store
    if store is None:
        raise Unsupported("Failed to get a snapshot list: Operation not supported")
    for found in store.snapshots():
        if id in (None, found.id) and name in (None, found.name):
            break
    else:
        missing_id, missing_name = ("null" if given is None else given for given in (id, name))
        raise NotFound(
            f"Snapshot with id '{missing_id}' and name '{missing_name}' does not exist on device '{device}'"
        )
    if node.read_only:
        raise Refused(f"Device '{device}' is read-only")
    failing = f"Could not delete snapshot '{found.name}' on '{device}'"
    with all_or_none([Step(node.node_name, lambda: store.prepare_delete(found), failing)]):
        pass
    return found
