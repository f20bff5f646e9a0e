"""An error of the storage at any call of any operation costs nothing that was there before."""

import errno
from pathlib import Path

import pytest

from block.faults import FaultyNode, ForwardingNode
from qcow2.images import LONG, assert_only_leaks, named
from qcow2.memory import MemoryNode
from qcow2.scenes import OPERATIONS, Content, after, content_of, disks_between, guest, scene
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.check import check
from stillframe.errors import IOFailed, NoSpace

SIZES = [512, 4096, 65536] if LONG else [512, 65536]


def expected(before: Content, outcome: Content, content: Content, path: Path, image: bytes) -> None:
    """What is left is the state before or after, as a whole but for the guest's own write, and no corruption."""
    assert content.snapshots in (before.snapshots, outcome.snapshots)
    assert check(MemoryNode(image, read_only=True)).corruptions == 0
    path.write_bytes(image)
    assert_only_leaks(path)


@pytest.mark.parametrize("cluster_size", SIZES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_anywhere_in_an_operation_leaves_the_image_usable_and_older_snapshots_whole(
    name: str, cluster_size: int, tmp_path: Path
) -> None:
    start = scene(cluster_size)
    outcome = after(start, OPERATIONS[name])
    number = 0
    while True:
        memory = MemoryNode(start.image)
        file = FaultyNode(memory, None, errno.ENOSPC if number % 2 else errno.EIO)
        node = Qcow2Node("node", file)
        file.calls, file.fail_at = 0, number
        raised = None
        try:
            OPERATIONS[name](node)
        except IOFailed as error:
            raised = error
        assert raised is None or isinstance(raised, NoSpace) == bool(number % 2)
        if file.calls <= number:
            break
        file.fail_at = None
        content = content_of(node)
        for old, disks in start.content.snapshots.items():
            if old in content.snapshots:
                assert content.snapshots[old] == disks
        present = node.read(0, node.size)
        if name != "create":
            assert present in (start.content.disk, outcome.disk)
        # Usable afterwards: the guest goes on, and what it writes is there after the next open.
        guest(node)
        disk = node.read(0, node.size)
        node.close()
        assert (
            Qcow2Node("node", MemoryNode(memory.data, read_only=True), read_only=True).read(0, len(disk))
            == disk
        )
        expected(start.content, outcome, content, tmp_path / "image.qcow2", bytes(memory.data))
        number += 1
    assert number > 8


@pytest.mark.parametrize("cluster_size", SIZES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_disk_that_dies_in_an_operation_leaves_the_old_or_the_new_image(
    name: str, cluster_size: int, tmp_path: Path
) -> None:
    start = scene(cluster_size)
    outcome = after(start, OPERATIONS[name])
    number = 0
    while True:
        memory = MemoryNode(start.image)
        file = FaultyNode(memory, None, errno.EIO, forever=True)
        node = Qcow2Node("node", file)
        file.calls, file.fail_at = 0, number
        try:
            OPERATIONS[name](node)
        except IOFailed:
            pass
        if file.calls <= number:
            break
        content = content_of(Qcow2Node("node", MemoryNode(memory.data, read_only=True), read_only=True))
        if name != "create":
            assert content.disk in disks_between(start, outcome)
        expected(start.content, outcome, content, tmp_path / "image.qcow2", bytes(memory.data))
        number += 1
    assert number > 8


@pytest.mark.parametrize("cluster_size", SIZES)
def test_an_error_under_a_guest_write_costs_no_other_byte(cluster_size: int, tmp_path: Path) -> None:
    start = scene(cluster_size)
    outcome = after(start, guest)
    number = 0
    while True:
        memory = MemoryNode(start.image)
        file = FaultyNode(memory, None, errno.ENOSPC)
        node = Qcow2Node("node", file)
        file.calls, file.fail_at = 0, number
        try:
            guest(node)
        except IOFailed:
            pass
        if file.calls <= number:
            break
        file.fail_at = None
        content = content_of(node)
        assert content.snapshots == start.content.snapshots
        for first, end in untouched_by_guest(cluster_size, len(outcome.disk)):
            assert content.disk[first:end] == start.content.disk[first:end]
        guest(node)
        assert node.read(0, node.size) == outcome.disk
        node.close()
        expected(start.content, outcome, content, tmp_path / "image.qcow2", bytes(memory.data))
        number += 1
    assert number > 8


def untouched_by_guest(cluster_size: int, size: int) -> list[tuple[int, int]]:
    """What `guest` does not write to."""
    touched = [
        (0, 512),
        (5 * cluster_size + 512, 5 * cluster_size + 1024),
        (8 * cluster_size + 5, 8 * cluster_size + 10),
        (10 * cluster_size, 12 * cluster_size),
        (20 * cluster_size, 23 * cluster_size),
    ]
    edges = [0, *(edge for each in touched for edge in each), size]
    return list(zip(edges[::2], edges[1::2], strict=True))


class InterruptedNode(ForwardingNode):
    """Behind the switch, and behind the switch back, somebody presses Ctrl-C."""

    interrupts = 0

    def flush(self) -> None:
        super().flush()
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupts", [1, 2, 3])
@pytest.mark.parametrize("name", ["revert", "delete"])
def test_whoever_interrupts_a_switch_again_and_again_is_left_a_whole_image(
    name: str, interrupts: int, tmp_path: Path
) -> None:
    start = scene(512)
    memory = MemoryNode(start.image)
    file = InterruptedNode(memory)
    node = Qcow2Node("node", file)
    store = node.snapshot_store
    change = (
        store.prepare_revert(named(node, "first"))
        if name == "revert"
        else store.prepare_delete(named(node, "second"))
    )
    file.interrupts = interrupts
    with pytest.raises(KeyboardInterrupt):
        change.commit()
    try:
        change.abandon()
    except KeyboardInterrupt:
        pass
    node.close()
    content = content_of(Qcow2Node("node", MemoryNode(memory.data, read_only=True), read_only=True))
    outcome = after(start, OPERATIONS[name])
    expected(start.content, outcome, content, tmp_path / "image.qcow2", bytes(memory.data))
