"""Refcounts: durable before anything leads to a cluster, never counted down twice, never beyond their width."""

import errno
import struct
from collections.abc import Callable

import pytest

from block.faults import FaultyNode, Flush, RecordingNode, Step, Truncate, Write
from block.faults import apply as apply_step
from qcow2.memory import MemoryNode
from stillframe.block.node import SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.widths import decode, encode, largest
from stillframe.errors import IOFailed, LimitReached, StillframeError

CLUSTER = 4096


def empty(size: int = 8 << 20, *, cluster_size: int = CLUSTER, refcount_bits: int = 16) -> bytearray:
    file = MemoryNode()
    create_image(file, size, cluster_size=cluster_size, refcount_bits=refcount_bits)
    return file.data


def allocating(node: Qcow2Node) -> None:
    for cluster in (0, 1, 700, 2, 1400, 600):
        node.write(cluster * node.image.cluster_size, b"\x55" * node.image.cluster_size)


def without_one(start: bytes, log: list[Step]) -> list[bytes]:
    """Power cuts, at the end of the log, that cost a single write that nothing had made durable."""
    last = max((number for number, step in enumerate(log) if isinstance(step, Flush)), default=-1)
    states: list[bytes] = []
    for lost, step in enumerate(log):
        if lost <= last or isinstance(step, Flush) or (isinstance(step, Write) and step.is_durable):
            continue
        state = bytearray(start)
        for number, each in enumerate(log):
            if number != lost and not isinstance(each, Flush):
                apply_step(state, each)
        states.append(bytes(state))
    return states


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_no_power_cut_under_an_allocating_guest_leaves_an_entry_to_an_uncounted_cluster(
    refcount_bits: int,
) -> None:
    start = bytes(empty(refcount_bits=refcount_bits))
    file = RecordingNode(MemoryNode(start))
    node = Qcow2Node("node", file)
    allocating(node)
    log = list(file.log)
    assert any(isinstance(step, Truncate) for step in log)
    states = without_one(start, log)
    assert len(states) > 6
    for state in states:
        found = check(MemoryNode(state, read_only=True))
        assert found.corruptions == 0, found.messages


def test_allocating_does_not_wait_for_all_that_the_guest_has_written() -> None:
    file = RecordingNode(MemoryNode(empty()))
    node = Qcow2Node("node", file)
    file.log.clear()
    allocating(node)
    assert not [step for step in file.log if isinstance(step, Flush)]


class _FailsAt(FaultyNode):
    """Fails once, at the first write for which a condition holds."""

    def __init__(self, inner: MemoryNode, is_meant: Callable[[int], bool]) -> None:
        super().__init__(inner, None, errno.EIO)
        self.is_meant = is_meant
        self.has_failed = False

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if not self.has_failed and self.is_meant(offset):
            self.has_failed = True
            self.fail_at = self.calls
        super().write(offset, data)


def test_what_a_failed_flush_had_not_counted_down_the_next_one_does() -> None:
    """Refcounts of 512-byte clusters: 256 a block, so that what is dropped spreads over many blocks."""
    data = empty(1 << 20, cluster_size=512)
    armed = False
    file = _FailsAt(MemoryNode(data), lambda offset: armed and offset in blocks)
    node = Qcow2Node("node", file)
    node.write(0, b"\x11" * (1 << 20))
    node.flush()
    table = node.image.world.refcount_table
    blocks = {offset for (offset,) in struct.iter_unpack(">Q", bytes(table)) if offset}
    blocks = {offset + at for offset in blocks for at in range(512)}
    node.discard(0, 1 << 20)
    armed = True
    with pytest.raises(IOFailed):
        node.flush()
    assert file.has_failed
    node.close()
    found = check(file.inner)
    assert found.corruptions == 0, found.messages
    # Of the one block that failed it is not known what the file holds.
    assert found.leaks <= 256


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_every_width_survive_their_bytes(order: int) -> None:
    highest = largest(order)
    counts = decode(bytes(64), order)
    counts[1::2] = highest
    counts[2::4] = min(2, highest)
    assert decode(encode(counts, order), order).tolist() == counts.tolist()


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 64])
def test_one_reference_too_many_is_refused_and_changes_nothing(refcount_bits: int) -> None:
    data = empty(1 << 20, refcount_bits=refcount_bits)
    node = Qcow2Node("node", MemoryNode(data))
    node.write(0, b"\x22" * CLUSTER)
    node.flush()
    highest = largest(refcount_bits.bit_length() - 1)
    allowed = highest - 1 if refcount_bits <= 4 else 0
    if not allowed:
        _set_refcount(node, highest)
    before = node.read(0, node.size)
    for number in range(allowed):
        _snapshot(node, str(number))
    with pytest.raises(LimitReached, match=f"refcounts of {refcount_bits} bits"):
        _snapshot(node, "one too many")
    assert [each.name for each in node.snapshot_store.snapshots()] == [str(n) for n in range(allowed)]
    assert node.read(0, node.size) == before
    node.write(0, b"\x33" * CLUSTER)
    assert node.read(0, 3) == b"\x33\x33\x33"


def _snapshot(node: Qcow2Node, name: str) -> None:
    pending = node.snapshot_store.freeze()
    try:
        change = pending.prepare(SnapshotRecord(name, 1700000000, 0))
    except StillframeError:
        pending.abandon()
        raise
    change.commit()
    change.finish()


def _set_refcount(node: Qcow2Node, value: int) -> None:
    """As an image might have it that somebody else made: the data cluster's refcount at its highest."""
    image = node.image
    with image.gate.lock:
        host = image.mapping.runs(image.world.l1, 0, CLUSTER)[0][2]
        index, within = divmod(host // CLUSTER, image.refcounts.per_block)
        block = image.refcounts.block(index)
        assert block is not None
        block[within] = value
        width = image.header.refcount_bits // 8
        if not width:
            return
        data = encode(block[within : within + 1], image.header.refcount_order)
        image.file.write(image.refcounts.block_offset(index) + within * width, data)
