"""What is saved while memory and disk go on changing is, page for page and byte for byte, what a copy taken in the pause holds:
for every reader."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qcow2.scenes import content_of
from snapshots.hosts import Register, new_image, new_machine, opened, qemu_img_check
from stillframe.block.node import Node, SnapshotInfo
from stillframe.block.qcow2.node import Qcow2Node
from stillframe.machine.machine import Machine
from stillframe.machine.tracking import HashTracking, track
from stillframe.snapshots import selection
from stillframe.snapshots.context import Unwatched
from stillframe.snapshots.ground import Ground, read_page_index
from stillframe.snapshots.load import load
from stillframe.snapshots.save import save
from stillframe.vmstate.fields import Values
from stillframe.vmstate.page_index import NO_RECORD, ZERO_PAGE
from stillframe.vmstate.ram import PAGE_SIZE, Addresses, Pages, RamBlock
from stillframe.vmstate.sections import GLOBAL_STATE, GLOBAL_STATE_KEY
from stillframe.vmstate.stream import survey
from stillframe.vmstate.transfer import StateSource
from vmstate.stream_analysis import Walk

SIZES = {"ram": 24 << 20, "rom": 64 << 10}


class Copier(Register):
    """A device that copies all memory and the disk when its state is taken: a stop-and-copy of the instant of the save."""

    def __init__(self) -> None:
        super().__init__(value=1)
        self.machine: Machine | None = None
        self.copy: dict[str, bytes] = {}
        self.node: Node | None = None
        self.disk = b""

    def save_state(self) -> Values:
        assert self.machine is not None
        self.copy = {block.name: bytes(block.view) for block in self.machine.memory}
        if self.node is not None:
            self.disk = self.node.read(0, self.node.size)
        return super().save_state()


@pytest.fixture
def copier() -> Copier:
    return Copier()


@pytest.fixture
def machine(copier: Copier) -> Machine:
    made = new_machine(copier, memory=SIZES, running=True)
    copier.machine = made
    return made


@contextmanager
def guest_that_writes(machine: Machine, width: int, disk: Node | None = None) -> Iterator[Callable[[], int]]:
    """Pages are filled, and cleared, by another thread that owns the machine for it, also while a save writes, and the disk is
    written to and discarded.

    :param width: pages it keeps to.

    :return: how many were changed so far.
    """
    ended = threading.Event()
    chance = np.random.default_rng(width)
    changed = 0

    def write() -> None:
        nonlocal changed
        pages = np.frombuffer(machine.memory.blocks[0].view, np.uint8).reshape(-1, PAGE_SIZE)

        def change(chosen: "np.typing.NDArray[np.int64]", content: "np.typing.NDArray[np.uint8]") -> None:
            pages[chosen] = content
            if disk is not None:
                change_disk(disk, chance)

        while not ended.is_set():
            chosen = chance.integers(0, width, 16)
            content = chance.integers(0, 256, (16, PAGE_SIZE), np.uint8)
            content[::4] = 0

            machine.at_boundary(partial(change, chosen, content))
            changed += 16

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield lambda: changed
    finally:
        ended.set()
        thread.join()


def change_disk(disk: Node, chance: np.random.Generator) -> None:
    """What a guest can do to one."""
    offset, length = (int(number) * 512 for number in chance.integers(1, 200, 2))
    match int(chance.integers(0, 8)):
        case 0:
            disk.discard(offset // 65536 * 65536, 65536)
        case 1:
            disk.write_zeroes(offset, length)
        case 2:
            disk.flush()
        case _:
            disk.write(offset, chance.bytes(length))


class Rebuilt:
    """A visitor that makes memory of the records, the last of a page in force."""

    def __init__(self) -> None:
        self.memory: dict[str, bytearray] = {}

    def _pages(self, block: RamBlock) -> Pages:
        return np.frombuffer(self.memory[block.name], np.uint8).reshape(-1, PAGE_SIZE)

    def blocks(self, blocks: Sequence[RamBlock]) -> None:
        self.memory = {block.name: bytearray(block.length) for block in blocks}

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        self._pages(block)[addresses // PAGE_SIZE] = pages

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        self._pages(block)[addresses // PAGE_SIZE] = 0


def by_all_records(machine: Machine, state: bytes) -> dict[str, bytearray]:
    found = Rebuilt()
    source = StateSource(lambda offset, length: state[offset : offset + length], len(state))
    known = {(device.section_name, device.instance_id): device.description for device in machine.devices}
    survey(source, "none", {**known, GLOBAL_STATE_KEY: GLOBAL_STATE}, found)
    return found.memory


def by_page_index(node: Qcow2Node, snapshot: SnapshotInfo, state: bytes) -> dict[str, bytearray]:
    assert snapshot.lineage is not None
    assert snapshot.lineage.page_index is not None
    blocks = [RamBlock(name, size) for name, size in SIZES.items()]
    place = snapshot.lineage.page_index
    index = read_page_index(selection.snapshot_node(node), snapshot, place, blocks)
    memory = {}
    for block in blocks:
        memory[block.name] = bytearray(block.length)
        for page, offset in enumerate(index.offsets[block.name].tolist()):
            if offset not in (ZERO_PAGE, NO_RECORD):
                memory[block.name][page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = state[
                    offset : offset + PAGE_SIZE
                ]
    return memory


@pytest.mark.parametrize("found_by", ["kernel", "hashes"])
@pytest.mark.parametrize("width", [300, 6144], ids=["some pages", "all pages"])
def test_a_live_stream_is_the_stop_and_copy_of_its_instant(
    found_by: str, width: int, machine: Machine, copier: Copier, tmp_path: Path
) -> None:
    """Whole, and continued: by every record in turn, by the page index, by a reader that knows QEMU's format alone, and by a
    load. Most saves of the narrow guest continue the one before, those of the wide one now and then begin anew."""
    ground = Ground(machine, (lambda memory: HashTracking()) if found_by == "hashes" else track)
    path = new_image(tmp_path / "state.qcow2")
    instants: dict[str, dict[str, bytes]] = {}
    disks: dict[str, bytes] = {}
    went_on = disk_went_on = False

    def compare(tag: str) -> None:
        nonlocal went_on, disk_went_on
        instants[tag], disks[tag] = copier.copy, copier.disk
        went_on |= bytes(machine.memory.blocks[0].view) != copier.copy["ram"]
        disk_went_on |= node.read(0, node.size) != copier.disk
        # Seen by the snapshot's own tables, while the guest writes on.
        for name, (disk, _) in content_of(node).snapshots.items():
            assert disk == disks[name]

    with opened(path, "state") as node, guest_that_writes(machine, width, node) as changes:
        copier.node = node
        for number in range(6):
            before = changes()
            while changes() < before + 64:
                assert machine.run_state.value == "running"
            chosen = selection.for_save([selection.snapshot_node(node)], f"s{number}", None)
            save(machine, chosen, Unwatched(), ground=ground)
            machine.at_boundary(partial(compare, f"s{number}"))
        assert went_on
        assert disk_went_on
        parents = set()
        for snapshot in node.snapshot_store.snapshots():
            state = node.snapshot_store.read_state(snapshot, 0, snapshot.state_size)
            assert by_all_records(machine, state) == instants[snapshot.name]
            assert by_page_index(node, snapshot, state) == instants[snapshot.name]
            assert Walk(state).memory == instants[snapshot.name]
            assert snapshot.lineage is not None
            assert snapshot.lineage.page_index is not None
            parents.add(snapshot.lineage.page_index.stream)
        if width == 300:
            assert len(parents) < 6, "no save continued another"
    ground.close()
    qemu_img_check(path)
    fresh = new_machine(Register(), memory=SIZES, running=True)
    with opened(path, "state") as node:
        for tag in sorted(instants, key=lambda tag: tag[::-1], reverse=True):
            chosen_load = selection.for_load([selection.snapshot_node(node)], tag, None)
            load(fresh, chosen_load, Unwatched())
            assert {block.name: bytes(block.view) for block in fresh.memory} == instants[tag]
            assert node.read(0, node.size) == disks[tag]


def test_a_chain_goes_on_with_another_machine(machine: Machine, copier: Copier, tmp_path: Path) -> None:
    """Saved by one machine, loaded by a second that saves again, loaded by a third: the second save continues the first."""
    path = new_image(tmp_path / "state.qcow2")
    ground = Ground(machine)
    with opened(path, "state") as node, guest_that_writes(machine, 2000) as changes:
        while changes() < 4000:
            assert machine.run_state.value == "running"
        save(
            machine,
            selection.for_save([selection.snapshot_node(node)], "a", None),
            Unwatched(),
            ground=ground,
        )
    ground.close()
    first = copier.copy
    second = new_machine(other := Copier(), memory=SIZES, running=True)
    other.machine = second
    its_ground = Ground(second)
    with opened(path, "state") as node:
        nodes = [selection.snapshot_node(node)]
        load(second, selection.for_load(nodes, "a", None), Unwatched(), ground=its_ground)
        with guest_that_writes(second, 200) as changes:
            while changes() < 100:
                assert second.run_state.value == "running"
            save(second, selection.for_save(nodes, "b", None), Unwatched(), ground=its_ground)
        a, b = node.snapshot_store.snapshots()
        assert a.lineage is not None
        assert b.lineage is not None
        assert b.lineage.parent == a.lineage.snapshot
        assert a.lineage.page_index is not None
        assert b.lineage.page_index is not None
        if its_ground._tracking is not None and not its_ground._tracking.reads_memory:
            assert b.lineage.page_index.stream == a.lineage.page_index.stream
    its_ground.close()
    qemu_img_check(path)
    third = new_machine(Register(), memory=SIZES, running=True)
    with opened(path, "state") as node:
        for tag, expected in (("b", other.copy), ("a", first), ("b", other.copy)):
            load(third, selection.for_load([selection.snapshot_node(node)], tag, None), Unwatched())
            assert {block.name: bytes(block.view) for block in third.memory} == expected
