"""Real processes, killed with SIGKILL at random moments under load, on real files with the real shared memory."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from peers import QEMU_VERSIONS, peer, using
from qcow2.images import LONG, assert_clean, assert_only_leaks, make, named, opened, qemu_img, qemu_io, take
from qcow2.victim import BLOCK, block
from stillframe.block.graph import BlockGraph
from stillframe.block.node import Node
from stillframe.block.qcow2.replay import Outcome, Recovery
from stillframe.errors import Refused

ROUNDS = 300 if LONG else 12
SIZE = 8 << 20
TESTS = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(3600 if LONG else 180)


@dataclass
class Story:
    """What the victims said that they have done.

    :ivar disk: the number of the last acknowledged write of each block. :ivar under_way: blocks that may hold a later number.
    """

    disk: list[int] = field(default_factory=lambda: [0] * (SIZE // BLOCK))
    snapshots: dict[str, list[int]] = field(default_factory=dict)
    may_be_there: dict[str, list[int]] = field(default_factory=dict)
    under_way: tuple[int, int, int] = (0, 0, 0)
    number: int = 1
    acknowledged: int = 0
    recoveries: list[str] = field(default_factory=list)

    def hear(self, line: str) -> None:
        kind, *words = line.split()
        if kind == "w":
            first, count, number = map(int, words)
            self.under_way = (first, count, number)
            self.number = number + 1
        elif kind == "a":
            first, count, number = self.under_way
            self.disk[first : first + count] = [number] * count
            self.under_way = (0, 0, 0)
            self.acknowledged += 1
        elif kind == "s":
            self.may_be_there = {words[0]: list(self.disk)}
            self.number += 1
        elif kind == "t":
            self.snapshots |= self.may_be_there
            self.may_be_there = {}
        elif kind == "d":
            self.may_be_there = {words[0]: self.snapshots.pop(words[0])}
        elif kind == "e":
            self.may_be_there = {}
        elif kind == "r":
            self.recoveries.append(words[0])

    def settle(self, path: Path) -> None:
        """The process is dead: whatever it had acknowledged is there, and all older snapshots are what they were."""
        with opened(path) as node:
            assert node.image.recovery is not None
            self.recoveries.append(node.image.recovery.outcome.value)
            assert node.image.recovery.is_complete, node.image.recovery
            disk = node.read(0, SIZE)
            names = {each.name for each in node.snapshot_store.snapshots()}
        assert self.snapshots.keys() <= names <= self.snapshots.keys() | self.may_be_there.keys()
        self.snapshots |= {name: held for name, held in self.may_be_there.items() if name in names}
        self.may_be_there = {}
        first, count, number = self.under_way
        for place in range(first, first + count):
            if disk[place * BLOCK : (place + 1) * BLOCK] == block(place, number):
                self.disk[place] = number
        self.under_way = (0, 0, 0)
        assert_same(disk, self.disk)


def assert_same(disk: bytes, numbers: list[int]) -> None:
    for place, number in enumerate(numbers):
        found = disk[place * BLOCK : (place + 1) * BLOCK]
        expected = block(place, number) if number else bytes(BLOCK)
        assert found == expected, f"block {place}: {found[:16].hex()} instead of write {number}"


@contextlib.contextmanager
def victim(path: Path, seed: int, first: int) -> "Iterator[subprocess.Popen[str]]":
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((*sys.path, str(TESTS)))}
    words = [sys.executable, "-m", "qcow2.victim", str(path), str(seed), str(first)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=TESTS)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def killed_after(path: Path, story: Story, seed: int, lines: int) -> None:
    """Let a victim say so many lines, then kill it, wherever it is by then, and hear the rest of what it had said."""
    with victim(path, seed, story.number) as process:
        assert process.stdout is not None
        for number, line in enumerate(process.stdout):
            if line.endswith("\n"):
                story.hear(line)
            if number == lines:
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_a_killed_process_costs_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", SIZE)
    story = Story()
    chance = random.Random(7)
    for number in range(ROUNDS):
        killed_after(path, story, number, chance.randrange(20, 600))
        story.settle(path)
        assert_only_leaks(path)
    for name, numbers in story.snapshots.items():
        qemu_img("convert", "-f", "qcow2", "-l", f"snapshot.name={name}", "-O", "raw", path, tmp_path / "raw")
        assert_same((tmp_path / "raw").read_bytes(), numbers)
    assert story.acknowledged > 50 * ROUNDS
    assert story.recoveries.count("replayed") > ROUNDS // 2


def left_by_a_killed_process(path: Path) -> None:
    """An image in which four full clusters, shared with a snapshot, were overwritten and nothing flushed since."""
    code = """
import os, sys
from stillframe.block.file import FileNode
from stillframe.block.qcow2 import Qcow2Node
from qcow2.images import make, take
from pathlib import Path
path = Path(sys.argv[1])
make(path, 1 << 20)
node = Qcow2Node("node", FileNode("file", str(path)))
node.write(0, b"\\x11" * (1 << 20))
take(node, "first")
for each in range(4):
    node.write(each * 65536 + 100, b"\\x22" * 5000)
os.kill(os.getpid(), 9)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((*sys.path, str(TESTS)))}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment)
    assert done.returncode == -signal.SIGKILL


@contextlib.contextmanager
def chain(path: Path, *, read_only: bool = False, force_share: bool = False) -> Iterator[Node]:
    """An image with all that it names."""
    graph = BlockGraph()
    try:
        yield graph.blockdev_add(
            {
                "driver": "qcow2",
                "node-name": "node",
                "read-only": read_only,
                "force-share": force_share,
                "file": {"driver": "file", "filename": str(path)},
            }
        )
    finally:
        graph.close()


