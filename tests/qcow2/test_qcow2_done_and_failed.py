"""A write that took effect and was reported as failed: what the guest writes and flushes afterwards is not lost by it."""

import contextlib
import errno
import os

import pytest

from block.faults import ForwardingNode
from qcow2.images import apply, take
from qcow2.memory import MemoryNode
from stillframe.block.node import SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.block.qcow2.check import check
from stillframe.errors import IOFailed, io_failed

CLUSTER = 4096


class LyingNode(ForwardingNode):
    """Does the next write, and says that it has failed, once `is_lying` is set; so it does at the write number `lies_at`."""

    is_lying = False
    lies_at = -1
    writes = 0

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().write(offset, data)
        self.writes += 1
        if self.is_lying or self.writes - 1 == self.lies_at:
            self.is_lying = False
            error = OSError(errno.EIO, os.strerror(errno.EIO))
            raise io_failed(f"Could not write to '{self.node_name}'", error) from error


@pytest.mark.parametrize("is_pending", [False, True])
@pytest.mark.parametrize("way", ["discard", "write_zeroes"])
def test_a_flushed_write_after_a_failed_unmap_is_there_at_the_next_open(way: str, is_pending: bool) -> None:
    memory = MemoryNode()
    create_image(memory, 1 << 20, cluster_size=CLUSTER)
    file = LyingNode(memory)
    node = Qcow2Node("disk", file)
    pending = node.snapshot_store.freeze() if is_pending and node.snapshot_store else None
    node.write(0, b"\x11" * 2 * CLUSTER)
    node.flush()
    file.is_lying = True
    with pytest.raises(IOFailed):
        getattr(node, way)(0, CLUSTER)
    node.write(0, b"\x22" * CLUSTER)
    node.flush()
    # As after a power cut: the file as it is, without a close.
    after = Qcow2Node("after", MemoryNode(bytes(memory.data)))
    assert after.read(0, 2 * CLUSTER) == b"\x22" * CLUSTER + b"\x11" * CLUSTER
    if pending is not None:
        apply(pending.prepare(SnapshotRecord("s", 0, 0, 0)))
    else:
        take(node, "s")
    assert node.read(0, 2 * CLUSTER) == b"\x22" * CLUSTER + b"\x11" * CLUSTER
    node.close()
    found = check(MemoryNode(bytes(memory.data), read_only=True))
    assert found.corruptions == 0, found.messages


def taken(node: Qcow2Node, name: str, state: bytes) -> None:
    """A snapshot, or none and everything given back."""
    store = node.snapshot_store
    assert store is not None
    pending = store.freeze()
    try:
        pending.write_state(0, state)
        change = pending.prepare(SnapshotRecord(name, 0, 0, 0))
    except BaseException:
        pending.abandon()
        raise
    try:
        change.commit()
    except BaseException:
        change.abandon()
        raise
    change.finish()


def lived(node: Qcow2Node) -> None:
    """Clusters, refcount blocks and tables come and go."""
    node.write(0, b"\x11" * (200 << 10))
    node.flush()
    taken(node, "first", b"state" * 999)
    node.write(5000, b"\x22" * 20000)
    node.discard(50000, 30000)
    node.flush()
    node.write(50000, b"\x33" * 9999)


def numbers() -> range:
    memory = MemoryNode()
    create_image(memory, 1 << 20, cluster_size=512)
    file = LyingNode(memory)
    node = Qcow2Node("node", file)
    lived(node)
    return range(file.writes)


def test_wherever_it_was_the_image_is_whole_and_keeps_what_is_flushed_afterwards() -> None:
    wrong = []
    for number in numbers():
        memory = MemoryNode()
        create_image(memory, 1 << 20, cluster_size=512)
        file = LyingNode(memory)
        file.lies_at = number
        node = Qcow2Node("node", file)
        with contextlib.suppress(IOFailed):
            lived(node)
        states = [bytes(memory.data)]
        pending = node.snapshot_store.freeze()  # type: ignore[union-attr]
        pending.write_state(0, bytes(200 << 10))
        states[0] = bytes(memory.data)
        pending.abandon()
        node.write(0, b"\x44" * (300 << 10))
        node.flush()
        states.append(bytes(memory.data))
        taken(node, "last", b"state" * 999)
        states.append(bytes(memory.data))
        node.close()
        states.append(bytes(memory.data))
        for when, state in enumerate(states):
            found = check(MemoryNode(state, read_only=True))
            if found.corruptions:
                wrong.append((number, when, found.messages[:2]))
            again = Qcow2Node("again", MemoryNode(state))
            if when and again.read(0, 300 << 10) != b"\x44" * (300 << 10):
                wrong.append((number, when, ["content"]))
    assert not wrong
