"""Power fails, or the process dies, at any instant of an operation over three images: once they are opened together
again, all of them have it or none."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from block.faults import Flush, Step, Write
from peers import installed_versions, peer, using
from qcow2.images import LONG, apply, named
from qcow2.memory import MemoryNode
from qcow2.scenes import Content
from snapshots.groups import (
    BASE,
    LAYOUTS,
    OPERATIONS,
    Files,
    Log,
    any_mark,
    contents_of,
    is_barred,
    is_overlay,
    machine_of,
    opened,
    recorded,
    recorded_undone,
    start_of,
    states,
)
from snapshots.hosts import do_delete, do_save
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.check import check
from stillframe.snapshots.recovery import recover, snapshot_nodes

pytestmark = pytest.mark.timeout(3600 if LONG else 300)


def recovered(files: Files, log: Log | None = None) -> tuple[tuple[Content, ...], Files]:
    """Opened together and recovered, they can be used, are not corrupt, and carry no mark that means anything."""
    memory = [MemoryNode(data) for data in files]
    nodes = opened(memory, [] if log is None else log)
    if log is not None:
        log.clear()
    for result in recover(snapshot_nodes(nodes)):
        assert result.problem is None, str(result)
        assert result.missing == 0
    if log is not None:
        log.append((0, Flush()))
    after = tuple(bytes(file.data) for file in memory)
    assert recover(snapshot_nodes(nodes)) == []
    contents = contents_of(nodes)
    for data in after:
        assert not is_barred(data)
        found = check(MemoryNode(data, read_only=True))
        assert found.corruptions == 0, found.messages
    return contents, after


def disk_alone(data: bytes) -> bytes:
    """What stock QEMU reads from an image that it accepts."""
    file = MemoryNode(data, read_only=True)
    node = Qcow2Node("alone", file, backing=BASE if is_overlay(file) else None, read_only=True)
    return node.read(0, node.size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_after_a_crash_all_images_have_the_operation_or_none(name: str, layout: str, tmp_path: Path) -> None:
    start = start_of(layout)
    log, outcome = recorded(layout, name)
    old, new = start.contents, outcome
    before, after = [each.disk for each in old], [each.disk for each in new]
    seen = {"none": 0, "all": 0}
    for number, files in enumerate(states(start.files, log, seed=1)):
        # Before recovery, whoever does not know the mark gets disks of one side alone.
        open_to_all = [each for each, data in enumerate(files) if not is_barred(data)]
        shown = {each: disk_alone(files[each]) for each in open_to_all}
        assert all(shown[e] == before[e] for e in shown) or all(shown[e] == after[e] for e in shown)
        if number % 37 == 0:
            show_to_peer(files, tmp_path, number)
        contents, repaired = recovered(files)
        assert contents in (old, new), [sorted(each.snapshots) for each in contents]
        seen["none" if contents == old else "all"] += 1
        if number % 37 == 0:
            assert_sound_to_peer(repaired, tmp_path, number)
    assert all(seen.values()), seen
    assert sum(seen.values()) > 50


def show_to_peer(files: Files, folder: Path, number: int) -> None:
    """Stock tools refuse an image in the middle of a load, and take any other; a repair of theirs does no harm."""
    versions = installed_versions()
    with using(versions[number % len(versions)]):
        for each, data in enumerate(files):
            path = folder / f"{each}.qcow2"
            path.write_bytes(data)
            (folder / "base.raw").write_bytes(bytes(BASE.data))
            run = subprocess.run(
                [peer("qemu-img"), "check", "-f", "qcow2", str(path)], capture_output=True, text=True
            )
            if is_barred(data):
                assert run.returncode == 1, run.stdout
                assert "Unsupported qcow2" in run.stderr
            else:
                assert run.returncode in (0, 3), run.stdout + run.stderr


def assert_sound_to_peer(files: Files, folder: Path, number: int) -> None:
    versions = installed_versions()
    with using(versions[number % len(versions)]):
        for each, data in enumerate(files):
            path = folder / f"{each}.qcow2"
            path.write_bytes(data)
            run = subprocess.run([peer("qemu-img"), "check", "-f", "qcow2", str(path)], capture_output=True)
            assert run.returncode in (0, 3), run.stdout


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_while_an_operation_is_undone_leaves_it_on_all_images_or_on_none(name: str) -> None:
    start = start_of("mixed")
    log, between = recorded_undone("mixed", name)
    seen = {"none": 0, "all": 0}
    for files in states(start.files, log, seed=6):
        contents, _ = recovered(files)
        assert contents in (start.contents, between)
        seen["none" if contents == start.contents else "all"] += 1
    assert all(seen.values()), seen


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_in_the_middle_of_recovery_is_recovered_to_the_same(name: str) -> None:
    start = start_of("mixed")
    log, outcome = recorded("mixed", name)
    marked = [files for files in states(start.files, log, seed=2, samples=0) if any_mark(files)]
    assert len(marked) > 5
    tried = 0
    for files in marked[:: 1 if LONG else max(1, len(marked) // 12)]:
        steps: Log = []
        wanted, _ = recovered(files, steps)
        assert wanted in (start.contents, outcome)
        for interrupted in states(files, steps, seed=3, samples=1):
            tried += 1
            assert recovered(interrupted)[0] == wanted
    assert tried > 20


@pytest.mark.parametrize("name", ["save", "delete"])
@pytest.mark.parametrize("what", ["leaks", "all"])
def test_a_repair_by_qemu_before_recovery_does_no_harm(name: str, what: str, tmp_path: Path) -> None:
    start = start_of("mixed")
    log, outcome = recorded("mixed", name)
    marked = [files for files in states(start.files, log, seed=4, samples=0) if any_mark(files)]
    for number, files in enumerate(marked[:: max(1, len(marked) // 6)]):
        versions = installed_versions()
        repaired = []
        with using(versions[number % len(versions)]):
            for each, data in enumerate(files):
                path = tmp_path / f"{each}.qcow2"
                path.write_bytes(data)
                run = subprocess.run([peer("qemu-img"), "check", "-r", what, str(path)], capture_output=True)
                assert run.returncode == 0, run.stdout
                repaired.append(path.read_bytes())
        assert recovered(tuple(repaired))[0] in (start.contents, outcome)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_group_costs_two_flushes_an_image_more_than_its_images_alone(name: str) -> None:
    log, _ = recorded("plain", name)
    alone = 0
    for number in range(3):
        single: Log = []
        node = opened(start_of("plain").files, single)[number]
        single.clear()
        ALONE[name](node)
        assert sum(is_header(step) for _, step in single) == 1
        alone += sum(isinstance(step, Flush) for _, step in single)
    assert sum(isinstance(step, Flush) for _, step in log) == alone + 2 * 3


ALONE: dict[str, Callable[[Qcow2Node], None]] = {
    "save": lambda node: do_save(machine_of(2), [node], "new"),
    "load": lambda node: apply(node.snapshot_store.prepare_revert(named(node, "doomed"))),
    "delete": lambda node: do_delete([node], "doomed"),
}


def is_header(step: Step) -> bool:
    return isinstance(step, Write) and step.offset < 512


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_image_that_decides_is_marked_first_and_last(name: str) -> None:
    log, _ = recorded("plain", name)
    order = [number for number, step in log if is_header(step)]
    switches = [2, 0, 1] if name == "delete" else [0, 1, 2]
    assert order[0] == 2
    assert order[3:6] == switches
    assert order[8] == 2
    # Mark, switch, settled, mark off; the image that decides has nothing to settle.
    assert sorted(order) == [0] * 4 + [1] * 4 + [2] * 3