def recovery_of(path: Path) -> Recovery:
    with opened(path) as node:
        assert node.image.recovery is not None
        return node.image.recovery


def test_what_was_killed_is_replayed_once(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    left_by_a_killed_process(path)
    assert recovery_of(path) == Recovery(Outcome.REPLAYED, 4)
    assert recovery_of(path) == Recovery(Outcome.CLEAN)
    with opened(path) as node:
        assert node.read(65536, 65536) == b"\x11" * 100 + b"\x22" * 5000 + b"\x11" * (65536 - 5100)
    assert_only_leaks(path)


WRITERS = {
    "check -r leaks": lambda path: qemu_img_check(path, "leaks"),
    "check -r all": lambda path: qemu_img_check(path, "all"),
    "snapshot -c": lambda path: qemu_img("snapshot", "-c", "stock", path),
    "snapshot -a": lambda path: qemu_img("snapshot", "-a", "first", path),
    "resize": lambda path: qemu_img("resize", path, "2M"),
    "qemu-io write": lambda path: qemu_io(path, "write -P 0x33 0 64k"),
    "qemu-io write elsewhere": lambda path: qemu_io(path, "write -P 0x33 960k 64k"),
    "opened and closed": lambda path: qemu_io(path, "read 0 64k"),
}


def qemu_img_check(path: Path, what: str) -> None:
    """Leaks and their repair are no success to qemu-img's exit code."""
    done = subprocess.run([peer("qemu-img"), "check", "-r", what, str(path)], capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stdout + done.stderr


@pytest.mark.parametrize("version", QEMU_VERSIONS)
@pytest.mark.parametrize("work", WRITERS)
def test_a_stock_program_that_opens_the_image_for_writing_voids_the_record(
    work: str, version: str, tmp_path: Path
) -> None:
    path = tmp_path / "image.qcow2"
    left_by_a_killed_process(path)
    with using(version):
        WRITERS[work](path)
        with opened(path) as node:
            assert node.image.recovery is not None
            assert node.image.recovery.outcome is Outcome.LOST, node.image.recovery
            disk = node.read(0, 1 << 20)
        assert (
            disk
            == (b"\x33" * 65536 if work == "qemu-io write" else b"\x11" * 65536)
            + b"\x11" * (14 * 65536)
            + (b"\x33" if work == "qemu-io write elsewhere" else b"\x11") * 65536
        )
        qemu_img_check(path, "leaks")
        assert_clean(path)
    assert recovery_of(path) == Recovery(Outcome.CLEAN)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_stock_programs_that_only_read_see_what_was_flushed_and_void_nothing(
    version: str, tmp_path: Path
) -> None:
    path = tmp_path / "image.qcow2"
    left_by_a_killed_process(path)
    with using(version):
        assert_only_leaks(path)
        qemu_img("info", path)
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes() == b"\x11" * (1 << 20)
    assert recovery_of(path) == Recovery(Outcome.REPLAYED, 4)


def test_a_repair_of_ours_replays_first(tmp_path: Path) -> None:
    """Else it would give clusters back that only the record knows of."""
    from running import stillframe

    path = tmp_path / "image.qcow2"
    left_by_a_killed_process(path)
    done = stillframe("image", "check", "--repair", "leaks", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_clean(path)
    with opened(path) as node:
        assert node.read(100, 5000) == b"\x22" * 5000


def test_an_image_that_is_killed_while_its_snapshot_is_made_opens_with_all_that_was_acknowledged(
    tmp_path: Path,
) -> None:
    """`first` is as it was, whatever else."""
    path = tmp_path / "image.qcow2"
    left_by_a_killed_process(path)
    assert recovery_of(path).is_complete
    with opened(path) as node:
        assert named(node, "first").name == "first"
    qemu_img("convert", "-f", "qcow2", "-l", "first", "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == b"\x11" * (1 << 20)


def test_a_killed_base_is_not_written_over_before_it_shows_all_its_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else what the overlay was built on changes below it, with the next program that opens the base for writing."""
    base, middle, over = (tmp_path / f"{name}.qcow2" for name in ("base", "middle", "over"))
    left_by_a_killed_process(base)
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", middle)
    qemu_img("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", over)
    before = base.read_bytes()
    for top in (middle, over):
        with (
            pytest.raises(Refused, match=f"'{base}' was killed, and some of its writes") as refused,
            chain(top),
        ):
            pass
        assert f"stillframe image check --repair leaks {base}" in str(refused.value.remedy)
    # Who only reads is told, and sees what qemu-img does.
    caplog.clear()
    with chain(over, read_only=True) as node:
        assert node.read(0, 1 << 20) == b"\x11" * (1 << 20)
    assert [f"'{base}' was killed" in each.getMessage() for each in caplog.records] == [True]
    assert base.read_bytes() == before
    assert recovery_of(base).outcome is Outcome.REPLAYED
    caplog.clear()
    with chain(over) as node:
        assert node.read(100, 5000) == b"\x22" * 5000
    assert caplog.records == []


def test_a_base_that_is_being_written_is_not_taken_for_a_killed_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    with opened(path) as writer:
        writer.write(0, b"\x11" * 65536)
        take(writer, "first")
        writer.write(0, b"\x22" * 100)
        with chain(path, read_only=True, force_share=True) as node:
            assert node.read(0, 100) == b"\x11" * 100
    with chain(path, read_only=True):
        pass
    assert caplog.records == []
