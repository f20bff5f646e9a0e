"""A save that continues an older one's state holds the same as a whole one, and no other snapshot is the worse for either."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from snapshots.hosts import Register, new_image, new_machine, opened, qemu_img_check
from stillframe.block.qcow2.node import Qcow2Node
from stillframe.errors import Cancelled
from stillframe.machine.machine import Machine
from stillframe.machine.tracking import HashTracking, track
from stillframe.snapshots import selection
from stillframe.snapshots.context import Context, Unwatched
from stillframe.snapshots.delete import delete
from stillframe.snapshots.ground import Ground, read_page_index
from stillframe.snapshots.load import load
from stillframe.snapshots.save import save
from stillframe.vmstate.page_index import NO_RECORD, ZERO_PAGE, pack_page_index, unpack_page_index
from stillframe.vmstate.ram import PAGE_SIZE, RamBlock

RAM, ROM = 8 << 20, 64 << 10
FOUND_BY = ["kernel", "hashes"]


def machine_with() -> Machine:
    return new_machine(Register(value=1), memory={"ram": RAM, "rom": ROM}, running=True)


def fill(machine: Machine, seed: int) -> None:
    """Random pages, a third of them zero."""
    chance = np.random.default_rng(seed)
    for block in machine.memory:
        pages = np.frombuffer(block.view, np.uint8).reshape(-1, PAGE_SIZE)
        pages[:] = chance.integers(0, 256, pages.shape, np.uint8)
        pages[::3] = 0


def change(machine: Machine, seed: int, count: int) -> None:
    """Rewrite some pages; one in four becomes zero."""
    chance = np.random.default_rng(seed)
    pages = np.frombuffer(machine.memory.blocks[0].view, np.uint8).reshape(-1, PAGE_SIZE)
    for number in chance.choice(len(pages), count, replace=False).tolist():
        pages[number] = 0 if chance.random() < 0.25 else chance.integers(0, 256, PAGE_SIZE, np.uint8)


def memory_of(machine: Machine) -> list[bytes]:
    return [bytes(block.view) for block in machine.memory]


@pytest.fixture(params=FOUND_BY)
def ground_of(request: pytest.FixtureRequest) -> Callable[[Machine], Ground]:
    """What a machine stands on, its changes found in either way."""
    return lambda machine: Ground(
        machine, (lambda memory: HashTracking()) if request.param == "hashes" else track
    )


@pytest.fixture(params=[4096, 65536])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return new_image(tmp_path / "state.qcow2", cluster_size=request.param)


@pytest.fixture
def node(path: Path) -> Iterator[Qcow2Node]:
    with opened(path, "state") as found:
        yield found
    qemu_img_check(path)


def do_save(
    machine: Machine, node: Qcow2Node, tag: str, ground: Ground, context: Context | None = None
) -> None:
    chosen = selection.for_save([selection.snapshot_node(node)], tag, None)
    save(machine, chosen, context or Unwatched(), ground=ground)


def do_load(machine: Machine, node: Qcow2Node, tag: str, ground: Ground | None = None) -> None:
    chosen = selection.for_load([selection.snapshot_node(node)], tag, None)
    load(machine, chosen, Unwatched(), ground=ground)


def do_delete(node: Qcow2Node, tag: str) -> None:
    delete(selection.for_delete([selection.snapshot_node(node)], tag), Unwatched())


def blocks_of(machine: Machine) -> list[RamBlock]:
    return [RamBlock(block.name, block.size) for block in machine.memory]


def allocated(path: Path, node: Qcow2Node) -> int:
    node.flush()
    return path.stat().st_blocks * 512


def test_a_chain_of_saves_brings_back_every_instant_and_costs_what_changed(
    path: Path, node: Qcow2Node, ground_of: Callable[[Machine], Ground]
) -> None:
    machine = machine_with()
    ground = ground_of(machine)
    fill(machine, 1)
    held: dict[str, list[bytes]] = {}
    sizes = [allocated(path, node)]
    for number in range(6):
        tag = f"s{number}"
        do_save(machine, node, tag, ground)
        held[tag] = memory_of(machine)
        sizes.append(allocated(path, node))
        change(machine, 100 + number, 20)
    first, *others = np.diff(sizes).tolist()
    # 20 pages, the copied end of the parent, tables and the index.
    assert all(other <= 20 * (PAGE_SIZE + 8) + 14 * 65536 < first / 4 for other in others), (first, others)
    fresh = machine_with()
    for tag in sorted(held, key=lambda tag: tag[::-1], reverse=True):
        do_load(fresh, node, tag)
        assert memory_of(fresh) == held[tag]
    ground.close()


def test_snapshots_of_a_chain_go_in_any_order_and_leave_nothing(
    path: Path, node: Qcow2Node, ground_of: Callable[[Machine], Ground]
) -> None:
    machine = machine_with()
    ground = ground_of(machine)
    fill(machine, 2)
    empty = allocated(path, node)
    held = {}
    for number in range(5):
        do_save(machine, node, f"s{number}", ground)
        held[f"s{number}"] = memory_of(machine)
        change(machine, number, 30)
    fresh = machine_with()
    for tag in ("s2", "s0", "s4", "s1", "s3"):
        do_delete(node, tag)
        del held[tag]
        for other, memory in held.items():
            do_load(fresh, node, other)
            assert memory_of(fresh) == memory
    assert allocated(path, node) <= empty + 8 * 65536
    ground.close()


def test_a_save_after_a_load_continues_the_loaded_snapshot(
    path: Path, node: Qcow2Node, ground_of: Callable[[Machine], Ground]
) -> None:
    machine = machine_with()
    ground = ground_of(machine)
    fill(machine, 3)
    do_save(machine, node, "base", ground)
    change(machine, 1, 400)
    do_save(machine, node, "side", ground)
    do_load(machine, node, "base", ground)
    change(machine, 2, 10)
    before = allocated(path, node)
    do_save(machine, node, "branch", ground)
    grown = allocated(path, node) - before
    memory = memory_of(machine)
    parents = {s.name: s.lineage.parent for s in node.snapshot_store.snapshots() if s.lineage}
    identities = {s.lineage.snapshot: s.name for s in node.snapshot_store.snapshots() if s.lineage}
    assert identities[parents["branch"]] == identities[parents["side"]] == "base"
    if ground._tracking is not None and ground._tracking.how == "kernel":
        assert grown < 20 * PAGE_SIZE + 14 * 65536
    fresh = machine_with()
    do_load(fresh, node, "branch")
    assert memory_of(fresh) == memory
    ground.close()


class CancelledLate(Unwatched):
    def point_of_no_return(self) -> None:
        raise Cancelled


def test_what_changed_before_a_save_that_came_to_nothing_is_in_the_next(
    path: Path, node: Qcow2Node, ground_of: Callable[[Machine], Ground]
) -> None:
    machine = machine_with()
    ground = ground_of(machine)
    fill(machine, 4)
    do_save(machine, node, "first", ground)
    change(machine, 1, 25)
    before = allocated(path, node)
    with pytest.raises(Cancelled):
        do_save(machine, node, "never", ground, CancelledLate())
    assert allocated(path, node) <= before + 4 * 65536
    change(machine, 2, 25)
    do_save(machine, node, "second", ground)
    memory = memory_of(machine)
    fresh = machine_with()
    do_load(fresh, node, "second")
    assert memory_of(fresh) == memory
    ground.close()


def test_the_page_index_says_where_every_page_of_the_stream_is(node: Qcow2Node) -> None:
    machine = machine_with()
    ground = Ground(machine)
    fill(machine, 5)
    for number in range(4):
        do_save(machine, node, f"s{number}", ground)
        memory = memory_of(machine)
        change(machine, number, 300)
        info = node.snapshot_store.snapshots()[-1]
        assert info.lineage is not None
        assert info.lineage.page_index is not None
        found = selection.snapshot_node(node)
        index = read_page_index(found, info, info.lineage.page_index, blocks_of(machine))
        state = node.snapshot_store.read_state(info, 0, info.state_size)
        for block, content in zip(index.blocks, memory, strict=True):
            for page, offset in enumerate(index.offsets[block.name].tolist()):
                here = content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
                if offset in (ZERO_PAGE, NO_RECORD):
                    assert not any(here)
                else:
                    assert state[offset : offset + PAGE_SIZE] == here
        packed = pack_page_index(index)
        again = unpack_page_index(packed, info.state_size, index.blocks)
        assert pack_page_index(again) == packed
    ground.close()


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_state_of_which_too_much_is_out_of_force_is_written_anew(
    part: float, path: Path, node: Qcow2Node
) -> None:
    machine = machine_with()
    ground = Ground(machine, stale_at_most=part)
    fill(machine, 6)
    sizes: list[int] = []
    for number in range(6):
        do_save(machine, node, f"s{number}", ground)
        sizes.append(node.snapshot_store.snapshots()[-1].state_size)
        change(machine, number, 1000)
    ground.close()
    grows = [after > before + (1 << 20) for before, after in itertools.pairwise(sizes)]
    if part == 0.5:
        assert grows[0]
        assert max(sizes) < 3 * sizes[0]
        assert any(after < before for before, after in itertools.pairwise(sizes))
    else:
        # Every one a whole state, or none but the first.
        assert set(grows) == {part == 1.0}


@pytest.mark.parametrize("bits", [1, 2])
def test_refcounts_without_room_cost_space_and_not_the_snapshot(bits: int, tmp_path: Path) -> None:
    """Where a cluster cannot be shared once more, the state is written as a whole."""
    path = new_image(tmp_path / "narrow.qcow2", cluster_size=4096, refcount_bits=bits)
    machine = machine_with()
    ground = Ground(machine)
    fill(machine, 7)
    held = {}
    with opened(path, "state") as node:
        for number in range(5):
            do_save(machine, node, f"s{number}", ground)
            held[f"s{number}"] = memory_of(machine)
            change(machine, number, 5)
        fresh = machine_with()
        for tag, memory in held.items():
            do_load(fresh, node, tag)
            assert memory_of(fresh) == memory
    qemu_img_check(path)
    ground.close()
