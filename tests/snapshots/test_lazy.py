"""A load whose memory comes while the guest runs: nobody sees a page that is not the snapshot's, and an error loses nothing."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from snapshots.hosts import Register, content, events_of, new_image, new_machine, opened, qemu_img_check
from stillframe.block.qcow2.node import Qcow2Node
from stillframe.errors import Cancelled, IOFailed, Refused, StillframeError
from stillframe.machine import arriving
from stillframe.machine.run_state import RunState
from stillframe.machine.tracking import KernelTracking
from stillframe.snapshots import selection
from stillframe.snapshots.context import Context, Unwatched
from stillframe.snapshots.ground import Ground
from stillframe.snapshots.lazy import lazy_memory
from stillframe.snapshots.load import load
from stillframe.snapshots.save import save
from stillframe.vmstate.ram import PAGE_SIZE

RAM = 32 << 20


class Bench:
    """A machine with one register on one disk; `stranger` makes it stand on nothing, so that no load is a rewind."""

    def __init__(self, node: Qcow2Node, seed: int = 0) -> None:
        self.register = Register(value=1)
        self.machine = new_machine(self.register, memory={"ram": RAM}, running=True)
        self.ground = Ground(self.machine)
        self.node = selection.snapshot_node(node)
        self.pages = np.frombuffer(self.machine.memory.blocks[0].view, np.uint8).reshape(-1, PAGE_SIZE)
        self.scramble(seed)

    def scramble(self, seed: int) -> None:
        self.pages[:] = np.random.default_rng(seed).integers(0, 256, self.pages.shape, np.uint8)
        self.pages[seed % 5 :: 5] = 0
        self.pages[2000:3000] = 0
        self.register.value = seed

    def save(self, tag: str) -> None:
        save(self.machine, selection.for_save([self.node], tag, None), Unwatched(), ground=self.ground)

    def stranger(self) -> None:
        self.ground.close()

    def load(self, tag: str, context: Context | None = None, *, eager: bool = False) -> None:
        chosen = selection.for_load([self.node], tag, None)
        load(self.machine, chosen, context or Unwatched(), ground=self.ground, eager=eager)

    def content(self) -> tuple[object, ...]:
        return self.pages.copy().tobytes(), self.register.value, content(self.node.node)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return new_image(tmp_path / "root.qcow2", 1 << 20)


@pytest.fixture
def bench(image: Path) -> Iterator[Bench]:
    with opened(image, "root") as node:
        found = Bench(node)
        try:
            found.save("s")
            found.stranger()
            chosen = found.node.named("s")
            assert chosen is not None
            memory, _ = lazy_memory(found.machine, selection.Found(found.node, chosen), found.ground)
            if memory is None:
                pytest.skip("this host has no userfaultfd that tracks writes")
            memory.close()
            yield found
        finally:
            found.ground.close()
    qemu_img_check(image)


class During(Unwatched):
    """Calls something once, in the job's thread, when the guest runs and not all of its memory is there."""

    def __init__(self, bench: Bench, act: Callable[[], None]) -> None:
        self._bench, self._act = bench, act
        self._loads = bench.register.loads
        self.left = -1
        self.reports: list[tuple[int, int]] = []

    def progress(self, done: int, total: int) -> None:
        self.reports.append((done, total))

    def checkpoint(self) -> None:
        if self.left < 0 and self._bench.register.loads > self._loads:
            self.left = self.reports[-1][1] - self.reports[-1][0]
            assert self._bench.machine.run_state is RunState.RUNNING
            self._act()


def test_whoever_reads_or_writes_while_memory_comes_sees_the_snapshot(bench: Bench) -> None:
    """From the moment of the resume several threads touch pages everywhere, and compare each with what was saved."""
    bench.scramble(0)
    saved = bench.pages.copy()
    bench.save("t")
    bench.scramble(9)
    bench.stranger()
    wrong: list[int] = []
    running = threading.Event()
    bench.machine.events.subscribe(lambda event: running.set() if event.name == "RESUME" else None)

    def touch(page: int) -> None:
        if not np.array_equal(bench.pages[page], saved[page]):
            wrong.append(page)
        if page % 8 < 4:
            bench.pages[page, 7] ^= 0xFF

    def work(seed: int) -> None:
        running.wait()
        pages = np.arange(seed, len(saved), 4)
        np.random.default_rng(seed).shuffle(pages)
        for page in pages.tolist():
            # As devices do; a reader or writer waits here with the interpreter's lock in its hands.
            bench.machine.at_boundary(partial(touch, page))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        bench.load("t")
    finally:
        running.set()
        for thread in threads:
            thread.join()
    assert not wrong
    # What was written while the memory came counts as changed, and little else does.
    expected = bench.content()
    bench.save("later")
    bench.scramble(5)
    bench.load("later")
    assert bench.content() == expected
    bench.scramble(6)
    bench.stranger()
    bench.load("later", eager=True)
    assert bench.content() == expected


def test_pages_written_while_memory_comes_are_all_that_a_save_finds_changed(bench: Bench) -> None:
    bench.scramble(4)

    def write() -> None:
        bench.pages[100:110] = 7

    context = During(bench, write)
    bench.load("s", context)
    assert context.left > 0
    changes = bench.ground.take()
    flags = (changes.flags or {})["ram"]
    assert flags[100:110].all()
    assert flags.sum() < 200
    bench.ground.put_back(changes)


def test_a_lazy_load_is_what_an_eager_one_is(bench: Bench) -> None:
    bench.scramble(3)
    bench.load("s", eager=True)
    expected = bench.content()
    bench.scramble(4)
    bench.stranger()
    context = During(bench, lambda: None)
    bench.load("s", context)
    assert context.left > 0
    assert bench.content() == expected
    done = [done for done, _ in context.reports]
    assert done == sorted(done)
    assert done[-1] == context.reports[-1][1]


