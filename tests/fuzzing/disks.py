"""A disk in memory that a hostile image is put on, and all that can be done with it.

Whatever lies on it, our own errors are the only ones that come out; everything else that is raised is a find.
"""

import errno
from collections.abc import Callable

from qcow2.memory import MemoryNode
from stillframe.block.node import Change, SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.repair import What, repair
from stillframe.errors import StillframeError, io_failed

ROOM = 64 << 20
READ_AT_MOST = 1 << 20


class SmallDisk(MemoryNode):
    """A disk with little room, so that a claim of an image cannot fill the test's memory either."""

    def truncate(self, size: int) -> None:
        if size > ROOM:
            raise io_failed("Could not resize", OSError(errno.EFBIG, "")) from None
        super().truncate(size)


def attempt(step: Callable[[], object]) -> None:
    """Our own errors are what a step may answer with."""
    try:
        step()
    except StillframeError:
        pass


def look_at(image: bytes) -> None:
    """Open read-only, and read whatever there is."""
    try:
        node = Qcow2Node("node", SmallDisk(image, read_only=True), read_only=True)
    except StillframeError:
        return
    size = min(node.size, READ_AT_MOST)
    attempt(node.info)
    attempt(lambda: node.read(0, size))
    attempt(lambda: node.read(node.size - size, size))
    attempt(lambda: sum(1 for _ in node.extents(0, min(node.size, 64 * READ_AT_MOST))))
    store = node.snapshot_store
    for info in list(store.snapshots())[:3]:
        attempt(lambda info=info: store.read_state(info, 0, 100_000))
        attempt(lambda info=info: store.read_state(info, max(0, info.state_size - 5000), 5000))
    attempt(node.close)


def check_it(image: bytes) -> None:
    """Our check; nothing is written, a read-only disk says so if it is tried."""
    attempt(lambda: check(SmallDisk(image, read_only=True)))


def write_to(image: bytes) -> None:
    """Every change that there is, then our check."""
    disk = SmallDisk(image)
    try:
        node = Qcow2Node("node", disk)
    except StillframeError:
        return
    size = min(node.size, READ_AT_MOST)
    store = node.snapshot_store

    def end(change: Change) -> None:
        change.commit()
        change.finish()

    def take() -> None:
        pending = store.freeze()
        try:
            pending.write_state(0, b"state" * 100)
            node.write(0, b"z" * min(700, size))
            change = pending.prepare(SnapshotRecord("new", 1_700_000_000, 5))
        except BaseException:
            pending.abandon()
            raise
        end(change)

    steps: list[Callable[[], object]] = [
        lambda: node.write(size // 2, b"x" * min(5000, size - size // 2)),
        lambda: node.write(0, b"y" * min(100, size)),
        node.flush,
        take,
        lambda: node.discard(0, size // 2),
        lambda: node.write_zeroes(size // 3, size // 2),
    ]
    for info in list(store.snapshots())[:2]:
        steps += [
            lambda info=info: end(store.prepare_revert(info)),
            lambda: node.write(0, b"w" * min(3000, node.size)),
            lambda info=info: end(store.prepare_delete(info)),
        ]
    steps += [
        lambda: node.truncate(min(node.size, READ_AT_MOST) // 512 * 512 + 512),
        lambda: node.truncate(512),
        node.flush,
        node.close,
    ]
    for step in steps:
        attempt(step)
    attempt(lambda: check(SmallDisk(bytes(disk.data), read_only=True)))


def repair_it(image: bytes) -> None:
    """Both repairs, each on an image of its own. What a repair of all says is whole is whole."""
    kinds: tuple[What, ...] = ("leaks", "all")
    for what in kinds:
        disk = SmallDisk(image)
        try:
            result = repair(disk, what)
        except StillframeError:
            continue
        again = check(SmallDisk(bytes(disk.data), read_only=True))
        assert (again.corruptions, again.leaks) == (result.corruptions, result.leaks), (again, result)


def use(image: bytes) -> None:
    """All of it."""
    look_at(image)
    check_it(image)
    write_to(image)
    repair_it(image)
