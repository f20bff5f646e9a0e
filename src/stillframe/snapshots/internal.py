"""Snapshots of one disk alone, without machine state: `blockdev-snapshot-internal-sync` and its
counterpart."""

import time
from uuid import uuid4

from stillframe.block.graph import BlockGraph
from stillframe.block.node import GroupMember, Lineage, Node, SnapshotInfo, SnapshotRecord
from stillframe.errors import AlreadyExists, InvalidRequest, NotFound, Refused, Unsupported
from stillframe.machine.control import MachineControl
from stillframe.snapshots.context import AtRest
from stillframe.snapshots.group import Step, all_or_none, frozen_nodes
from stillframe.snapshots.selection import SnapshotNode, check_tag


def _root(graph: BlockGraph, node: Node) -> SnapshotNode:
    if graph.parents(node):
        raise Refused("Need a root block node", remedy="Name the node above it.")
    store = node.snapshot_store
    if store is None:
        raise Unsupported(
            f"Block format '{node.driver}' used by device '{node.node_name}' does not support internal snapshots"
        )
    return SnapshotNode(node, store)


def create(machine: MachineControl, graph: BlockGraph, node: Node, name: str, at_rest: AtRest) -> None:
    """Snapshot the content of one node; the guest goes on, its requests wait for the instant alone.

    :raise Refused: in QEMU's words; nothing was touched. :raise Failed: storage; nothing has changed.
    """
    root = _root(graph, node)
    if not name:
        raise InvalidRequest("Name is empty")
    check_tag(name)
    if node.read_only:
        raise Refused(f"Device '{node.node_name}' is read-only and cannot take part in snapshots")
    if root.named(name) is not None:
        raise AlreadyExists(
            f"Snapshot with name '{name}' already exists on device '{node.node_name}'",
            remedy="Choose another name, or delete that snapshot first.",
        )
    node.flush()
    identity = uuid4()
    lineage = Lineage(identity, None, uuid4(), (GroupMember(node.node_name, identity),))
    with frozen_nodes() as frozen:
        with at_rest():
            vm_clock_ns = machine.at_instant(lambda: frozen.freeze([root]))
        date_sec, date_nsec = divmod(time.time_ns(), 1_000_000_000)
        record = SnapshotRecord(name, date_sec, date_nsec, vm_clock_ns, lineage=lineage)
        failing = f"Failed to create snapshot '{name}' on device '{node.node_name}'"
        step = frozen.step(node.node_name, record)
        with all_or_none([Step(step.node_name, step.prepare, failing)]):
            pass


def delete(graph: BlockGraph, node: Node, *, id: str | None, name: str | None) -> SnapshotInfo:
    """Delete one snapshot of one node, by id, by name, or by both.

    :return: what was deleted. :raise InvalidRequest: neither id nor name.
    :raise NotFound: no snapshot fits what was given.
    """
    root = _root(graph, node)
    if id is None and name is None:
        raise InvalidRequest("Name or id must be provided")
    for found in root.store.snapshots():
        if id in (None, found.id) and name in (None, found.name):
            break
    else:
        missing_id, missing_name = ("null" if given is None else given for given in (id, name))
        raise NotFound(
            f"Snapshot with id '{missing_id}' and name '{missing_name}' does not exist on device "
            f"'{node.node_name}'"
        )
    if node.read_only:
        raise Refused(f"Device '{node.node_name}' is read-only")
    failing = f"Could not delete snapshot '{found.name}' on '{node.node_name}'"
    with all_or_none([Step(node.node_name, lambda: root.store.prepare_delete(found), failing)]):
        pass
    return found
