"""SIGKILL at any instant: no acknowledged write reads back old.

In memory, at every change of the file and every acknowledgement, in random sequences of everything a guest and its snapshots do;
with real processes in test_qcow2_sigkill.py.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from block.faults import FaultyNode
from peers import installed_versions, using
from qcow2.images import LONG, apply, assert_only_leaks, named, take
from qcow2.killed import (
    IdentifiedNode,
    Instant,
    Shelf,
    Watched,
    killed_while_reopening,
    reopened,
    shared_image,
)
from qcow2.memory import MemoryNode
from stillframe.block.node import Change, SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node, create_image, mapping, unflushed
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.pending import Pending
from stillframe.block.qcow2.replay import Outcome
from stillframe.errors import IOFailed

SEQUENCES = 60 if LONG else 4
OPERATIONS = 40
pytestmark = pytest.mark.timeout(3600 if LONG else 180)


def outcome(instant: Instant, shelf: Shelf) -> Outcome:
    with reopened(instant, shelf) as node:
        assert node.image.recovery is not None
        return node.image.recovery.outcome


# One promise each.


def test_an_acknowledged_overwrite_of_a_shared_cluster_survives_the_kill(shelf: Shelf) -> None:
    watched = Watched(shared_image(), shelf)
    watched.node.write(5000, b"\x22" * 4096)
    watched.mark()
    instant = watched.now()
    with reopened(instant, shelf) as node:
        assert node.read(5000, 4096) == b"\x22" * 4096
        assert node.read(0, 5000) == b"\x11" * 5000
        assert node.image.recovery is not None
        assert (node.image.recovery.outcome, node.image.recovery.entries) == (Outcome.REPLAYED, 2)
        assert node.image.recovery.is_complete


def test_a_clean_close_leaves_neither_a_record_nor_its_number(shelf: Shelf) -> None:
    watched = Watched(shared_image(), shelf)
    watched.node.write(0, b"\x22" * 100)
    assert shelf.record_of(watched.file.inode).exists()
    watched.node.close()
    assert not shelf.record_of(watched.file.inode).exists()
    with reopened(Instant(bytes(watched.file.data), watched.file.inode, None), shelf) as node:
        assert node.image.header.autoclear == 0
        assert node.image.recovery is not None
        assert node.image.recovery.outcome is Outcome.CLEAN
        assert node.read(0, 100) == b"\x22" * 100


def test_after_a_flush_the_record_is_empty_and_the_image_whole(shelf: Shelf) -> None:
    watched = Watched(shared_image(), shelf)
    watched.node.write(0, b"\x22" * 100)
    watched.node.flush()
    watched.mark()
    assert outcome(watched.now(), shelf) is Outcome.CLEAN


def test_a_power_cut_drops_the_record_and_is_told(shelf: Shelf) -> None:
    watched = Watched(shared_image(), shelf)
    watched.node.write(0, b"\x22" * 100)
    without = Instant(bytes(watched.file.data), watched.file.inode, None)
    with reopened(without, shelf) as node:
        assert node.image.recovery is not None
        assert node.image.recovery.outcome is Outcome.LOST
        assert not node.image.recovery.is_complete
        assert node.read(0, 100) == b"\x11" * 100


def test_the_record_of_another_boot_is_not_replayed(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(shared_image(), shelf)
    watched.node.write(0, b"\x22" * 100)
    watched.mark()
    monkeypatch.setattr(unflushed, "_boot_id", lambda: b"another boot's.."[:16])
    assert outcome(watched.now(), shelf) is Outcome.LOST


def test_a_copy_put_back_over_the_image_is_not_changed(shelf: Shelf) -> None:
    """The number in the copy's header is that of an earlier record."""
    watched = Watched(shared_image(), shelf)
    watched.node.write(0, b"\x22" * 100)
    watched.mark()
    earlier = watched.now()
    shelf.write(earlier.inode, earlier.record)
    again = Watched(earlier.image, shelf)
    again.node.write(0, b"\x33" * 100)
    again.mark()
    later = again.now()
    with reopened(Instant(earlier.image, later.inode, later.record), shelf) as node:
        assert node.image.recovery is not None
        assert node.image.recovery.outcome is Outcome.LOST
        assert node.read(0, 100) == b"\x11" * 100


