"""Loading into a machine that takes its state as a stream: a successor gets it, and takes the machine's place.

    1  while the guest runs: the stream's beginning and end are read, a successor is started beside the machine
    2  pause; the successor gets the state, and says whether it can take it
    3  every image is prepared, then switched, the state node's last: the commit
    4  the successor is the machine, and runs; the former one is ended
    5  with a page index, its memory comes while it runs

A failure or a cancel before 3's end leaves the machine as it was: it never ceased to be there. A failure in 5 stops the guest.

Where the two do not go side by side, for want of memory or of an address that both would listen at, the caller may ask that the
successor replace the machine. Then 1 examines the whole stream, and starts nobody; 2 ends the machine and starts the successor.
After a failure from there on there is no guest, the disks are as it left them, and the machine waits for another load.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from uuid import UUID

from stillframe.block.node import GroupKind
from stillframe.block.open_state import OpenState
from stillframe.errors import StillframeError, Unsupported, io_failed
from stillframe.machine.control import StoredState, StreamedMachine, Successor
from stillframe.snapshots.context import AtRest, Context
from stillframe.snapshots.group import all_or_none
from stillframe.snapshots.later_memory import known_pages, stop_without
from stillframe.snapshots.load import explained, reverts
from stillframe.snapshots.room import refuse_without_room
from stillframe.snapshots.selection import Found, LoadSelection
from stillframe.snapshots.streamed_save import MAXIMUM_DEVICE_STATE, tell_left_out
from stillframe.vmstate import layout
from stillframe.vmstate.relayed import RelayedTail, read_head, read_tail
from stillframe.vmstate.relaying import relay_memory
from stillframe.vmstate.transfer import StateSource, state_sink

_OR_REPLACE = (
    "End other programs; or load with --replace, which ends the guest before the one that goes on is started."
)
_END = len(layout.mark(layout.END, 0)) + 8 + len(layout.mark(layout.FOOTER, 0))
"""Bytes of RAM's END, which holds nothing but its end record."""


def load_streamed(
    machine: StreamedMachine,
    selection: LoadSelection,
    context: Context,
    *,
    eager: bool = False,
    replace: bool = False,
    at_rest: AtRest = nullcontext,
) -> UUID | None:
    """Bring the machine and the listed nodes to the snapshot; a guest that ran goes on from there.

    :param eager: the guest runs only when all of its memory is there. :param at_rest: held while the disks are exchanged.
    :param replace: the machine is ended before its successor is started; see the module's text.
    :return: the UUID of the state node's snapshot, on which the machine stands now; None if it has none.
    :raise Refused: :raise Corrupt: :raise Cancelled: :raise Failed: the machine is as it was; but for an `IOFailed` while memory
        comes, which stops it, and for what `replace` risks.
    """
    found = selection.state
    snapshot, read = found.snapshot, partial(found.node.store.read_state, found.snapshot)
    total = snapshot.state_size + 1
    context.progress(0, total)
    _refuse_other_sizes(selection)
    if not replace:
        refuse_without_room(machine.memory_size, _OR_REPLACE)
    with ExitStack() as stack:
        if replace:
            with explained():
                _examine(machine, found, context, total)
        with explained():
            later, why = (None, "it was asked for") if eager else _to_come(found, stack)

        def begin() -> tuple[Successor, StoredState | None]:
            successor = stack.enter_context(machine.successor())
            with explained():
                refusal = successor.listen(later=later is not None)
            at_once = later is None or bool(refusal)
            context.chose("memory", "eager" if at_once else "lazy", refusal or why)
            return successor, None if at_once else later

        if not replace:
            successor, later = begin()
        context.checkpoint()
        names = [each.node.name for each in selection.all]
        tell_left_out(
            machine, names, context, "its content comes with the machine state and is written into it"
        )
        with at_rest(), ExitStack() as pause:
            if replace:
                context.point_of_no_return()
                context.chose("machine", "replaced", "its QEMU is ended before the other one is started")
                gone = f"Its guest was ended to load snapshot '{selection.tag}', which then failed"
                pause.enter_context(machine.standing_still(found.node.node, gone=gone))
                pause.enter_context(_told_as_gone())
                successor, later = begin()
            else:
                pause.enter_context(machine.standing_still(found.node.node))
            with explained():
                _offer(successor, later, snapshot.state_size, read, context, total)
            with all_or_none(
                reverts(selection), before_commit=context.point_of_no_return, kind=GroupKind.LOAD
            ):
                machine.become(successor)
        if later is not None:
            _fill(machine, successor, found, context, total)
    context.progress(total, total)
    return snapshot.lineage.snapshot if snapshot.lineage else None


