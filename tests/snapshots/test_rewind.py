"""Going back to a snapshot nearby reads little, and brings back the same as a load of all of it."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from block.faults import FaultyNode
from snapshots.hosts import Register, content, new_image, new_machine, opened, qemu_img_check
from stillframe.block.node import Node
from stillframe.block.qcow2.node import Qcow2Node
from stillframe.errors import Cancelled, IOFailed, StillframeError
from stillframe.machine.tracking import KernelTracking
from stillframe.machine.userfault import Pagemap, Ranges
from stillframe.snapshots import rewind, selection
from stillframe.snapshots.context import Context, Unwatched
from stillframe.snapshots.ground import Ground
from stillframe.snapshots.load import load
from stillframe.snapshots.save import save
from stillframe.vmstate.ram import PAGE_SIZE

RAM, ROM = 8 << 20, 64 << 10


class Bench:
    """A machine with one register, and what it stands on."""

    def __init__(self, *nodes: Node) -> None:
        self.register = Register(value=1)
        self.machine = new_machine(self.register, memory={"ram": RAM, "rom": ROM}, running=True)
        self.ground = Ground(self.machine)
        self.nodes = [selection.snapshot_node(node) for node in nodes]
        for block in self.machine.memory:
            pages = np.frombuffer(block.view, np.uint8).reshape(-1, PAGE_SIZE)
            pages[:] = np.random.default_rng(len(pages)).integers(0, 256, pages.shape, np.uint8)
            pages[::5] = 0

    def save(self, tag: str) -> None:
        save(self.machine, selection.for_save(self.nodes, tag, None), Unwatched(), ground=self.ground)

    def load(self, tag: str, context: Context | None = None) -> None:
        chosen = selection.for_load(self.nodes, tag, None)
        load(self.machine, chosen, context or Unwatched(), ground=self.ground)

    def change(self, seed: int, count: int) -> None:
        chance = np.random.default_rng(seed)
        for block in self.machine.memory:
            pages = np.frombuffer(block.view, np.uint8).reshape(-1, PAGE_SIZE)
            chosen = chance.choice(len(pages), min(count, len(pages) // 2), replace=False)
            pages[chosen] = chance.integers(0, 256, (len(chosen), PAGE_SIZE), np.uint8)
            pages[chosen[::4]] = 0
        self.register.value = seed

    def content(self) -> tuple[object, ...]:
        disks = [content(node.node) for node in self.nodes]
        return ([bytes(block.view) for block in self.machine.memory], self.register.value, disks)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Qcow2Node, Qcow2Node]]:
    paths = [new_image(tmp_path / "root.qcow2"), new_image(tmp_path / "data.qcow2", cluster_size=4096)]
    with opened(paths[0], "root") as root, opened(paths[1], "data") as data:
        yield root, data
    for path in paths:
        qemu_img_check(path)


@pytest.fixture
def bench(nodes: tuple[Qcow2Node, Qcow2Node]) -> Iterator[Bench]:
    found = Bench(*nodes)
    yield found
    found.ground.close()


def test_any_walk_among_snapshots_ends_where_a_whole_load_does(bench: Bench) -> None:
    """Saves, loads and changes at random; nearby or not, each load brings back the instant."""
    chance = random.Random(1)
    held: dict[str, tuple[object, ...]] = {}
    near = 0
    for turn in range(60):
        bench.change(turn, chance.choice([0, 1, 30, 300]))
        if chance.random() < 0.6:
            node = chance.choice(bench.nodes).node
            node.write(chance.randrange(0, node.size - 9000), bytes([turn + 1]) * 9000)
        if not held or chance.random() < 0.2:
            bench.save(f"s{turn}")
            held[f"s{turn}"] = bench.content()
            continue
        tag = chance.choice(sorted(held))
        state = bench.nodes[0].named(tag)
        assert state is not None
        near += bench.ground.nearby(bench.nodes[0], state) is not None
        bench.load(tag)
        assert bench.content() == held[tag]
    assert near > 5


def test_a_rewind_reads_the_pages_that_changed_and_no_others(
    bench: Bench, nodes: tuple[Qcow2Node, Qcow2Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.save("s")
    before = bench.content()
    read = 0
    plain = nodes[0].snapshot_store.read_state

    def counting(snapshot: object, offset: int, length: int) -> bytes:
        nonlocal read
        read += length
        return plain(snapshot, offset, length)  # type: ignore[arg-type]

    monkeypatch.setattr(nodes[0].snapshot_store, "read_state", counting)
    pages = np.frombuffer(bench.machine.memory.blocks[0].view, np.uint8).reshape(-1, PAGE_SIZE)
    pages[100:110] = 7
    bench.load("s")
    assert bench.content() == before
    assert read < 100_000
    read = 0
    pages[100:110] = 8
    bench.load("s")
    assert bench.content() == before
    # Pages that were read before are kept: what is left is the devices' part of the state.
    assert read < 40_000


def test_a_disk_that_nobody_wrote_to_is_not_reverted(bench: Bench, tmp_path: Path) -> None:
    bench.nodes[0].node.write(0, b"first" * 1000)
    bench.save("s")
    bench.nodes[0].node.flush()
    image = (tmp_path / "root.qcow2").read_bytes()
    bench.change(5, 50)
    bench.load("s")
    bench.nodes[0].node.flush()
    assert (tmp_path / "root.qcow2").read_bytes() == image
    bench.nodes[0].node.write(0, b"later")
    bench.load("s")
    assert bench.nodes[0].node.read(0, 5) == b"first"


@pytest.mark.parametrize("way", ["write", "zero", "discard", "grow"])
def test_every_way_to_change_a_disk_is_undone(bench: Bench, way: str) -> None:
    node = bench.nodes[0].node
    node.write(0, b"x" * 300_000)
    bench.save("s")
    before = bench.content()
    for _ in range(2):
        if way == "write":
            node.write(100, b"y")
        elif way == "zero":
            node.write_zeroes(0, 65536)
        elif way == "discard":
            node.discard(0, 131072)
        else:
            node.truncate(node.size + (1 << 20))
        bench.load("s")
        assert bench.content() == before


class CancelledLate(Unwatched):
    def point_of_no_return(self) -> None:
        raise Cancelled


def test_a_rewind_that_is_cancelled_or_refused_leaves_the_guest_as_it_was(bench: Bench) -> None:
    bench.save("s")
    at_save = bench.content()
    bench.change(3, 40)
    bench.nodes[1].node.write(5000, b"new")
    before = bench.content()
    with pytest.raises(Cancelled):
        bench.load("s", CancelledLate())
    assert bench.content() == before
    bench.register.fails_load = 1
    with pytest.raises(StillframeError, match="could not reach its disk"):
        bench.load("s")
    assert bench.content() == before
    bench.load("s")
    assert bench.content() == at_save


def test_a_rewind_whose_disk_fails_leaves_the_guest_as_it_was(tmp_path: Path) -> None:
    path = new_image(tmp_path / "root.qcow2")
    faulty: list[FaultyNode] = []

    def wrap(node: Node) -> Node:
        faulty.append(FaultyNode(node, None, 5))
        return faulty[0]

    with opened(path, "root", wrap) as root:
        bench = Bench(root)
        root.write(0, b"a" * 70_000)
        bench.save("s")
        at_save = bench.content()
        for failing in range(40):
            bench.change(failing, 20)
            root.write(failing * 512, b"b" * 512)
            before = bench.content()
            faulty[0].calls, faulty[0].fail_at = 0, failing
            try:
                bench.load("s")
            except StillframeError:
                faulty[0].fail_at = None
                assert bench.content() == before
                continue
            faulty[0].fail_at = None
            assert bench.content() == at_save
            if faulty[0].calls <= failing:
                break
        else:
            raise AssertionError("a rewind has fewer calls than that")
        bench.ground.close()
    qemu_img_check(path, leaks_allowed=True)


def test_the_cache_of_pages_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewind, "CACHE_BYTES", 32 * PAGE_SIZE)
    bench.save("s")
    before = bench.content()
    for turn in range(4):
        bench.change(turn, 100)
        bench.load("s")
        assert bench.content() == before
    assert len(bench.ground._cache._pages) == 32


def test_two_hundred_rewinds_leave_no_space_behind(bench: Bench, tmp_path: Path) -> None:
    bench.save("s")
    before = bench.content()
    sizes = set()
    for turn in range(200):
        bench.change(turn, 10)
        bench.nodes[0].node.write(turn * 4096 % (1 << 20), b"z" * 4096)
        bench.load("s")
        if turn >= 50 and turn % 50 == 0:
            sizes.add((tmp_path / "root.qcow2").stat().st_size)
    assert bench.content() == before
    assert len(sizes) == 1


def test_a_load_after_which_the_host_counts_no_changes_is_no_ground(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.save("a")
    bench.change(1, 300)
    bench.save("b")
    bench.change(2, 300)

    def refuse(tracking: KernelTracking) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(KernelTracking, "stand_here", refuse)
        bench.load("a")
    bench.change(3, 10)
    bench.save("c")
    expected = bench.content()
    bench.change(4, 300)
    bench.load("c")
    assert bench.content() == expected
    whole_load(bench, "c")
    assert bench.content() == expected


def test_a_save_that_the_host_does_not_tell_the_changes_loses_none_for_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.save("a")
    bench.change(1, 300)
    ask = Pagemap.take_written

    def lose(pagemap: Pagemap, start: int, length: int, *, filled: bool = False) -> Ranges:
        ask(pagemap, start, length, filled=filled)
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(Pagemap, "take_written", lose)
        with pytest.raises(IOFailed, match="what has changed in memory"):
            bench.save("b")
    bench.save("b")
    expected = bench.content()
    bench.change(2, 300)
    whole_load(bench, "b")
    assert bench.content() == expected


def whole_load(bench: Bench, tag: str) -> None:
    """By the stream alone."""
    load(bench.machine, selection.for_load(bench.nodes, tag, None), Unwatched())