def test_an_image_without_shared_memory_says_that_writes_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unflushed, "SHARED_MEMORY", str(tmp_path / "absent"))
    file = IdentifiedNode(shared_image())
    node = Qcow2Node("node", file)
    node.write(0, b"\x22" * 100)
    node.write(5000, b"\x22" * 100)
    assert caplog.text.count("is lost if this process is killed") == 1
    killed = Qcow2Node("node", MemoryNode(file.data))
    assert killed.image.recovery is not None
    assert killed.image.recovery.outcome is Outcome.LOST
    killed.close()
    node.close()
    assert Qcow2Node("node", MemoryNode(file.data)).image.recovery.outcome is Outcome.CLEAN  # type: ignore[union-attr]


def test_version_2_has_no_room_for_the_number_and_says_so(shelf: Shelf) -> None:
    file = IdentifiedNode(b"")
    create_image(file, 65536, cluster_size=4096, compat="0.10")
    node = Qcow2Node("node", file)
    assert node.image.recovery is not None
    assert node.image.recovery.outcome is Outcome.UNKNOWN
    assert not node.image.recovery.is_complete


def test_a_failed_flush_voids_what_waited_for_it(shelf: Shelf) -> None:
    """Its data may be gone: entries replayed after it would cost what was flushed before."""
    file = IdentifiedNode(shared_image())
    faulty = FaultyNode(file, None, 5, forever=True)
    node = Qcow2Node("node", faulty)
    node.write(0, b"\x22" * 100)
    faulty.fail_at = faulty.calls
    with pytest.raises(IOFailed, match="Could not flush"):
        node.flush()
    instant = Instant(bytes(file.data), file.inode, shelf.read(file.inode))
    with reopened(instant, shelf) as again:
        assert again.image.recovery is not None
        assert again.image.recovery.outcome is Outcome.LOST
        assert again.read(0, 4096) == b"\x11" * 4096


def test_so_does_a_flush_that_fails_while_a_table_is_copied(shelf: Shelf) -> None:
    file = IdentifiedNode(shared_image())
    faulty = FaultyNode(file, None, 5)
    node = Qcow2Node("node", faulty)
    node.write(0, b"\x22" * 100)
    node.snapshot_store.freeze()
    # After the write of the new table, the data of which is that of the first write, too.
    faulty.fail_at = faulty.calls + 1
    with pytest.raises(IOFailed, match="Could not flush"):
        node.write(5000, b"\x33" * 100)
    assert outcome(Instant(bytes(file.data), file.inode, shelf.read(file.inode)), shelf) is Outcome.LOST


def test_so_does_a_durable_write_that_fails_while_the_file_grows(shelf: Shelf) -> None:
    """It may be the one to be told of the error of another."""
    file = IdentifiedNode(shared_image())
    faulty = FaultyNode(file, None, 5)
    node = Qcow2Node("node", faulty)
    node.write(0, b"\x22" * 100)
    # After the truncation.
    faulty.fail_at = faulty.calls + 1
    with pytest.raises(IOFailed, match="Could not flush"):
        node.image.file.grow_durably(node.image.file.size + 4096, ahead=0)
    assert outcome(Instant(bytes(file.data), file.inode, shelf.read(file.inode)), shelf) is Outcome.LOST


def test_an_overwritten_zero_cluster_survives_a_close_without_a_flush() -> None:
    """Of an image that has allocated nothing since it was opened."""
    file = MemoryNode()
    create_image(file, 16 * 4096, cluster_size=4096)
    node = Qcow2Node("node", file)
    node.write(0, b"\x11" * node.size)
    node.write_zeroes(4096, 4096, unmap=False)
    node.close()
    node = Qcow2Node("node", file)
    node.write(4096, b"\x22" * 4096)
    node.close()
    assert Qcow2Node("node", MemoryNode(file.data)).read(4096, 4096) == b"\x22" * 4096


def test_a_full_record_begins_anew_and_loses_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unflushed, "CAPACITY", 8)
    monkeypatch.setattr(mapping, "DEFERRED_AT_MOST", 1 << 15)
    monkeypatch.setattr(unflushed.Record, "is_half_full", False)
    watched = Watched(shared_image(), shelf)
    for cluster in range(16):
        watched.node.write(cluster * 4096, bytes([cluster + 1]) * 4096)
        if cluster % 5 == 4:
            watched.node.discard((cluster - 1) * 4096, 4096)
            watched.node.write((cluster - 1) * 4096, bytes([cluster]) * 4096)
    watched.mark()
    instant = watched.now()
    image = bytearray(instant.record or b"")
    image.extend(bytes(4096 + 8 * 64 - len(image)))
    path = shelf.record_of(instant.inode)
    path.unlink()
    path.touch(mode=0o600)
    path.write_bytes(image)
    node = Qcow2Node("node", IdentifiedNode(instant.image, instant.inode))
    assert node.image.recovery is not None
    assert node.image.recovery.is_complete
    assert node.read(0, 16 * 4096) == b"".join(bytes([n + 1]) * 4096 for n in range(16))


