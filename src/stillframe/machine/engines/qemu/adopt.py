"""A machine whose stillframe was killed is taken over: its QEMU lives, and its disk requests wait.

    1  the record is read and the directory locked (home.py); the images are opened, which replays what was acknowledged and not
       flushed (block/qcow2/replay.py); a load of several images that was cut is brought to an end (snapshots/recovery.py)
    2  each disk must be the one that the guest had, and hold every write that it was told of: else QEMU is ended, since a guest
       that goes on with another disk destroys it
    3  of two QEMUs, as there are in a load, the one whose memory belongs to the disks is the machine; the other is ended
    4  the exports are served where they were, QEMU's monitor and serial port connected, a migration of ours brought to its end,
       and the guest runs if it was we who had stopped it

1 to 3 are `take_over`, before anything is served; 4 is `QemuMachine.adopt`.
"""

import time
from collections.abc import Callable
from typing import Final

from stillframe.block.node import Node
from stillframe.block.qcow2 import Qcow2Node
from stillframe.errors import NotFound, PeerError, Refused
from stillframe.machine.engines.qemu.beside import give_sockets_back, give_sockets_up
from stillframe.machine.engines.qemu.home import (
    MachineHome,
    NodeNote,
    Record,
    identity_of,
    living_of,
    open_process,
)
from stillframe.machine.engines.qemu.monitor import QemuMonitor

_POLL_SECONDS: Final = 0.01
_CANCEL_SECONDS: Final = 60.0
_OVER: Final = frozenset({"", "none", "completed", "failed", "cancelled"})
_MEMORY_MISSING: Final = frozenset(
    {"postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup"}
)


def take_over(home: MachineHome, find: Callable[[str], Node | None]) -> None:
    """Steps 2 and 3 of the module's text; the record's process is the machine afterwards.

    :param home: as found. :param find: a node by its name, opened for the guest to use.
    :raise NotFound: QEMU has ended. :raise Refused: it cannot go on, and was ended. Either way nothing is left of the machine.
    """
    record = home.record
    if record is None:
        raise TypeError("a machine that is found has a record")
    name = home.path.stem
    unfit = (_unfit(note, find, marked=home.was_marked) for note in record.nodes)
    why = next(filter(None, unfit), None)
    committed = record.load is not None and active_table(find(record.load.node_name)) != record.load.table
    if why is None and committed:
        record = _with_successor(home, record)
    if why is None and record.filling:
        why = "Memory of the snapshot that it was loaded from had still to come; load it again"
    if why is not None:
        _end_all(home, record)
        raise Refused(
            f"The guest of '{name}' cannot go on: {why}",
            remedy="Start the machine anew.",
            left="Its QEMU was ended, as if its plug was pulled; its images are whole",
        )
    if record.process is None or open_process(record.process) is None:
        words = _last_words(home)
        _end_all(home, record)
        raise NotFound(
            f"The QEMU of '{name}' has ended, too" + (f"; it said: {words}" if words else ""),
            remedy="Start the machine anew; its images are whole.",
        )
    if record.successor is not None and (other := open_process(record.successor)) is not None:
        other.kill()
    give_sockets_back(record.process.pid)
    home.note(successor=None, load=None)
    home.clear_but(record.process)
    home.stays = False


def _with_successor(home: MachineHome, record: Record) -> Record:
    """The load was committed: the disks are the snapshot's, and the former machine's memory is of other ones."""
    if record.process is not None and (former := open_process(record.process)) is not None:
        give_sockets_up(former.pid)
        former.kill()
    home.note(process=record.successor, successor=None, load=None)
    return home.record or record


def _end_all(home: MachineHome, record: Record) -> None:
    for each in living_of(record):
        each.kill()
    home.stays = False


def _last_words(home: MachineHome) -> str:
    found = home.record.process if home.record is not None else None
    if found is None:
        return ""
    try:
        data = (home.path / str(found.directory) / "errors").read_bytes()[-500:]
    except OSError:
        return ""
    return "; ".join(line for line in data.decode("utf-8", "replace").splitlines() if line.strip())


def _unfit(note: NodeNote, find: Callable[[str], Node | None], *, marked: bool) -> str | None:
    """Why the guest must not have this disk again; None if it may. :param marked: whether the header had the number for certain."""
    node = find(note.node_name)
    if node is None or node.read_only:
        return f"there is no writable node '{note.node_name}'"
    if identity_of(node) != (note.device, note.inode):
        return f"node '{note.node_name}' is another file than it was"
    if not isinstance(node, Qcow2Node):
        return None
    found = node.image.recovery
    if found is None or not found.is_complete:
        reason = found.why if found is not None else ""
        if not note.number:
            reason = "version 2 of qcow2 has no place for the word that it was not"
        return f"something that it wrote to node '{note.node_name}' may be lost: {reason}"
    if found.number != note.number and (marked or found.number):
        return f"somebody else has opened the image of node '{note.node_name}' meanwhile"
    return None


def active_table(node: Node | None) -> int:
    """The host offset of the active L1 table, which is another after each load; 0 for a node that has none."""
    return node.image.header.l1_offset if isinstance(node, Qcow2Node) else 0


def end_migration(monitor: QemuMonitor) -> None:
    """A migration that was ours, and whose other end died with us, comes to its end.

    One of a background snapshot of a QEMU before 8 is waited for, however long it takes: it must not be cancelled, and somebody
    reads it to its end (spool.py). QEMU's end ends the wait.

    :raise Refused: the guest cannot go on. :raise PeerError: QEMU does not answer, or does not end it.
    """
    if _status(monitor) in _MEMORY_MISSING:
        raise Refused(
            "The guest cannot go on: memory of the snapshot that it was loaded from is missing; load it again"
        )
    enabled = {each["capability"] for each in monitor.execute("query-migrate-capabilities") if each["state"]}
    must_end_itself = monitor.version < (8, 0, 0) and "background-snapshot" in enabled
    deadline = time.monotonic() + _CANCEL_SECONDS
    asked = False
    while (status := _status(monitor)) not in _OVER:
        if not must_end_itself and not asked:
            monitor.execute("migrate_cancel")
            asked = True
        if asked and time.monotonic() > deadline:
            raise PeerError(f"QEMU has not ended a migration that was cancelled: its status is '{status}'")
        time.sleep(_POLL_SECONDS)


def _status(monitor: QemuMonitor) -> str:
    return str(monitor.execute("query-migrate").get("status", ""))
