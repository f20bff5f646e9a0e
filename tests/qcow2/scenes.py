"""One image with a past, and the operations that crash and error tests interrupt.

The disk has two snapshots, clusters shared with both, with one and with none, zero clusters, and machine state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from qcow2.images import named, take
from qcow2.memory import MemoryNode
from stillframe.block.node import Change, SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.errors import StillframeError

STATE = bytes(range(256)) * 300


@dataclass(frozen=True)
class Content:
    """What an image holds: the disk's bytes, and each snapshot's disk and state by name."""

    disk: bytes
    snapshots: dict[str, tuple[bytes, bytes]]


@dataclass(frozen=True)
class Scene:
    """An image's bytes, and what it holds."""

    image: bytes
    content: Content


@cache
def scene(cluster_size: int, refcount_bits: int = 16, compat: str = "1.1") -> Scene:
    """The image before any operation."""
    file = MemoryNode()
    size = 40 * cluster_size + 1024
    create_image(file, size, cluster_size=cluster_size, refcount_bits=refcount_bits, compat=compat)  # type: ignore[arg-type]
    node = Qcow2Node("node", file)
    node.write(0, b"\x11" * (12 * cluster_size + 100))
    take(node, "first", STATE)
    node.write(3 * cluster_size - 10, b"\x22" * (4 * cluster_size))
    node.write_zeroes(8 * cluster_size, cluster_size)
    node.write(30 * cluster_size, b"\x33" * 700)
    take(node, "second", STATE[::-1])
    node.write(5 * cluster_size, b"\x44" * cluster_size)
    node.flush()
    content = content_of(node)
    node.close()
    return Scene(bytes(file.data), content)


def content_of(node: Qcow2Node) -> Content:
    """Everything that an image holds; of snapshots the disks as well, by looking through their own tables."""
    store = node.snapshot_store
    found = {}
    for info in store.snapshots():
        entry = store._find(info)
        disk = bytearray(info.disk_size)
        node.image.read_tree(store._l1(entry), 0, memoryview(disk))
        found[info.name] = (bytes(disk), store.read_state(info, 0, 1 << 30))
    return Content(node.read(0, node.size), found)


def create(node: Qcow2Node) -> None:
    """A snapshot "third", with state, and writes between freeze and commit."""
    pending = node.snapshot_store.freeze()
    try:
        pending.write_state(0, STATE)
        cluster = node.image.cluster_size
        node.write(cluster + 1, b"\x55" * cluster)
        pending.write_state(len(STATE), b"tail")
        change = pending.prepare(SnapshotRecord("third", 1, 2))
    except BaseException:
        pending.abandon()
        raise
    commit(change)


def revert(node: Qcow2Node) -> None:
    """Back to "first"."""
    commit(node.snapshot_store.prepare_revert(named(node, "first")))


def delete(node: Qcow2Node) -> None:
    """ "second" goes."""
    commit(node.snapshot_store.prepare_delete(named(node, "second")))


def roll_back(node: Qcow2Node) -> None:
    """Back to "first", and undone."""
    change = node.snapshot_store.prepare_revert(named(node, "first"))
    try:
        change.commit()
    finally:
        change.roll_back()


def commit(change: Change) -> None:
    """As a group does: an error at the commit undoes it."""
    try:
        change.commit()
    except StillframeError:
        change.roll_back()
        raise
    change.finish()


def guest(node: Qcow2Node) -> None:
    """What a guest does: writes into every kind of cluster, zeroes, discards, flushes in between."""
    cluster = node.image.cluster_size
    node.write(0, b"\x66" * 512)
    node.write(5 * cluster + 512, b"\x77" * 512)
    node.write(20 * cluster, b"\x88" * (3 * cluster))
    node.discard(10 * cluster, 2 * cluster)
    node.flush()
    node.write_zeroes(21 * cluster, cluster)
    node.write(10 * cluster, b"\x99" * cluster)
    node.write(8 * cluster + 5, b"\xaa" * 5)
    node.flush()


OPERATIONS: dict[str, Callable[[Qcow2Node], None]] = {
    "create": create,
    "revert": revert,
    "delete": delete,
    "roll back": roll_back,
}


def after(before: Scene, operation: Callable[[Qcow2Node], None]) -> Content:
    """What the image holds once an operation has gone well."""
    node = Qcow2Node("node", MemoryNode(before.image))
    operation(node)
    return content_of(node)


def disks_between(start: Scene, outcome: Content) -> list[bytes]:
    """The disks that may be found when a revert, a delete or a revert undone is interrupted."""
    return [start.content.disk, outcome.disk, start.content.snapshots["first"][0]]
