"""Saving a machine that gives its state as a stream.

    1  refuse what cannot be saved; flush the disks while the guest runs
    2  pause: freeze every node, have the stream begin; the guest goes on (`StreamedMachine.captured`)
    3  the stream on its way into the state node: its pages compared with the parent's, those that are news written
    4  commit, as any save

Before 4 every failure and every cancel leaves nothing behind, and the guest runs as before.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from uuid import UUID

from stillframe.block.node import PageIndexPlace, PendingSnapshot
from stillframe.errors import Corrupt, IOFailed, LimitReached
from stillframe.machine.control import CapturedState, Quiesce, StreamedMachine
from stillframe.snapshots.context import AtRest, Context, told
from stillframe.snapshots.ground import STALE_AT_MOST, Base, find_base, read_page_index
from stillframe.snapshots.group import frozen_nodes
from stillframe.snapshots.save import InstantTime, commit_save, shared, tell_state, write_index
from stillframe.snapshots.selection import SaveSelection, SnapshotNode
from stillframe.vmstate.page_index import PageIndex
from stillframe.vmstate.relayed import RelayedHead, RelayedTail, read_tail, timer_ns
from stillframe.vmstate.relaying import RelayBase, relay_memory
from stillframe.vmstate.transfer import state_sink

MAXIMUM_DEVICE_STATE = 256 << 20
"""Bytes of a stream behind its memory. QEMU's own devices have a few thousand each."""


def save_streamed(
    machine: StreamedMachine,
    selection: SaveSelection,
    context: Context,
    *,
    standing: UUID | None = None,
    at_rest: AtRest = nullcontext,
    description: str = "",
    quiesce: Quiesce | None = None,
    stale_at_most: float = STALE_AT_MOST,
) -> UUID:
    """Make the snapshot; the guest goes on as it did, whatever comes of it.

    :param standing: the snapshot that the machine was last saved to or loaded from.
    :param at_rest: held for the instant. :param quiesce: the guest's file systems stand still for it.
    :param stale_at_most: the part of a stream that may be out of force where it is continued.
    :return: the UUID of the state node's snapshot.
    :raise Refused: nothing was touched. :raise Cancelled: :raise Failed: nothing is left behind.
    """
    machine.refuse_without_memory()
    machine.refuse_outside_state()
    total = machine.memory_size + 1
    context.progress(0, total)
    tell_left_out(
        machine,
        [node.name for node in selection.nodes],
        context,
        "the machine state has it, and a load writes it back",
    )
    for node in selection.nodes:
        context.checkpoint()
        node.node.flush()
    with frozen_nodes() as frozen:
        when = InstantTime.now(0)

        def freeze() -> None:
            nonlocal when
            frozen.freeze(selection.nodes)
            when = InstantTime.now(0)

        with ExitStack() as stack:
            captured = machine.captured(freeze, context.refuse_if_cancelled, quiesce, at_rest)
            capture = stack.enter_context(captured)
            if quiesce is not None:
                context.chose(
                    "file-systems", "running" if capture.not_quiesced else "frozen", capture.not_quiesced
                )
            pending = frozen.pending(selection.state.name)
            try:
                base, why = _base(selection.state, standing, capture.head, stale_at_most)
                base, why = shared(pending, base, why)
                context.chose("memory", capture.how, capture.why)
                tell_state(context, base, why)
                place, tail = _write(capture, selection.state, pending, base, context, total)
            except (IOFailed, Corrupt, LimitReached):
                with told("Error while writing VM state"):
                    raise
        when = replace(when, vm_clock_ns=timer_ns(tail.devices) or 0)
        identity = commit_save(selection, frozen, when, context, standing, description, place)
    context.progress(total, total)
    return identity


def tell_left_out(machine: StreamedMachine, names: Sequence[str], context: Context, of_firmware: str) -> None:
    """Name in the job what the guest can write to and the snapshot does not have.

    :param names: of the nodes that it has. :param of_firmware: what becomes of the content of a flash bank.
    """
    for disk in machine.disks:
        if disk.writable and disk.node_name not in names:
            why = (
                f"it is flash: {of_firmware}"
                if disk.firmware
                else "it is not listed: a load leaves it as it is"
            )
            context.chose("left-out", disk.node_name, why)


def _write(
    capture: CapturedState,
    state: SnapshotNode,
    pending: PendingSnapshot,
    base: Base | None,
    context: Context,
    total: int,
) -> tuple[PageIndexPlace, RelayedTail]:
    """The stream and its page index, into the pending snapshot, behind what it shares with the base."""
    done = 0

    def took(length: int) -> None:
        nonlocal done
        done += length
        # A page may come twice: where the guest writes while memory is sent.
        context.progress(min(done, total - 1), total)
        context.moved(length)

    source = capture.source()
    start, relayed = 0, None
    if base is not None:
        start = base.index.parts_end
        relayed = RelayBase(base.index, partial(state.store.read_state, base.snapshot))
    with state_sink(pending.write_state, start) as sink:
        index: PageIndex = relay_memory(source, capture.head, sink, relayed, took)
        tail = read_tail(capture.rest(source.offset, MAXIMUM_DEVICE_STATE))
        sink.write(tail.data)
    return write_index(pending, index, base), tail


def _base(
    state: SnapshotNode, standing: UUID | None, head: RelayedHead, stale_at_most: float
) -> tuple[Base | None, str]:
    """The snapshot whose stream this one can continue, whose beginning must be ours, byte for byte; else why there is none."""
    base, why = find_base(state, standing, head.blocks, read_page_index, stale_at_most)
    if base is not None:
        beginning = head.head + head.ram_start
        if state.store.read_state(base.snapshot, 0, len(beginning)) != beginning:
            return None, f"the state of '{base.snapshot.name}' was made by another machine"
    return base, why
