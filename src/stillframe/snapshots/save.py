"""Saving: the machine of one instant, its disks and its memory, under one name.

    1  the disks are flushed while the guest runs
    2  pause: device states are taken, nodes and memory are frozen    the instant that the snapshot shows
    3  resume; the stream goes to the state node's pending snapshot
    4  every image is prepared; then the switches, members first      the state node's is the commit of the group

The guest stands still in 2 alone; what it does to memory and disks afterwards belongs to the future. Nothing that was
there before is touched by 1 to 3, and whatever fails or is cancelled up to the first switch leaves nothing behind.
"""

import time
from dataclasses import dataclass
from functools import partial
from uuid import UUID, uuid4

from stillframe.block.node import GroupMember, Lineage, SnapshotRecord
from stillframe.errors import Corrupt, IOFailed, LimitReached
from stillframe.machine.frozen import FrozenMemory
from stillframe.machine.frozen import frozen as frozen_memory
from stillframe.machine.machine import Machine
from stillframe.machine.run_state import RunState
from stillframe.snapshots.context import Context, told
from stillframe.snapshots.group import FrozenNodes, all_or_none, frozen_nodes
from stillframe.snapshots.selection import SaveSelection, SnapshotNode
from stillframe.vmstate.sections import SectionState, global_state
from stillframe.vmstate.stream import MemoryContent, write_stream
from stillframe.vmstate.transfer import state_sink


@dataclass(frozen=True, slots=True)
class Instant:
    """What of the machine a snapshot shows, besides memory and disks; see `SnapshotRecord` for the times."""

    sections: tuple[SectionState, ...]
    date_sec: int
    date_nsec: int
    vm_clock_ns: int


def save(
    machine: Machine,
    selection: SaveSelection,
    context: Context,
    *,
    parent: UUID | None = None,
    description: str = "",
) -> UUID:
    """Make the snapshot; the guest goes on as it did, whatever comes of it.

    :param parent: the snapshot that the machine stands on.
    :return: the UUID of the state node's snapshot, on which the machine stands now.
    :raise Cancelled: nothing is left behind. :raise Failed: storage; nothing is left behind.
    """
    total = sum(block.size for block in machine.memory) + 1
    context.progress(0, total)
    for node in selection.nodes:
        context.checkpoint()
        node.node.flush()
    run_state = machine.run_state
    with frozen_nodes() as frozen, frozen_memory(machine.memory) as memory:
        with machine.hold(RunState.SAVE_VM):
            instant = _take(machine, run_state)
            frozen.freeze(selection.nodes)
            memory.freeze()
        _write_state(machine, selection.state, frozen, instant, memory.copy, context, total)
        identity = _commit(selection, frozen, instant, context, parent, description)
    context.progress(total, total)
    return identity


def _take(machine: Machine, run_state: RunState) -> Instant:
    """Held: the device states, and the time."""
    sections = [
        SectionState(device.section_name, device.instance_id, device.description, device.save_state())
        for device in machine.devices
    ]
    sections.append(global_state(run_state.value))
    date_sec, date_nsec = divmod(time.time_ns(), 1_000_000_000)
    return Instant(tuple(sections), date_sec, date_nsec, machine.clock.ns)


def _write_state(
    machine: Machine,
    state: SnapshotNode,
    frozen: FrozenNodes,
    instant: Instant,
    memory: FrozenMemory,
    context: Context,
    total: int,
) -> None:
    done = 0

    def wrote(length: int) -> None:
        nonlocal done
        done += length
        context.progress(done, total)
        context.checkpoint()

    context.checkpoint()
    content = [
        MemoryContent(block.name, block.size, partial(memory.readinto, block)) for block in machine.memory
    ]
    try:
        with state_sink(frozen.state_writer(state.name)) as sink:
            write_stream(sink, machine.board.name, content, instant.sections, wrote)
    except (IOFailed, Corrupt, LimitReached):
        with told("Error while writing VM state"):
            raise


def _commit(
    selection: SaveSelection,
    frozen: FrozenNodes,
    instant: Instant,
    context: Context,
    parent: UUID | None,
    description: str,
) -> UUID:
    """Members first: the state node's switch commits the group."""
    in_order = (selection.state, *selection.members)
    group = uuid4()
    members = tuple(GroupMember(node.name, uuid4()) for node in in_order)
    records = {
        member.node_name: SnapshotRecord(
            name=selection.tag,
            date_sec=instant.date_sec,
            date_nsec=instant.date_nsec,
            vm_clock_ns=instant.vm_clock_ns,
            lineage=Lineage(member.snapshot, parent, group, members, description),
        )
        for member in members
    }
    steps = [frozen.step(node.name, records[node.name]) for node in (*selection.members, selection.state)]
    with all_or_none(steps, before_commit=context.point_of_no_return):
        pass
    return members[0].snapshot
