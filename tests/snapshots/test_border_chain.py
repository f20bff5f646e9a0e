"""One chain of snapshots that crosses the border: ours, stock QEMU's load of them and its own save, our lazy load of each, and so
on, with memory and several disks.

QEMU's board `none` with RAM has the same state as ours. Its RAM is a file here, which is how a guest's stores are made and seen.
"""

import mmap
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from peers import QEMU_VERSIONS
from snapshots.hosts import new_image, opened, qemu_img_check
from snapshots.servers import Server, qemu_img, server
from stillframe.machine.arriving import ArrivingMemory
from stillframe.machine.machine import Machine
from stillframe.machine.memory import PAGE_SIZE, GuestMemory, MemoryBlock
from storm import Instant, load_each, machine_on, take_snapshot

RAM = 8 << 20
DISK = 1 << 20
NODES = ("diskfmt0", "diskfmt1")
STATE = "diskfmt1"

Moment = tuple[bytes, tuple[bytes, ...]]
"""Memory, and the disks."""


@dataclass
class Chain:
    """The images, and what is in the machine that stands on them now.

    :ivar saved: what each snapshot shows. :ivar lazy: loads of ours whose memory came after the guest ran.
    """

    folder: Path
    memory: bytearray
    disks: list[bytearray]
    saved: dict[str, Moment]
    lazy: int = 0

    @property
    def paths(self) -> list[Path]:
        return [self.folder / f"disk{number}.qcow2" for number in range(len(self.disks))]

    @contextmanager
    def running_on(self, kind: str) -> Iterator["Machinery"]:
        """A machine of ours or QEMU's on the images, which are whole and hold what they should when it has ended."""
        ram = self.folder / "ram"
        ram.write_bytes(bytes(RAM))
        blocks: list[MemoryBlock] = []

        def equip(machine: Machine) -> None:
            blocks.append(MemoryBlock.allocate("ram", 0, RAM, is_ram=True))
            machine.memory = GuestMemory(tuple(blocks))

        backend = f"memory-backend-file,id=ram,size={RAM},mem-path={ram},share=on"
        words = ("-object", backend, "-machine", "none,memory-backend=ram")
        with ram.open("r+b") as file, server(kind, self.folder, equip=equip, arguments=words) as found:
            for number, path in enumerate(self.paths):
                found.add(number, path)
            view = blocks[0].view if blocks else memoryview(mmap.mmap(file.fileno(), RAM))
            # A later machine begins with what no snapshot has.
            view[:] = b"\xee" * RAM if self.saved else self.memory
            yield Machinery(self, found, view)
            assert bytes(view) == self.memory
            found.ask("quit")
        for path, disk in zip(self.paths, self.disks, strict=True):
            qemu_img_check(path)
            raw = path.with_suffix(".raw")
            qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
            assert raw.read_bytes() == disk


