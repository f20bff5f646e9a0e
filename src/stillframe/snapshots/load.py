"""Loading: the machine becomes what a snapshot shows, or stays what it is.

    1  the whole stream is read while the guest runs: sections, versions, fields and sizes are checked
       against this machine, and the memory is gathered beside the guest's; of a snapshot nearby (rewind.py)
       the devices alone are read here, and in 2 the pages that differ
    2  pause; the undo point: the devices' present state
    3  every image is prepared; then the switches to the snapshot's disks, the state node's last
    4  memory is exchanged, devices take their state over
    5  what only the old disks used is given back; resume

A failure or a cancel in 1 leaves the guest running as it was; it never stopped. After one in 2 to 4 the
images are rolled back, the memory is exchanged back, the devices get the state of the undo point, and the
guest goes on.
"""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

from stillframe.block.node import GroupKind
from stillframe.errors import Corrupt, IOFailed, StateMismatch
from stillframe.machine.devices import Device
from stillframe.machine.machine import Machine
from stillframe.machine.run_state import RunState
from stillframe.snapshots.context import AtRest, Context, add_left, told
from stillframe.snapshots.ground import Ground
from stillframe.snapshots.group import Step, all_or_none
from stillframe.snapshots.lazy import LazyMemory, lazy_memory
from stillframe.snapshots.rewind import NearbyMemory
from stillframe.snapshots.room import refuse_without_room
from stillframe.snapshots.selection import Found, LoadSelection
from stillframe.snapshots.staging import StagedMemory
from stillframe.vmstate.fields import Description, Values
from stillframe.vmstate.sections import GLOBAL_STATE, GLOBAL_STATE_KEY, SectionKey
from stillframe.vmstate.stream import Survey, survey, survey_devices
from stillframe.vmstate.transfer import CHUNK, StateSource

_DEVICES_TRANSFER = 16 << 10
"""Bytes: the devices' part of a state is some ten thousand."""


def load(
    machine: Machine,
    selection: LoadSelection,
    context: Context,
    *,
    ground: Ground | None = None,
    eager: bool = False,
    at_rest: AtRest = nullcontext,
) -> None:
    """Bring the machine and the listed nodes to the snapshot; a guest that ran goes on from there.

    :param ground: what the machine stands on, which is this snapshot afterwards; without one, nothing comes later.
    :param eager: the guest runs only when all of its memory is there. :param at_rest: held while the disks are exchanged.
    :raise StateMismatch: the state does not fit this machine: device, section and field are named.
    :raise Corrupt: the state is damaged. :raise Cancelled: in time. :raise Failed: storage.
        After each of these the guest is as it was; but for an `IOFailed` while memory comes (lazy.py), which stops it.
    """
    state = selection.state.snapshot
    total = state.state_size + 1
    context.progress(0, total)
    with ExitStack() as stack:
        memory, values = _checked_state(machine, selection.state, context, total, ground, stack, eager=eager)
        context.checkpoint()
        _exchange(machine, selection, context, memory, values, ground, at_rest)
        if isinstance(memory, LazyMemory):
            # The rest, devices and what is zero, is there already.
            there = total - 1 - memory.bytes_to_come
            context.progress(there, total)
            with explained():
                memory.fill(context, lambda done: context.progress(there + done, total))
    context.progress(total, total)


def _exchange(
    machine: Machine,
    selection: LoadSelection,
    context: Context,
    memory: LazyMemory | NearbyMemory | StagedMemory,
    values: Mapping[SectionKey, Values],
    ground: Ground | None,
    at_rest: AtRest,
) -> None:
    """From the pause to the resume."""
    state = selection.state.snapshot
    with at_rest(), machine.hold(RunState.RESTORE_VM):
        if isinstance(memory, NearbyMemory) and ground is not None:
            with explained():
                memory.stage(ground.changed())
        with _undo_point(machine, memory) as exchange:
            with all_or_none(
                reverts(selection), before_commit=context.point_of_no_return, kind=GroupKind.LOAD
            ):
                exchange()
                with explained():
                    for device in machine.devices:
                        device.load_state(values[_key(device)])
        if isinstance(memory, LazyMemory):
            machine.memory_is_whole(memory.still_comes)
        else:
            machine.memory_is_whole()
        if ground is not None and not isinstance(memory, LazyMemory):
            index = memory.index if isinstance(memory, NearbyMemory) else None
            ground.stand_here(state.lineage.snapshot if state.lineage else None, index)
        machine.new_generation_id()
        if machine.run_state.needs_reset:
            machine.set_run_state(RunState.PAUSED)


