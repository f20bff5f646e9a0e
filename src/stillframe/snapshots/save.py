"""Saving: the machine of one instant, its disks and its memory, under one name.

    1  the disks are flushed while the guest runs
    2  pause: device states are taken, nodes and memory are frozen    the instant that the snapshot shows
    3  resume; the stream goes to the state node's pending snapshot
    4  every image is prepared; then the switches, members first      the state node's is the commit of the group

The guest stands still in 2 alone; what it does to memory and disks afterwards belongs to the future. Nothing that was
there before is touched by 1 to 3, and whatever fails or is cancelled up to the first switch leaves nothing behind.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from uuid import UUID, uuid4

from stillframe.block.node import (
    GroupKind,
    GroupMember,
    Lineage,
    PageIndexPlace,
    PendingSnapshot,
    SnapshotRecord,
)
from stillframe.errors import Corrupt, IOFailed, LimitReached, NotFound, Unsupported
from stillframe.machine.frozen import FrozenMemory
from stillframe.machine.frozen import frozen as frozen_memory
from stillframe.machine.machine import Machine
from stillframe.machine.memory import PAGE_SIZE
from stillframe.machine.run_state import RunState
from stillframe.machine.tracking import Changes
from stillframe.snapshots.context import AtRest, Context, told
from stillframe.snapshots.ground import Base, Ground, page_index_checksum
from stillframe.snapshots.group import FrozenNodes, all_or_none, frozen_nodes
from stillframe.snapshots.selection import SaveSelection, SnapshotNode
from stillframe.vmstate.page_index import PageIndex, pack_page_index
from stillframe.vmstate.sections import SectionState, global_state
from stillframe.vmstate.stream import MemoryContent, write_continuation, write_stream
from stillframe.vmstate.transfer import state_sink


@dataclass(frozen=True, slots=True)
class Instant:
    """What of the machine a snapshot shows, besides memory and disks; see `SnapshotRecord` for the times."""

    sections: tuple[SectionState, ...]
    time: "InstantTime"


@dataclass(frozen=True, slots=True)
class InstantTime:
    """When it was; see `SnapshotRecord`."""

    date_sec: int
    date_nsec: int
    vm_clock_ns: int

    @classmethod
    def now(cls, vm_clock_ns: int) -> "InstantTime":
        """By the host's clock."""
        return cls(*divmod(time.time_ns(), 1_000_000_000), vm_clock_ns)


def save(
    machine: Machine,
    selection: SaveSelection,
    context: Context,
    *,
    ground: Ground | None = None,
    at_rest: AtRest = nullcontext,
    description: str = "",
) -> UUID:
    """Make the snapshot; the guest goes on as it did, whatever comes of it.

    :param ground: what the machine stands on, which is this snapshot afterwards; None for a whole stream.
    :param at_rest: held for the instant.
    :return: the UUID of the state node's snapshot.
    :raise Cancelled: nothing is left behind. :raise Failed: storage; nothing is left behind.
    """
    machine.refuse_without_memory()
    total = sum(block.size for block in machine.memory) + 1
    context.progress(0, total)
    for node in selection.nodes:
        context.checkpoint()
        node.node.flush()
    run_state = machine.run_state
    with (
        _ground_for(machine, ground) as ground,
        frozen_nodes() as frozen,
        frozen_memory(machine.memory) as memory,
        ExitStack() as undo,
    ):
        ground.prepare()
        parent = ground.snapshot
        with at_rest(), machine.hold(RunState.SAVE_VM):
            instant = _take(machine, run_state)
            frozen.freeze(selection.nodes)
            memory.freeze()
            changes = ground.take()
            undo.callback(ground.put_back, changes)
        writing = _StateWriting(
            machine, selection.state, frozen, memory.copy, ground, changes, context, total
        )
        index, place = writing.write(instant)
        memory.release()
        identity = commit_save(selection, frozen, instant.time, context, parent, description, place)
        undo.pop_all()
        ground.stand(identity, index, changes)
    context.progress(total, total)
    return identity


@contextmanager
def _ground_for(machine: Machine, ground: Ground | None) -> Iterator[Ground]:
    """The caller's, or one for this save alone."""
    if ground is not None:
        yield ground
        return
    own = Ground(machine)
    try:
        yield own
    finally:
        own.close()


def _take(machine: Machine, run_state: RunState) -> Instant:
    """Held: the device states, and the time."""
    sections = [
        SectionState(device.section_name, device.instance_id, device.description, device.save_state())
        for device in machine.devices
    ]
    sections.append(global_state(run_state.value))
    return Instant(tuple(sections), InstantTime.now(machine.clock.ns))