@contextmanager
def _told_as_gone() -> Iterator[None]:
    """An error of the block says what has become of the guest."""
    try:
        yield
    except StillframeError as error:
        error.message = f"{error.message}; the guest had been ended for this load, and is gone"
        error.args = (error.message,)
        error.left = "The disks are as the guest left them; load a snapshot"
        raise


def _examine(machine: StreamedMachine, found: Found, context: Context, total: int) -> None:
    """The whole stream, before the only guest there is is ended for it. :raise Refused: :raise Corrupt: :raise Failed:"""
    store, snapshot, size = found.node.store, found.snapshot, found.snapshot.state_size
    read = partial(store.read_state, snapshot)

    def reached(offset: int) -> None:
        context.checkpoint()
        context.progress(min(offset, size) // 2, total)

    source = StateSource(read, size, on_read=reached)
    head = read_head(source)
    machine.refuse_unlike(head)
    with state_sink(lambda offset, data: None) as nowhere:
        relay_memory(source, head, nowhere)
    _device_state(source, read, source.offset, size)


def _refuse_other_sizes(selection: LoadSelection) -> None:
    """:raise Unsupported: a disk had another size; the successor has seen the present one."""
    for found in selection.all:
        size = found.snapshot.disk_size
        if size != found.node.node.size:
            raise Unsupported(
                f"Node '{found.node.name}' has {found.node.node.size} bytes, and had {size} in snapshot '{selection.tag}'",
                remedy="Resize it to what it had, then load.",
            )


def _to_come(found: Found, stack: ExitStack) -> tuple[StoredState | None, str]:
    """The stream, if its memory can come later; else why not. :raise StreamCorrupt: it is no machine state."""
    snapshot, store = found.snapshot, found.node.store
    read = partial(store.read_state, snapshot)
    source = StateSource(read, snapshot.state_size, transfer=4096)
    head = read_head(source)
    index, why = known_pages(found, head.blocks)
    if index is None:
        return None, why
    tail = _device_state(source, read, index.parts_end + _END, snapshot.state_size)
    state = store.open_state(snapshot, snapshot.state_size)
    if state is None:
        return StoredState(head, tail.devices, index, read, None), ""
    stack.callback(os.close, state.fd)
    return StoredState(head, tail.devices, index, partial(_read, state), (state.fd,)), ""


def _device_state(source: StateSource, read: "partial[bytes]", start: int, size: int) -> RelayedTail:
    """What stands behind the memory, from `start` on. :param size: of the stream. :raise StreamCorrupt: it cannot be that."""
    length = size - start
    if not 0 < length <= MAXIMUM_DEVICE_STATE:
        raise source.corrupt(f"{length} bytes of device state")
    return read_tail(read(start, length))


def _read(state: OpenState, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    try:
        state.readinto(offset, memoryview(buffer))
    except OSError as error:
        raise io_failed("Could not read the machine state", error) from error
    return bytes(buffer)


def _offer(
    successor: Successor,
    later: StoredState | None,
    size: int,
    read: "partial[bytes]",
    context: Context,
    total: int,
) -> None:
    if later is not None:
        successor.offer(later)
        return
    done = 0

    def took(length: int) -> None:
        nonlocal done
        done += length
        context.progress(done, total)

    successor.offer_all(size, read, took, context.checkpoint)


def _fill(machine: StreamedMachine, successor: Successor, found: Found, context: Context, total: int) -> None:
    done = 0

    def came(length: int) -> None:
        nonlocal done
        done = min(done + length, total - 1)
        context.progress(done, total)
        context.moved(length)

    try:
        successor.fill(came, context.checkpoint)
    except BaseException as error:
        stop_without(machine, found, error, "load a snapshot")
        raise
