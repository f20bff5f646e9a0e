"""Whatever instant the machine dies at: the image opens, nothing that was flushed is lost, and nothing is corrupt.

States are built from a log of the file's changes. Death of the process: each prefix of the log stands. Power loss: of what was
written since the last flush any subset may stand, writes torn at 512 bytes.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from block.faults import Flush, RecordingNode, Step, Write
from block.faults import apply as apply_step
from peers import installed_versions, using
from qcow2.images import LONG, assert_only_leaks
from qcow2.memory import MemoryNode
from qcow2.scenes import OPERATIONS, Content, Scene, after, content_of, disks_between, guest, scene
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.repair import repair

SIZES = [512, 4096, 65536] if LONG else [512, 65536]
SAMPLES = 200 if LONG else 4
pytestmark = pytest.mark.timeout(3600 if LONG else 180)


def recorded(start: Scene, operation: Callable[[Qcow2Node], None]) -> list[Step]:
    """The changes of the file that an operation makes, up to its end."""
    file = RecordingNode(MemoryNode(start.image))
    node = Qcow2Node("node", file)
    file.log.clear()
    operation(node)
    return file.log


def prefixes(image: bytes, log: list[Step]) -> Iterator[bytes]:
    """Death of the process after each change."""
    state = bytearray(image)
    yield bytes(state)
    for step in log:
        if not isinstance(step, Flush):
            apply_step(state, step)
            yield bytes(state)


def power_losses(image: bytes, log: list[Step], seed: int) -> Iterator[bytes]:
    """Before each flush: nothing, all but one, or a sample of what was written since the one before."""
    chance = random.Random(seed)
    durable = bytearray(image)
    since: list[Step] = []
    for step in [*log, Flush()]:
        if not isinstance(step, Flush):
            since.append(step)
            continue
        choices = [set(range(len(since))) - {n} for n in range(len(since))] if len(since) <= 12 else []
        choices += [{n for n in range(len(since)) if chance.random() < 0.5} for _ in range(SAMPLES)]
        for chosen in choices:
            state = bytearray(durable)
            for number, each in enumerate(since):
                if number in chosen:
                    apply_step(state, torn(each, chance))
            yield bytes(state)
        for each in since:
            apply_step(durable, each)
        since.clear()


def torn(step: Step, chance: random.Random) -> Step:
    """Sometimes only a part of a write stands, in units of 512 bytes."""
    if not isinstance(step, Write) or chance.random() < 0.6:
        return step
    first = -step.offset % 512
    cuts = list(range(first, len(step.data), 512))
    if not cuts:
        return step
    cut = chance.choice(cuts)
    if chance.random() < 0.5:
        return Write(step.offset, step.data[:cut])
    return Write(step.offset + cut, step.data[cut:])


def examine(image: bytes, allowed: list[dict[str, tuple[bytes, bytes]]], path: Path, number: int) -> Content:
    """The image opens, holds one of the allowed sets of snapshots, and is not corrupt; leaks can be repaired.

    :param number: of the image; every third is shown to a peer, by turns to each.
    """
    content = content_of(Qcow2Node("node", MemoryNode(image, read_only=True), read_only=True))
    assert content.snapshots in allowed
    found = check(MemoryNode(image, read_only=True))
    assert found.corruptions == 0, found.messages
    if number % 3 == 0 or LONG:
        path.write_bytes(image)
        peers = installed_versions()
        with using(peers[number % len(peers)]):
            assert_only_leaks(path)
    if found.leaks:
        whole = MemoryNode(image)
        assert repair(whole, "leaks").leaks == 0
        assert check(whole).corruptions == 0
        assert (
            content_of(Qcow2Node("node", MemoryNode(whole.data, read_only=True), read_only=True)) == content
        )
    return content


@pytest.mark.parametrize("cluster_size", SIZES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_in_an_operation_leaves_the_old_or_the_new_snapshots(
    name: str, cluster_size: int, tmp_path: Path
) -> None:
    start = scene(cluster_size)
    outcome = after(start, OPERATIONS[name])
    log = recorded(start, OPERATIONS[name])
    allowed = [start.content.snapshots, outcome.snapshots]
    seen = 0
    for states in (prefixes(start.image, log), power_losses(start.image, log, seed=1)):
        for image in states:
            seen += 1
            content = examine(image, allowed, tmp_path / "image.qcow2", seen)
            if name != "create":
                assert content.disk in disks_between(start, outcome)
    assert seen > 20


@pytest.mark.parametrize("cluster_size", SIZES)
def test_a_crash_under_a_guest_costs_only_what_it_had_not_flushed(cluster_size: int, tmp_path: Path) -> None:
    start = scene(cluster_size)
    outcome = after(start, guest)
    log = recorded(start, guest)
    old, new = as_array(start.content.disk), as_array(outcome.disk)
    # What is written twice, or discarded and written, may also be as it was in between.
    between = np.zeros(len(old), np.bool_)
    for first, end in ((10, 12), (20, 23)):
        between[first * cluster_size : end * cluster_size] = True
    seen = 0
    for states in (prefixes(start.image, log), power_losses(start.image, log, seed=2)):
        for image in states:
            seen += 1
            content = examine(image, [start.content.snapshots], tmp_path / "image.qcow2", seen)
            disk = as_array(content.disk)
            assert ((disk == old) | (disk == new) | (between & np.isin(disk, (0, 0x88, 0x99)))).all()
    assert seen > 20
    state = bytearray(start.image)
    for step in log:
        if not isinstance(step, Flush):
            apply_step(state, step)
    # Every write was acknowledged and each is in the file: a killed process costs none.
    assert (
        content_of(Qcow2Node("node", MemoryNode(state, read_only=True), read_only=True)).disk == outcome.disk
    )


def as_array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