def test_a_table_whose_cluster_became_another_table_is_not_written_by_the_replay(shelf: Shelf) -> None:
    """The log goes on, since a write was acknowledged during the flush after which the first table was free."""
    file = IdentifiedNode(b"")
    create_image(file, 32 << 20, cluster_size=512)
    node = Qcow2Node("node", file)
    node.write(0, b"\x11" * 32768)
    take(node, "first")
    node.write(0, b"\x22" * 512)
    table = node.image.world.l1[1:8]
    pending = node.snapshot_store.freeze()
    node.write(512, b"\x33" * 512)
    pending.abandon()

    class Busy(MemoryNode):
        """A request is acknowledged while the flush is under way."""

        def flush(self) -> None:
            node.image.file.node = file
            node.write(1024, b"\x44" * 512)

    busy = Busy()
    busy.data = file.data
    node.image.file.node = busy
    node.flush()
    at = 0
    while table not in node.image.world.l1:
        at += 32768
        node.write(at + 512, b"\x55" * 20000)
    with reopened(Instant(bytes(file.data), file.inode, shelf.read(file.inode)), shelf) as again:
        assert again.image.recovery is not None
        assert again.image.recovery.outcome is Outcome.REPLAYED
        assert again.read(0, 1536) == b"\x22" * 512 + b"\x33" * 512 + b"\x44" * 512
        assert again.read(at, 1024) == bytes(512) + b"\x55" * 512


def test_a_refcount_table_that_grew_does_not_void_the_record(shelf: Shelf) -> None:
    file = IdentifiedNode(b"")
    create_image(file, 32 << 20, cluster_size=512)
    node = Qcow2Node("node", file)
    node.write(0, b"\x11" * 512)
    take(node, "first")
    node.write(0, b"\x22" * 512)
    start = at = node.image.header.refcount_table_offset
    while node.image.header.refcount_table_offset == start:
        at += 1 << 16
        node.write(at, b"\x33" * 32768)
    with reopened(Instant(bytes(file.data), file.inode, shelf.read(file.inode)), shelf) as again:
        assert again.image.recovery is not None
        assert again.image.recovery.outcome is Outcome.REPLAYED
        assert again.read(0, 512) == b"\x22" * 512


# Everything at random.


@dataclass(frozen=True)
class Step:
    """What may be read while an operation is under way, and once it was acknowledged."""

    name: str
    before: bytes
    after: bytes
    between: bytes = b""

    def allows(self, disk: bytes) -> bool:
        """A write may be there in part; a change of the whole disk is all or nothing."""
        if disk in (self.before, self.after, self.between or self.after):
            return True
        return len(self.before) == len(self.after) == len(disk) and all(
            is_either(disk[at : at + 512], self.before[at : at + 512], self.after[at : at + 512])
            for at in range(0, len(disk), 512)
        )


def is_either(found: bytes, before: bytes, after: bytes) -> bool:
    return found in (before, after) or all(a in (b, c) for a, b, c in zip(found, before, after, strict=True))


