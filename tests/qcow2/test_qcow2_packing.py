"""Compressed clusters that we write read back as they were given, in every QEMU, whatever happens to them or to us."""

import errno
import itertools
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from block.faults import FaultyNode, Flush, RecordingNode, Step
from block.faults import apply as apply_step
from peers import installed_versions, using
from qcow2.images import LONG, as_raw, assert_clean, checked, delete, make, opened, qemu_io, revert, take
from qcow2.memory import MemoryNode
from stillframe.block.file import FileNode
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.compression import compress_clusters, decompress
from stillframe.block.qcow2.repair import repair
from stillframe.errors import ImageCorrupt, InvalidRequest, IOFailed, LimitReached

KINDS = ["zlib", "zstd"]


@cache
def content(seed: int, length: int) -> bytes:
    """Bytes that get smaller by a third to a hundredth, or not at all."""
    chance = random.Random(seed)
    if seed % 5 == 0:
        return chance.randbytes(length)
    part = chance.randbytes(max(1, length // (3 * (seed % 30 + 1))))
    return part + bytes([seed % 256]) * (length - len(part))


# What one cluster becomes.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [512, 4096, 65536, 2 << 20])
def test_a_cluster_comes_back_from_its_compressed_form(kind: str, size: int) -> None:
    data = content(7, size) + content(5, size) + content(8, size) + b"short"
    packed = compress_clusters(memoryview(data), kind, size)
    assert [each is None for each in packed] == [False, True, False, False]
    whole = data.ljust(4 * size, b"\0")
    for number, each in enumerate(packed):
        if each is not None:
            assert len(each) < size
            # What lies behind it belongs to others.
            assert decompress(each + b"\xff" * 600, kind, size) == whole[number * size : (number + 1) * size]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_yields_one_cluster_and_not_more(kind: str) -> None:
    bomb = compress_clusters(memoryview(bytes(32 << 20)), kind, 32 << 20)[0]
    assert bomb is not None
    assert len(bomb) < 1 << 20
    assert decompress(bomb, kind, 65536) == bytes(65536)
    with pytest.raises(ImageCorrupt):
        decompress(bomb[: len(bomb) // 2], kind, 32 << 20)


def test_only_whole_clusters_are_taken(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 3 * 65536 + 512)
    with opened(path) as node:
        for offset, length in ((1, 65536), (512, 65536), (0, 512), (65536, 65536 + 512)):
            with pytest.raises(InvalidRequest):
                node.write_compressed(offset, b"x" * length)
        node.write_compressed(2 * 65536, b"x" * (65536 + 512))
        assert node.read(2 * 65536, 65536 + 512) == b"x" * (65536 + 512)
    assert_clean(path)


# Where it goes.


@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_a_host_cluster_takes_no_more_entries_than_its_refcount_can_count(bits: int, tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 64 * 65536, refcount_bits=bits)
    with opened(path) as node:
        for number in range(64):
            node.write_compressed(number * 65536, bytes([number + 1]) * 65536)
            if number % 10 == 0:
                node.flush()
    assert_clean(path)
    found = checked(path)
    assert found["compressed-clusters"] == 64
    with opened(path, read_only=True) as node:
        assert all(node.read(n * 65536, 65536) == bytes([n + 1]) * 65536 for n in range(64))
        counts = node.image.refcounts.block(0)
        assert counts is not None
        assert int(counts.max()) <= (1 << bits) - 1
    # 64 of a hundred bytes each: with counts that are wide enough, one host cluster holds them all.
    used = found["image-end-offset"] // 65536
    assert used - 5 == {1: 64, 2: 22, 4: 5, 16: 1}[bits]


def test_space_is_given_back_when_the_last_entry_of_a_host_cluster_goes(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 1024 * 4096, cluster_size=4096)
    with opened(path) as node:
        node.write_compressed(0, b"".join(content(n * 5 + 1, 4096) for n in range(64)))
        node.flush()
        node.write(0, b"\x01" * (64 * 4096))
        node.flush()
        # On their way to being free: what is packed next must not be put beside them.
        node.write_compressed(100 * 4096, content(7, 4096))
        node.flush()
        node.discard(0, 64 * 4096)
    assert_clean(path)
    assert checked(path)["allocated-clusters"] == 1
    assert path.stat().st_blocks * 512 < 12 * 4096


def test_what_is_packed_after_a_discard_is_not_punched_away(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 64 * 65536)
    with opened(path) as node:
        for number in range(20):
            node.write_compressed(number * 65536, content(number * 5 + 1, 65536))
            if number % 3 == 2:
                node.discard((number - 2) * 65536, 2 * 65536)
            if number % 4 == 3:
                node.flush()
        expected = [content(n * 5 + 1, 65536) if n % 3 == 2 or n >= 18 else bytes(65536) for n in range(20)]
        assert [node.read(n * 65536, 65536) for n in range(20)] == expected
    assert_clean(path)
    assert as_raw(path)[: 20 * 65536] == b"".join(expected)


def test_what_is_packed_beside_what_it_replaces_leaks_nothing_when_a_snapshot_is_given_up(
    tmp_path: Path,
) -> None:
    path = make(tmp_path / "disk.qcow2", 65536)
    with opened(path) as node:
        node.write_compressed(0, content(1, 65536))
        pending = node.snapshot_store.freeze()
        # It goes into the same cluster, behind the one before.
        node.write_compressed(0, content(2, 65536))
        pending.abandon()
        assert node.read(0, 65536) == content(2, 65536)
    assert_clean(path)


@pytest.mark.usefixtures("every_qemu")
def test_qemu_overwrites_and_frees_what_we_packed(tmp_path: Path) -> None:
    for kind in KINDS:
        path = make(tmp_path / f"{kind}.qcow2", 64 * 65536, compression_type=kind)
        with opened(path) as node:
            node.write_compressed(0, b"".join(content(n * 5 + 1, 65536) for n in range(32)))
        qemu_io(path, "write -P 1 0 100k", "discard 1M 512k", "write -c -P 3 40 64k".replace("40", "2560k"))
        assert_clean(path)
        with opened(path) as node:
            assert node.read(0, 100 << 10) == b"\x01" * (100 << 10)
            assert node.read(2560 << 10, 65536) == b"\x03" * 65536
            assert node.read(131072, 65536) == content(11, 65536)
            node.write_compressed(0, content(6, 65536))
        assert_clean(path)


def test_threads_pack_side_by_side(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 256 * 4096, cluster_size=4096, refcount_bits=8)
    failed: list[BaseException] = []

    def work(node: Qcow2Node, first: int) -> None:
        try:
            for number in range(first, 256, 4):
                node.write_compressed(number * 4096, content(number * 5 + 1, 4096))
                assert node.read(number * 4096, 4096) == content(number * 5 + 1, 4096)
                if number % 16 == first:
                    node.flush()
                if number % 32 == first:
                    node.write(number * 4096, b"\x01" * 4096)
                    node.write_compressed(number * 4096, content(number * 5 + 1, 4096))
        except BaseException as error:
            failed.append(error)

    with opened(path) as node:
        threads = [threading.Thread(target=work, args=(node, first)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
    assert_clean(path)
    assert as_raw(path) == b"".join(content(n * 5 + 1, 4096) for n in range(256))


# Sequences.


class Packing(RuleBasedStateMachine):
    """An image and the bytes that it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="stillframe-")
        self.taken: dict[str, bytes] = {}
        self.number = 0

    @initialize(
        cluster=st.sampled_from([512, 4096, 65536]),
        kind=st.sampled_from(KINDS),
        bits=st.sampled_from([1, 2, 4, 16, 64]),
        qemu=st.sampled_from(installed_versions()),
        tail=st.sampled_from([0, 512]),
    )
    def create(self, cluster: int, kind: str, bits: int, qemu: str, tail: int) -> None:
        self.cluster, self.qemu = cluster, qemu
        self.path = Path(self.directory.name) / "disk.qcow2"
        self.size = 24 * cluster + tail
        make(self.path, self.size, cluster_size=cluster, compression_type=kind, refcount_bits=bits)
        self.disk = bytearray(self.size)
        self.opening = opened(self.path)
        self.node = self.opening.__enter__()

    def _range(self, first: int, count: int) -> tuple[int, int]:
        start = first * self.cluster
        return start, min(count * self.cluster, self.size - start)

    @rule(first=st.integers(0, 23), count=st.integers(1, 8), seed=st.integers(1, 60))
    def pack(self, first: int, count: int, seed: int) -> None:
        start, length = self._range(first, count)
        data = b"".join(content(seed + n, self.cluster) for n in range(count))[:length]
        self.node.write_compressed(start, data)
        self.disk[start : start + length] = data

    @rule(first=st.integers(0, 23), count=st.integers(1, 8), seed=st.integers(1, 60), cut=st.integers(0, 511))
    def write(self, first: int, count: int, seed: int, cut: int) -> None:
        start, length = self._range(first, count)
        data = content(seed, length)[cut:]
        self.node.write(start, data)
        self.disk[start : start + len(data)] = data

    @rule(first=st.integers(0, 23), count=st.integers(1, 8))
    def zero(self, first: int, count: int) -> None:
        start, length = self._range(first, count)
        self.node.write_zeroes(start, length)
        self.disk[start : start + length] = bytes(length)

    @rule()
    def flush(self) -> None:
        self.node.flush()

    @precondition(lambda self: len(self.taken) < 3)
    @rule()
    def snapshot(self) -> None:
        self.number += 1
        try:
            take(self.node, f"s{self.number}")
        except LimitReached:
            return
        self.taken[f"s{self.number}"] = bytes(self.disk)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.taken)))
        try:
            revert(self.node, name)
        except LimitReached:
            return
        self.disk = bytearray(self.taken[name])

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.taken)))
        delete(self.node, name)
        del self.taken[name]

    @rule()
    def reopen(self) -> None:
        self.opening.__exit__(None, None, None)
        self._examine()
        self.opening = opened(self.path)
        self.node = self.opening.__enter__()

    def _examine(self) -> None:
        with using(self.qemu):
            assert_clean(self.path)
            assert as_raw(self.path) == self.disk
            for name, disk in self.taken.items():
                assert as_raw(self.path, "-l", name) == disk

    def teardown(self) -> None:
        if hasattr(self, "opening"):
            assert self.node.read(0, self.size) == self.disk
            self.opening.__exit__(None, None, None)
            self._examine()
            note(f"{self.path}")
        self.directory.cleanup()


TestPacking = Packing.TestCase
TestPacking.settings = settings(
    max_examples=400 if LONG else 15, stateful_step_count=30 if LONG else 15, deadline=None, database=None
)


# Interrupted.


@cache
def before(cluster: int, kind: str) -> tuple[bytes, bytes]:
    """An image with a snapshot, packed clusters and plain ones: its bytes, and the disk's."""
    file = MemoryNode()
    create_image(file, 24 * cluster, cluster_size=cluster, compression_type=kind)
    node = Qcow2Node("node", file)
    node.write_compressed(0, b"".join(content(5 * n + 1, cluster) for n in range(6)))
    node.write(8 * cluster, content(1, 4 * cluster))
    take(node, "first")
    node.write_compressed(4 * cluster, b"".join(content(5 * n + 2, cluster) for n in range(6)))
    node.flush()
    disk = node.read(0, node.size)
    node.close()
    return bytes(file.data), disk


def pack(node: Qcow2Node) -> None:
    """Packed over packed, over plain, over nothing, over what the snapshot has, too, with flushes between."""
    cluster = node.image.cluster_size
    for seed, first in enumerate((0, 3, 10, 16, 16, 5)):
        node.write_compressed(first * cluster, b"".join(content(5 * n + seed + 1, cluster) for n in range(4)))
        if seed % 2:
            node.flush()
    node.flush()


def states(image: bytes, log: list[Step], seed: int) -> Iterator[bytes]:
    """Each prefix, and before each flush samples of what was written since the one before."""
    chance = random.Random(seed)
    state, durable, since = bytearray(image), bytearray(image), list[Step]()
    for step in [*log, Flush()]:
        if not isinstance(step, Flush):
            apply_step(state, step)
            since.append(step)
            yield bytes(state)
            continue
        for _ in range(40 if LONG else 6):
            lossy = bytearray(durable)
            for each in since:
                if chance.random() < 0.5:
                    apply_step(lossy, each)
            yield bytes(lossy)
        for each in since:
            apply_step(durable, each)
        since.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster", [512, 65536])
def test_a_crash_while_clusters_are_packed_costs_only_what_was_not_flushed(
    cluster: int, kind: str, tmp_path: Path
) -> None:
    image, old = before(cluster, kind)
    file = RecordingNode(MemoryNode(image))
    node = Qcow2Node("node", file)
    file.log.clear()
    pack(node)
    new = node.read(0, node.size)
    snapshot = as_snapshot(image)
    versions = itertools.cycle(installed_versions())
    number = 0
    for number, state in enumerate(states(image, file.log, seed=cluster)):
        found = check(MemoryNode(state, read_only=True))
        assert found.corruptions == 0, found.messages
        node = Qcow2Node("node", MemoryNode(state, read_only=True), read_only=True)
        disk = node.read(0, node.size)
        for at in range(0, len(disk), cluster):
            here = disk[at : at + cluster]
            assert (
                here in (old[at : at + cluster], new[at : at + cluster])
                or at // cluster in range(3, 9)
                or (16 <= at // cluster < 20)
            )
        assert as_snapshot(state) == snapshot
        if number % 10 == 0:
            (tmp_path / "image.qcow2").write_bytes(state)
            with using(next(versions)):
                assert not checked(tmp_path / "image.qcow2").get("corruptions")
        if found.leaks and number % 5 == 0:
            whole = MemoryNode(state)
            assert repair(whole, "leaks").leaks == 0
    assert number > 50


@pytest.mark.parametrize("bits", [1, 16])
def test_a_killed_process_loses_no_cluster_that_it_had_packed(bits: int, tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 64 * 65536, refcount_bits=bits)
    program = (
        "import os\n"
        "from stillframe.block.file import FileNode\n"
        "from stillframe.block.qcow2 import Qcow2Node\n"
        f"node = Qcow2Node('node', FileNode('file', {str(path)!r}))\n"
        "for number in range(40):\n"
        "    node.write_compressed(number * 65536, bytes([number + 1]) * 65536)\n"
        "node.write_compressed(0, bytes([99]) * 65536)\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    with opened(path) as node:
        assert [node.read(n * 65536, 65536) for n in range(40)] == [
            bytes([n + 1 if n else 99]) * 65536 for n in range(40)
        ]
        node.write_compressed(50 * 65536, b"x" * 65536)
    assert checked(path).get("corruptions", 0) == 0
    file = FileNode("file", str(path))
    try:
        assert repair(file, "leaks").leaks == 0
    finally:
        file.close()
    assert_clean(path)


def as_snapshot(image: bytes) -> bytes:
    node = Qcow2Node("node", MemoryNode(image, read_only=True), read_only=True)
    view = node.at_snapshot(node.snapshot_store.snapshots()[0])
    return view.read(0, view.size)


@pytest.mark.parametrize("cluster", [512, 65536])
def test_an_error_while_clusters_are_packed_leaves_the_image_usable(cluster: int, tmp_path: Path) -> None:
    image, _ = before(cluster, "zlib")
    snapshot = as_snapshot(image)
    number = 0
    while True:
        memory = MemoryNode(image)
        file = FaultyNode(memory, None, errno.ENOSPC if number % 2 else errno.EIO)
        node = Qcow2Node("node", file)
        file.calls, file.fail_at = 0, number
        raised = None
        try:
            pack(node)
        except IOFailed as error:
            raised = error
        if file.calls <= number:
            break
        file.fail_at = None
        assert raised is not None or number
        # The same again, as a user would.
        pack(node)
        disk = node.read(0, node.size)
        node.close()
        data = bytes(memory.data)
        assert check(MemoryNode(data, read_only=True)).corruptions == 0
        again = Qcow2Node("node", MemoryNode(data, read_only=True), read_only=True)
        assert again.read(0, again.size) == disk
        assert as_snapshot(data) == snapshot
        if number % 8 == 0:
            (tmp_path / "image.qcow2").write_bytes(data)
            assert not checked(tmp_path / "image.qcow2").get("corruptions")
        number += 1
    assert number > 20