@dataclass
class Machinery:
    """A machine while it runs."""

    chain: Chain
    server: Server
    memory: memoryview

    def change(self, seed: int, pages: int) -> None:
        """Some pages, some of them zero now, and a part of each disk."""
        chance = np.random.default_rng(seed)
        for page in chance.choice(RAM // PAGE_SIZE, pages, replace=False).tolist():
            data = bytes(PAGE_SIZE) if page % 4 == 0 else chance.bytes(PAGE_SIZE)
            for memory in (self.memory, self.chain.memory):
                memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = data
        for number, disk in enumerate(self.chain.disks):
            offset, length = (int(n) * 512 for n in chance.integers(1, 200, 2))
            disk[offset : offset + length] = bytes((seed,)) * length
            if self.server.host is not None:
                node = self.server.host.graph.find(NODES[number])
                node.write(offset, bytes((seed,)) * length)
            else:
                self.server.lines.hmp(f'qemu-io {NODES[number]} "write -P {seed} {offset} {length}"')

    def save(self, tag: str) -> None:
        assert self.server.save(tag, vmstate=STATE, devices=NODES).error is None
        self.chain.saved[tag] = bytes(self.chain.memory), tuple(map(bytes, self.chain.disks))

    def load(self, tag: str) -> None:
        assert self.server.load(tag, vmstate=STATE, devices=NODES).error is None
        memory, disks = self.chain.saved[tag]
        assert bytes(self.memory) == memory
        self.chain.memory[:] = memory
        self.chain.disks[:] = map(bytearray, disks)

    def delete(self, tag: str) -> None:
        assert self.server.delete(tag, devices=NODES).error is None
        del self.chain.saved[tag]


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    found = Chain(tmp_path, bytearray(RAM), [bytearray(DISK), bytearray(DISK)], {})
    for path in found.paths:
        qemu_img("create", "-f", "qcow2", path, str(DISK))
    plain = ArrivingMemory.empty

    def empty(self: ArrivingMemory) -> None:
        found.lazy += 1
        plain(self)

    monkeypatch.setattr(ArrivingMemory, "empty", empty)
    return found


def streams(chain: Chain) -> dict[str, object]:
    """Of each snapshot of ours: which stream its state is a part of. QEMU's are in none."""
    with opened(chain.paths[-1], "state") as node:
        return {
            info.name: info.lineage.page_index.stream
            for info in node.snapshot_store.snapshots()
            if info.lineage is not None and info.lineage.page_index is not None
        }


def load_lazily(chain: Chain, *tags: str) -> None:
    """Each by a machine of its own, that stands on none of them."""
    before = chain.lazy
    for tag in tags:
        with chain.running_on("stillframe") as ours:
            ours.load(tag)
    with_index = sum(tag in streams(chain) for tag in tags)
    # On a host that cannot do it no load is lazy.
    assert chain.lazy - before in (with_index, 0)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_a_chain_of_snapshots_crosses_the_border_and_back(version: str, chain: Chain) -> None:
    qemu = f"qemu {version}"
    with chain.running_on("stillframe") as ours:
        ours.change(1, 1500)
        ours.save("a")
        ours.change(2, 60)
        ours.save("b")
        ours.change(3, 60)
    one = streams(chain)
    assert one["a"] == one["b"], "no save continued another"
    with chain.running_on(qemu) as theirs:
        theirs.load("b")
        theirs.load("a")
        theirs.change(4, 100)
        theirs.save("q")
        theirs.change(5, 10)
    load_lazily(chain, "b", "q", "a")
    with chain.running_on("stillframe") as ours:
        ours.load("q")
        ours.change(6, 40)
        ours.save("q-ours")
        ours.load("b")
        ours.change(7, 40)
        ours.save("c")
    assert streams(chain)["c"] == one["b"]
    with chain.running_on(qemu) as theirs:
        theirs.load("c")
        theirs.delete("a")
        theirs.delete("b")
        theirs.load("q-ours")
        theirs.change(8, 100)
        theirs.save("r")
        theirs.load("c")
    load_lazily(chain, "c", "r", "q", "q-ours")
    with chain.running_on("stillframe") as ours:
        ours.load("c")
        for tag in ("c", "r", "q-ours", "q"):
            ours.delete(tag)
    for path in chain.paths:
        assert qemu_img("snapshot", "-l", path) == ""


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_a_running_guests_snapshots_outlive_what_stock_programs_do_to_the_image(
    version: str, tmp_path: Path
) -> None:
    """They create, apply, save, load and delete between our saves and our loads; each load finds bad=0, and goes on saving."""
    image = new_image(tmp_path / "root.qcow2", 16 << 20)
    chance = random.Random(1)
    instants: dict[str, Instant] = {}
    with machine_on(tmp_path / "first", image) as (machine, console):
        console.until(r"ready;")
        console.command("busy on")
        for number in range(4):
            console.command(f"nonce {chance.getrandbits(64) | 1:x}")
            instants[f"s{number}"] = take_snapshot(machine, console, f"s{number}")
        machine.quit()
    qemu_img("snapshot", "-c", "stock", image)
    qemu_img("snapshot", "-a", "s1", image)
    qemu_img("snapshot", "-d", "s2", image)
    with server(f"qemu {version}", tmp_path) as theirs:
        theirs.add(0, image)
        assert theirs.save("qemu").error is None
        assert theirs.delete("stock").error is None
        assert theirs.load("qemu").error is None
        theirs.ask("quit")
    qemu_img_check(image)
    del instants["s2"]
    for number, tag in enumerate(("s3", "s0", "s1")):
        with machine_on(tmp_path / tag, image, "--paused") as (machine, console):
            load_each(machine, console, [tag], instants)
            console.command("busy on")
            instants[f"c{number}"] = take_snapshot(machine, console, f"c{number}")
            machine.quit()
    for tag in ("s3", "s0", "qemu"):
        qemu_img("snapshot", "-d", tag, image)
        qemu_img_check(image)
    with machine_on(tmp_path / "last", image, "--paused") as (machine, console):
        load_each(machine, console, ["c0", "s1", "c2", "c1"], instants)
        machine.quit()
    qemu_img_check(image)
