"""Guests write while snapshots are taken and deleted: each snapshot holds one instant, and nothing is lost."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from block.faults import ForwardingNode
from qcow2.images import assert_clean, delete, make, named, opened, revert, take
from qcow2.memory import MemoryNode
from stillframe.block.node import Node, SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.block.qcow2.check import check

AREA = 1 << 20
BLOCK = 4096


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_guests_write_while_snapshots_come_and_go(cluster_size: int, tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 4 * AREA, cluster_size=cluster_size)
    stop = threading.Event()
    failures: list[BaseException] = []
    models = [bytearray(AREA) for _ in range(3)]
    # Guests hold this while a request is under way, so that the test knows what the disk is at the freeze.
    quiet = threading.Lock()

    with opened(path) as node:

        def guest(number: int) -> None:
            chance = random.Random(number)
            model = models[number]
            try:
                while not stop.is_set():
                    length = chance.choice([512, 4096, 70_000])
                    at = chance.randrange(0, AREA - length)
                    what = chance.random()
                    with quiet:
                        if what < 0.8:
                            data = chance.randbytes(512) * (length // 512 + 1)
                            node.write(number * AREA + at, data[:length])
                            model[at : at + length] = data[:length]
                        elif what < 0.9:
                            node.write_zeroes(number * AREA + at, length)
                            model[at : at + length] = bytes(length)
                        else:
                            node.flush()
                    # Unlocked: these overlap with everything else.
                    assert node.read(number * AREA + at, length) == model[at : at + length]
            except BaseException as error:
                failures.append(error)
                stop.set()

        def neighbour() -> None:
            """Writes where no snapshot is compared, without any lock."""
            chance = random.Random(9)
            try:
                while not stop.is_set():
                    data = chance.randbytes(3000)
                    at = 3 * AREA + chance.randrange(0, AREA - 3000)
                    node.write(at, data)
                    assert node.read(at, 3000) == data
            except BaseException as error:
                failures.append(error)
                stop.set()

        threads = [threading.Thread(target=guest, args=(number,)) for number in range(3)]
        threads.append(threading.Thread(target=neighbour))
        for thread in threads:
            thread.start()
        frozen: dict[str, bytes] = {}
        states: dict[str, bytes] = {}
        chance = random.Random(77)
        try:
            for number in range(12):
                if stop.is_set():
                    break
                name = f"s{number}"
                with quiet:
                    pending = node.snapshot_store.freeze()
                    frozen[name] = b"".join(models)
                states[name] = chance.randbytes(300_000)
                for at in range(0, 300_000, 50_000):
                    pending.write_state(at, states[name][at : at + 50_000])
                change = pending.prepare(SnapshotRecord(name, 1, 2))
                change.commit()
                change.finish()
                if len(frozen) > 3:
                    gone = chance.choice(sorted(frozen))
                    delete(node, gone)
                    del frozen[gone], states[gone]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failures, failures[0]
        assert node.read(0, 3 * AREA) == b"".join(models)
    assert_clean(path)
    with opened(path) as node:
        for name, content in frozen.items():
            assert node.snapshot_store.read_state(named(node, name), 0, 1 << 20) == states[name]
            revert(node, name)
            assert node.read(0, 3 * AREA) == content
    assert_clean(path)


class _GuestGoesOn(ForwardingNode):
    """While space is given back, a guest writes where it has not written before, and must not be held back by it."""

    def __init__(self, inner: Node) -> None:
        super().__init__(inner)
        self.guest: Callable[[], None] | None = None
        self.was_held_back = False

    def discard(self, offset: int, length: int) -> None:
        if self.guest is not None:
            thread = threading.Thread(target=self.guest)
            thread.start()
            thread.join(20)
            self.was_held_back |= thread.is_alive()
        super().discard(offset, length)


def test_a_guest_allocates_while_a_delete_gives_space_back() -> None:
    inner = MemoryNode()
    create_image(inner, 1 << 20, cluster_size=512)
    file = _GuestGoesOn(inner)
    node = Qcow2Node("node", file)
    for at in range(0, 1 << 16, 1024):
        node.write(at, b"\x11" * 512)
    take(node, "old")
    for at in range(0, 1 << 16, 1024):
        node.write(at, b"\x22" * 512)
    node.flush()
    # Whatever is leased is used up soon, and more must be found beside what is being given back.
    places = iter(range(1 << 16, 1 << 20, 8192))
    written: list[int] = []

    def guest() -> None:
        at = next(places, None)
        if at is not None:
            node.write(at, b"\x33" * 8192)
            written.append(at)

    file.guest = guest
    delete(node, "old")
    file.guest = None
    assert not file.was_held_back
    assert len(written) > 10
    for at in range(0, 1 << 16, 1024):
        assert node.read(at, 512) == b"\x22" * 512
    for at in written:
        assert node.read(at, 8192) == b"\x33" * 8192
    node.close()
    found = check(inner)
    assert (found.corruptions, found.leaks) == (0, 0), found.messages