class _StateWriting:
    """The stream of a save on its way to the state node: a continuation of the ground's where that is possible."""

    def __init__(
        self,
        machine: Machine,
        state: SnapshotNode,
        frozen: FrozenNodes,
        memory: FrozenMemory,
        ground: Ground,
        changes: Changes,
        context: Context,
        total: int,
    ) -> None:
        self._board = machine.board.name
        self._blocks = list(machine.memory)
        self._content = [
            MemoryContent(block.name, block.size, partial(memory.readinto, block)) for block in self._blocks
        ]
        self._state = state
        self._pending = frozen.pending(state.name)
        self._memory = memory
        self._ground = ground
        self._changes = changes
        self._context = context
        self._total = total
        self._done = 0

    def _wrote(self, length: int) -> None:
        self._done += length
        self._context.progress(self._done, self._total)
        self._context.checkpoint()

    def _write_at(self, offset: int, data: memoryview) -> None:
        self._pending.write_state(offset, data)
        self._context.moved(len(data))

    def write(self, instant: Instant) -> tuple[PageIndex, PageIndexPlace]:
        """The stream and its page index. :return: the index, and where it lies."""
        self._context.checkpoint()
        try:
            base, why = shared(
                self._pending, *self._ground.base(self._state, [content.block for content in self._content])
            )
            changed = [self._changes.pages(block, self._memory) for block in self._blocks]
            tracking = self._ground.tracking
            self._context.chose("memory", self._memory.how, self._memory.why)
            self._context.chose("changes", tracking.how, tracking.why)
            tell_state(self._context, base, why)
            if base is not None:
                unchanged = self._total - 1 - sum(map(len, changed)) * PAGE_SIZE
                self._wrote(unchanged)
                with state_sink(self._write_at, base.index.parts_end) as sink:
                    index = write_continuation(
                        sink, self._board, base.index, self._content, changed, instant.sections, self._wrote
                    )
            else:
                with state_sink(self._write_at) as sink:
                    index = write_stream(sink, self._board, self._content, instant.sections, self._wrote)
            return index, write_index(self._pending, index, base)
        except (IOFailed, Corrupt, LimitReached):
            with told("Error while writing VM state"):
                raise


def shared(pending: PendingSnapshot, base: Base | None, why: str) -> tuple[Base | None, str]:
    """The base, its clusters being the pending snapshot's too; else why there is none, or they cannot be."""
    if base is None:
        return None, why
    try:
        pending.share_state(base.snapshot, base.index.parts_end)
    except (NotFound, Unsupported) as error:
        return None, error.message
    return base, ""


def tell_state(context: Context, base: Base | None, why: str) -> None:
    """In the job: whether the state continues an older one. :param why: it does not."""
    if base is None:
        context.chose("state", "whole", why)
    else:
        context.chose("state", "continued", f"the machine stands on '{base.snapshot.name}'")


def write_index(pending: PendingSnapshot, index: PageIndex, base: Base | None) -> PageIndexPlace:
    """Behind the stream. :param base: what the stream continues. :raise IOFailed: :raise LimitReached:"""
    packed = pack_page_index(index)
    offset = pending.write_page_index(packed)
    stream = uuid4() if base is None else base.stream
    ram_size = sum(block.length for block in index.blocks)
    return PageIndexPlace(offset, len(packed), page_index_checksum(packed), stream, ram_size)


def commit_save(
    selection: SaveSelection,
    frozen: FrozenNodes,
    when: InstantTime,
    context: Context,
    parent: UUID | None,
    description: str,
    page_index: PageIndexPlace,
) -> UUID:
    """Members first: the state node's switch commits the group."""
    in_order = (selection.state, *selection.members)
    group = uuid4()
    members = tuple(GroupMember(node.name, uuid4()) for node in in_order)
    records = {
        member.node_name: SnapshotRecord(
            name=selection.tag,
            date_sec=when.date_sec,
            date_nsec=when.date_nsec,
            vm_clock_ns=when.vm_clock_ns,
            lineage=Lineage(
                member.snapshot,
                parent,
                group,
                members,
                description,
                page_index if member is members[0] else None,
            ),
        )
        for member in members
    }
    steps = [frozen.step(node, records[node.name]) for node in (*selection.members, selection.state)]
    with all_or_none(steps, before_commit=context.point_of_no_return, kind=GroupKind.SAVE):
        pass
    return members[0].snapshot