def test_a_load_that_ends_before_the_resume_brings_back_every_byte(bench: Bench) -> None:
    class CancelledLate(Unwatched):
        def point_of_no_return(self) -> None:
            raise Cancelled

    bench.save("here")
    bench.scramble(4)
    bench.pages[5] = 1
    before = bench.content()
    bench.stranger()
    with pytest.raises(Cancelled):
        bench.load("s", CancelledLate())
    assert bench.content() == before
    bench.register.fails_load = 1
    with pytest.raises(StillframeError, match="could not reach its disk"):
        bench.load("s")
    assert bench.content() == before
    assert bench.machine.run_state is RunState.RUNNING
    bench.load("s")
    assert bench.content() != before


def test_what_changed_before_a_load_that_failed_is_still_known_to_have_changed(bench: Bench) -> None:
    bench.save("a")
    bench.pages[50] = 9
    # Neither the ground nor its parent: no rewind.
    bench.save("b")
    bench.pages[60] = 9
    bench.save("c")
    bench.pages[70] = 9
    bench.register.fails_load = 1
    with pytest.raises(StillframeError, match="could not reach its disk"):
        bench.load("a")
    bench.pages[80] = 9
    changes = bench.ground.take()
    if changes.flags is not None:
        assert {70, 80} <= set(np.flatnonzero(changes.flags["ram"]).tolist())
    bench.ground.put_back(changes)
    expected = bench.content()
    bench.save("d")
    bench.scramble(2)
    bench.stranger()
    bench.load("d", eager=True)
    assert bench.content() == expected


def test_a_page_that_cannot_be_read_stops_the_guest_and_a_load_starts_it_again(
    bench: Bench, image: Path
) -> None:
    bench.load("s", eager=True)
    expected = bench.content()
    bench.scramble(4)
    bench.stranger()
    whole = image.read_bytes()
    names = events_of(bench.machine)
    context = During(bench, lambda: os.truncate(image, 1 << 20))
    with pytest.raises(IOFailed, match=r"Error -5 while loading VM state: Could not read the guest's memory"):
        bench.load("s", context)
    assert context.left > 0
    bench.machine.at_boundary(lambda: None)
    assert "BLOCK_IO_ERROR" in names
    for refused in (bench.machine.cont, lambda: bench.save("no")):
        with pytest.raises(Refused, match="has not come as a whole"):
            refused()
    image.write_bytes(whole)
    bench.load("s")
    assert bench.content() == expected
    bench.machine.cont()
    assert bench.machine.run_state is RunState.RUNNING


def test_a_server_that_is_killed_stops_the_guest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[arriving.ArrivingMemory] = []
    plain = arriving.ArrivingMemory.empty

    def seen(self: arriving.ArrivingMemory) -> None:
        servers.append(self)
        plain(self)

    monkeypatch.setattr(arriving.ArrivingMemory, "empty", seen)
    bench.scramble(4)
    with pytest.raises(IOFailed, match="is gone"):
        bench.load("s", During(bench, lambda: os.kill(servers[0]._pid, 9)))
    with pytest.raises(Refused):
        bench.machine.cont()
    bench.load("s")
    assert bench.ground.snapshot is not None


def test_a_hold_of_the_fill_lets_the_guest_have_its_pages(bench: Bench) -> None:
    """As job-pause does: the job's thread stands still; whatever is touched comes all the same."""
    saved = bench.pages.copy()
    bench.scramble(4)
    seen: list[bool] = []
    context = During(bench, lambda: seen.append(np.array_equal(bench.pages[-500:], saved[-500:])))
    bench.load("s", context)
    assert seen == [True]


def test_the_fill_can_be_held_also_where_the_memory_lies_in_one_piece(bench: Bench) -> None:
    """A hold takes effect after a few MiB, not when all has come."""
    bench.pages[:] = np.random.default_rng(1).integers(1, 256, bench.pages.shape, np.uint8)
    saved = bench.pages.copy()
    bench.save("t")
    bench.scramble(4)
    bench.stranger()
    context = During(bench, lambda: None)
    bench.load("t", context)
    assert np.array_equal(bench.pages, saved)
    done = [done for done, _ in context.reports if done]
    assert max(np.diff(done)) <= 6 << 20
    assert context.left > RAM // 2
    assert {total for _, total in context.reports} == {context.reports[-1][1]}


_KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from snapshots.hosts import opened
from snapshots.test_lazy import Bench, During
with opened(Path(sys.argv[1]), "root") as node:
    bench = Bench(node, 7)
    bench.load("s", During(bench, lambda: os.kill(os.getpid(), 9)))
"""


def test_a_process_killed_while_memory_comes_leaves_the_image_whole(image: Path) -> None:
    with opened(image, "root") as node:
        bench = Bench(node)
        bench.save("s")
        expected = bench.content()
        bench.ground.close()
    path = [str(Path(__file__).parent.parent), *sys.path]
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(image), *path], check=False)
    assert ended.returncode == -9
    qemu_img_check(image, leaks_allowed=True)
    with opened(image, "root") as node:
        bench = Bench(node, 3)
        bench.load("s")
        assert bench.content() == expected
        bench.ground.close()


def test_tracking_is_the_kernels_again_after_the_fill(bench: Bench) -> None:
    bench.load("s")
    assert isinstance(bench.ground._tracking, KernelTracking)
    bench.pages[77] = 1
    changes = bench.ground.take()
    assert changes.flags is not None
    assert changes.flags["ram"][77]