class Guest:
    """Does things at random to an image that is watched; knows what its disk holds."""

    def __init__(self, watched: Watched, seed: int) -> None:
        self.watched = watched
        self.node = watched.node
        self.chance = random.Random(seed)
        self.disk = self.node.read(0, self.node.size)
        self.snapshots: dict[str, bytes] = {"first": self.disk}
        self.pending: tuple[Pending, bytes] | None = None
        self.change: Change | None = None
        self.steps: dict[int, Step] = {}
        self.names = iter(range(1, 1000))

    def run(self, operations: int) -> None:
        for _ in range(operations):
            work = self.chance.choice(
                [self.write] * 8
                + [self.discard, self.zeroes, self.flush, self.flush]
                + [self.begin, self.end, self.revert, self.delete, self.resize, self.commit_and_roll_back]
            )
            # A number each for "under way" and "acknowledged".
            number = self.watched.number = len(self.steps)
            before, self.between = self.disk, b""
            work()
            self.steps[number] = Step(work.__name__, before, self.disk, self.between)
            self.steps[number + 1] = Step(work.__name__, self.disk, self.disk)
            self.watched.mark()

    def _range(self) -> tuple[int, int]:
        offset = self.chance.randrange(self.node.size)
        return offset, min(self.chance.choice([1, 100, 512, 5000, 20000]), self.node.size - offset)

    def write(self) -> None:
        offset, length = self._range()
        data = self.chance.randbytes(length)
        self.disk = self.disk[:offset] + data + self.disk[offset + length :]
        self.node.write(offset, data)

    def zeroes(self) -> None:
        offset, length = self._range()
        self.disk = self.disk[:offset] + bytes(length) + self.disk[offset + length :]
        self.node.write_zeroes(offset, length, unmap=self.chance.random() < 0.5)

    def discard(self) -> None:
        size = self.node.image.cluster_size
        first = self.chance.randrange(self.node.size // size)
        count = min(self.chance.randrange(1, 5), self.node.size // size - first)
        offset, length = first * size, count * size
        self.disk = self.disk[:offset] + bytes(length) + self.disk[offset + length :]
        self.node.discard(offset, length)

    def flush(self) -> None:
        """Half of the time a write is acknowledged meanwhile."""
        if self.chance.random() < 0.5:
            self.watched.during_flush = self.write
        self.node.flush()
        self.watched.during_flush = None

    def begin(self) -> None:
        if self.pending is None:
            self.pending = self.node.snapshot_store.freeze(), self.disk
            self.pending[0].write_state(0, b"state" * 1000)

    def end(self) -> None:
        """Commit it, or abandon it before or after `prepare`."""
        if self.pending is None:
            return
        (pending, disk), self.pending = self.pending, None
        kind = self.chance.random()
        if kind < 0.2:
            pending.abandon()
            return
        name = str(next(self.names))
        change = pending.prepare(SnapshotRecord(name, 1, 2))
        if kind < 0.4:
            change.abandon()
        elif kind < 0.6:
            change.commit()
            change.roll_back()
        else:
            apply(change)
            self.snapshots[name] = disk

    def revert(self) -> None:
        if self.pending is None:
            name = self.chance.choice(sorted(self.snapshots))
            self.disk = self.snapshots[name]
            apply(self.node.snapshot_store.prepare_revert(named(self.node, name)))

    def delete(self) -> None:
        if self.pending is None and len(self.snapshots) > 1:
            name = self.chance.choice(sorted(self.snapshots))
            del self.snapshots[name]
            apply(self.node.snapshot_store.prepare_delete(named(self.node, name)))

    def commit_and_roll_back(self) -> None:
        if self.pending is None:
            name = self.chance.choice(sorted(self.snapshots))
            self.between = self.snapshots[name]
            change = self.node.snapshot_store.prepare_revert(named(self.node, name))
            change.commit()
            change.roll_back()

    def resize(self) -> None:
        if self.pending is None:
            size = self.chance.choice([20, 33, 40, 48]) * 4096
            self.disk = self.disk[:size].ljust(size, b"\0")
            self.node.truncate(size)


def is_examined(place: int, number: int) -> bool:
    """All instants in the long form; else those of an acknowledgement, and a share of the others."""
    return LONG or number % 2 == 1 or place % 7 == 0


@pytest.mark.parametrize("cluster_size", [512, 4096])
@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_whatever_instant_the_process_dies_at_what_it_acknowledged_is_there(
    seed: int, cluster_size: int, shelf: Shelf, tmp_path: Path
) -> None:
    watched = Watched(shared_image(cluster_size, 33 * 4096 // cluster_size), shelf)
    guest = Guest(watched, seed)
    guest.run(OPERATIONS)
    replayed = 0
    for place, (number, instant) in enumerate(watched.instants(is_examined)):
        step = guest.steps[number]
        with reopened(instant, shelf) as node:
            assert node.image.recovery is not None
            assert node.image.recovery.is_complete, node.image.recovery
            replayed += node.image.recovery.outcome is Outcome.REPLAYED
            found = node.read(0, node.size)
            assert step.allows(found), f"{step.name}, operation {number}, instant {place}"
            assert check(node._file).corruptions == 0
            was_replayed = node.image.recovery.outcome is Outcome.REPLAYED
            image = bytes(node._file.data)  # type: ignore[attr-defined]
        if place % 16 == 0:
            path = tmp_path / "image.qcow2"
            path.write_bytes(image)
            peers = installed_versions()
            with using(peers[place // 16 % len(peers)]):
                assert_only_leaks(path)
        if was_replayed and place % 5 == 0:
            for second in killed_while_reopening(instant, shelf):
                with reopened(second, shelf) as node:
                    assert node.image.recovery is not None
                    assert node.image.recovery.is_complete, node.image.recovery
                    assert node.read(0, node.size) == found
    assert replayed > 10
