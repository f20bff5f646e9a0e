"""A write that took effect and was reported as failed: what the guest writes and flushes afterwards is not lost by it."""

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
    """Does the next write, and says that it has failed, once `is_lying` is set."""

    is_lying = False

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().write(offset, data)
        if self.is_lying:
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
