"""Images that a crash left in the middle of an operation, opened in every company: alone, some of them, with copies, with disks
that fail."""

import errno
from collections.abc import Sequence

import pytest

from block.faults import FaultyNode
from qcow2.memory import MemoryNode
from qcow2.scenes import content_of
from snapshots.groups import (
    OPERATIONS,
    any_mark,
    contents_of,
    interrupted,
    is_barred,
    opened,
    recorded,
    start_of,
)
from snapshots.hosts import do_delete, do_load, do_save, new_machine
from stillframe.block.node import GroupKind
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.layout import WORLD_OFFSET
from stillframe.errors import ImageCorrupt, InUse, IOFailed, NotFound
from stillframe.snapshots.group import Step, all_or_none
from stillframe.snapshots.recovery import Recovered, forget, recover, refuse_withheld, snapshot_nodes
from stillframe.snapshots.selection import SnapshotNode


def nodes_of(files: Sequence[bytes], *which: int) -> list[SnapshotNode]:
    every = opened(list(files), [])
    return list(snapshot_nodes([every[number] for number in which or range(3)]))


def only(results: list[Recovered]) -> Recovered:
    assert len(results) == 1
    return results[0]


@pytest.mark.parametrize("committed", [False, True], ids=["under way", "committed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_without_the_image_that_decides_nothing_is_done_and_it_is_named(name: str, committed: bool) -> None:
    nodes = nodes_of(interrupted(name, committed=committed), 0, 1)
    result = only(recover(nodes))
    assert isinstance(result.problem, NotFound)
    assert "The image 'memory', which decides, is not here" in str(result)
    assert "first" in str(result)
    assert all(node.store.unfinished is not None for node in nodes)
    if name == "load":
        for node in nodes:
            with pytest.raises(InUse, match="interrupted"):
                node.node.read(0, 512)
            with pytest.raises(InUse, match="interrupted"):
                node.node.write(0, bytes(512))
        with pytest.raises(NotFound, match="not here"):
            refuse_withheld(nodes, [result])
    else:
        refuse_withheld(nodes, [result])
        # What may be a leftover is not offered, and the disks can be used meanwhile.
        doubtful = {"save": "new", "delete": "doomed"}[name]
        for node in nodes:
            assert doubtful not in [each.name for each in node.store.snapshots()]
            node.node.write(0, b"used" * 128)
    with pytest.raises(InUse, match=r"'first' cannot take part .* 'memory' decides"):
        do_save(new_machine(), [node.node for node in nodes], "other")


@pytest.mark.parametrize("committed", [False, True], ids=["under way", "committed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_images_that_come_later_are_resolved_as_the_others_were(name: str, committed: bool) -> None:
    start, files = start_of("plain"), interrupted(name, committed=committed)
    _, outcome = recorded("plain", name)
    wanted = [sorted(each.snapshots) for each in (outcome if committed else start.contents)]
    first, second, state = nodes_of(files)
    result = only(recover([first, state]))
    assert (result.problem, result.missing, result.committed) == (None, 1, committed)
    # These can be used, as far as it does not concern the one that is missing.
    for node in (first, state):
        assert not node.store.is_withheld
        node.node.write(0, b"used" * 128)
    with pytest.raises(InUse, match="decides on an unfinished"):
        do_save(new_machine(), [first.node, state.node], "other")
    do_save(new_machine(), [state.node], "alone")
    do_delete([state.node], "alone")
    result = only(recover([first, second, state]))
    assert (result.problem, result.missing, result.committed) == (None, 0, committed)
    assert recover([first, second, state]) == []
    nodes = [each.node for each in (first, second, state)]
    assert [sorted(content_of(node).snapshots) for node in nodes if isinstance(node, Qcow2Node)] == wanted
    do_save(new_machine(), nodes, "other", vmstate="state")
    do_load(new_machine(), nodes, "other", vmstate="state")


def test_an_image_that_others_have_changed_stops_the_rest() -> None:
    files = [bytearray(data) for data in interrupted("load", committed=False)]
    # As if a program that knows nothing of the mark had grown the refcount table.
    files[1][WORLD_OFFSET + 7] ^= 2
    memory = [MemoryNode(data) for data in files]
    nodes = list(snapshot_nodes(opened(memory, [])))
    result = only(recover(nodes))
    assert isinstance(result.problem, ImageCorrupt)
    assert "Node 'second': The image is neither as it was before" in str(result.problem)
    assert [bytes(file.data) for file in memory] == [bytes(data) for data in files]
    assert all(node.store.is_withheld for node in nodes)


def test_a_copy_of_the_image_that_decides_is_not_taken_for_it() -> None:
    files = interrupted("delete", committed=True)
    both = [*nodes_of(files), *nodes_of(files, 2)]
    result = only(recover(both))
    assert isinstance(result.problem, InUse)
    assert "one is a copy of another" in str(result.problem)
    assert all(node.store.unfinished is not None for node in both)


@pytest.mark.parametrize("committed", [False, True], ids=["under way", "committed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_forgotten_is_not_lost(name: str, committed: bool) -> None:
    start = start_of("plain")
    nodes = nodes_of(interrupted(name, committed=committed), 0, 1)
    for number, node in enumerate(nodes):
        done = forget(node)
        assert done is not None
        assert name in done
        assert forget(node) is None
        assert isinstance(node.node, Qcow2Node)
        content = content_of(node.node)
        # The disk is the one before; of what was saved or loaded or to be deleted, whatever was there is listed.
        assert content.disk == start.contents[number].disk
        for tag, held in content.snapshots.items():
            assert tag == "new" or held == start.contents[number].snapshots[tag]
        assert name == "save" or "doomed" in content.snapshots or (name == "delete" and committed)


@pytest.mark.parametrize("committed", [False, True], ids=["under way", "committed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_disk_that_fails_during_recovery_leaves_it_to_the_next(name: str, committed: bool) -> None:
    start, files = start_of("plain"), interrupted(name, committed=committed)
    _, outcome = recorded("plain", name)
    fail_at, failures = 0, 0
    while True:
        memory = [MemoryNode(data) for data in files]
        faulty = [FaultyNode(file, None, errno.EIO, forever=True) for file in memory]
        nodes = list(snapshot_nodes([Qcow2Node(f"node{number}", file) for number, file in enumerate(faulty)]))
        faulty[fail_at % 3].fail_at = faulty[fail_at % 3].calls + fail_at // 3
        result = only(recover(nodes))
        if result.problem is not None:
            failures += 1
            assert isinstance(result.problem, IOFailed)
            assert "Node 'node" in str(result.problem)
        again = nodes_of([bytes(file.data) for file in memory])
        assert all(each.problem is None and not each.missing for each in recover(again))
        found = contents_of([node.node for node in again if isinstance(node.node, Qcow2Node)])
        assert found == (outcome if committed else start.contents)
        fail_at += 1
        if fail_at >= 3 * 8:
            break
    assert failures > 3


def test_an_operation_at_work_is_not_taken_for_an_interrupted_one() -> None:
    nodes = nodes_of(start_of("plain").files)
    steps = [
        Step(
            node.name,
            lambda node=node: node.store.prepare_delete(next(iter(node.store.snapshots()))),  # type: ignore[misc]
            "no",
        )
        for node in nodes
    ]
    with all_or_none(steps, kind=GroupKind.DELETE):
        assert recover(nodes) == []
        assert all(node.store.unfinished is None for node in nodes)
    assert [len(node.store.snapshots()) for node in nodes] == [1, 1, 1]


def test_marks_of_a_load_are_seen_by_other_programs_and_those_of_a_save_are_not() -> None:
    assert all(is_barred(data) for data in interrupted("load", committed=False))
    assert not any(is_barred(data) for data in interrupted("save", committed=False))
    assert any_mark(interrupted("save", committed=False))


def test_a_read_only_image_waits_and_is_said_to() -> None:
    files = interrupted("load", committed=True)
    every = [
        Qcow2Node(f"node{number}", MemoryNode(data, read_only=number == 2), read_only=number == 2)
        for number, data in enumerate(files)
    ]
    nodes = list(snapshot_nodes(every))
    result = only(recover(nodes))
    assert isinstance(result.problem, InUse)
    assert "'node2' is read-only" in str(result.problem)
    assert all(node.store.is_withheld for node in nodes)