def _checked_state(
    machine: Machine,
    found: Found,
    context: Context,
    total: int,
    ground: Ground | None,
    stack: ExitStack,
    *,
    eager: bool,
) -> tuple[LazyMemory | NearbyMemory | StagedMemory, Mapping[SectionKey, Values]]:
    """While the guest runs: what its memory is to become, and each device's values, that it can take."""
    with explained():
        nearby = ground.nearby(found.node, found.snapshot) if ground is not None else None
        if nearby is not None:
            context.chose("memory", "rewind")
            source, known = _source(machine, found, context, total, transfer=_DEVICES_TRANSFER)
            return nearby, _checked(machine, survey_devices(source, machine.board.name, known, nearby.index))
        lazy, why = None, "asked for"
        if ground is not None and not eager:
            lazy, why = lazy_memory(machine, found, ground)
        if lazy is not None:
            context.chose("memory", "lazy")
            stack.callback(lazy.close)
            source, known = _source(
                machine, found, context, total, _DEVICES_TRANSFER, most=total - 1 - lazy.bytes_to_come
            )
            return lazy, _checked(machine, survey_devices(source, machine.board.name, known, lazy.index))
        context.chose("memory", "eager", why)
        refuse_without_room(min(found.snapshot.state_size, sum(block.size for block in machine.memory)))
        staged = StagedMemory(machine.memory)
        source, known = _source(machine, found, context, total, moved=context.moved)
        return staged, _checked(machine, survey(source, machine.board.name, known, staged))


@contextmanager
def _undo_point(
    machine: Machine, staged: LazyMemory | NearbyMemory | StagedMemory
) -> Iterator[Callable[[], None]]:
    """Held: memory and devices as they are now, put back if the block raises, after it has put the disks
    back.

    :return: what exchanges the memory.
    """
    undo = [(device, device.save_state()) for device in machine.devices]
    exchanged = False

    def exchange() -> None:
        nonlocal exchanged
        staged.exchange()
        exchanged = True

    try:
        yield exchange
    except BaseException as error:
        if exchanged:
            staged.exchange()
            for device, values in undo:
                _put_back(device, values, error)
        raise


@contextmanager
def explained() -> Iterator[None]:
    """QEMU's words, with the errno in them, before what is wrong; a cancellation has words of its own."""
    try:
        yield
    except (StateMismatch, Corrupt):
        with told(f"Error -{errno.EINVAL} while loading VM state"):
            raise
    except IOFailed as error:
        with told(f"Error -{error.errno} while loading VM state"):
            raise


def _source(
    machine: Machine,
    found: Found,
    context: Context,
    total: int,
    transfer: int = CHUNK,
    *,
    most: int | None = None,
    moved: Callable[[int], None] = lambda count: None,
) -> tuple[StateSource, Mapping[SectionKey, Description]]:
    """The stream, and the sections that this machine can take.

    :param most: the progress that reading it can be. :param moved: called with the bytes of each transfer, after it.
    """
    store, snapshot = found.node.store, found.snapshot
    known: dict[SectionKey, Description] = {_key(device): device.description for device in machine.devices}
    known[GLOBAL_STATE_KEY] = GLOBAL_STATE

    def on_read(offset: int) -> None:
        context.progress(offset if most is None else min(offset, most), total)
        context.checkpoint()

    def read(offset: int, length: int) -> bytes:
        data = store.read_state(snapshot, offset, length)
        moved(len(data))
        return data

    source = StateSource(
        read,
        snapshot.state_size,
        transfer=transfer,
        on_read=on_read,
    )
    return source, known


def _checked(machine: Machine, found: Survey) -> Mapping[SectionKey, Values]:
    """Each device's values, that it can take. :raise StateMismatch: a section is missing, a device
    refuses."""
    if found.blocks is None and machine.memory.blocks:
        raise StateMismatch("The machine state has no section 'ram'", section="ram")
    values: dict[SectionKey, Values] = {}
    for device in machine.devices:
        section = found.sections.get(_key(device))
        if section is None:
            raise StateMismatch(
                f"The machine state has no section '{device.section_name}' {device.instance_id}, which this "
                "machine has",
                section=device.section_name,
                remedy="Start the machine with the devices that it had when it was saved.",
            )
        device.check_state(section.values)
        values[_key(device)] = section.values
    return values


def reverts(selection: LoadSelection) -> list[Step]:
    """The state node's switch comes last, as in a save. A node that is what its snapshot shows has nothing to do."""
    in_order = [found for found in selection.all if found.node is not selection.state.node]
    in_order += [found for found in selection.all if found.node is selection.state.node]
    return [_revert(found) for found in in_order if not found.node.store.shows(found.snapshot)]


def _revert(found: Found) -> Step:
    node, snapshot = found.node, found.snapshot
    return Step(
        node.name,
        lambda: node.store.prepare_revert(snapshot),
        f"Could not load snapshot '{snapshot.name}' on '{node.called}'",
    )


def _put_back(device: Device, values: Values, error: BaseException) -> None:
    try:
        device.load_state(values)
    except Exception as further:
        add_left(error, f"Device '{device.section_name}' could not be brought back to what it was: {further}")


def _key(device: Device) -> SectionKey:
    return device.section_name, device.instance_id
