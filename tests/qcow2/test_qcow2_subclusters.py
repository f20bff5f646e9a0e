"""Extended L2 entries: clusters allocated, zeroed and copied in 32 parts, and no part touched that need not be."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcow2.images import (
    LONG,
    as_raw,
    assert_clean,
    delete,
    make,
    named,
    opened,
    qemu_img,
    qemu_io,
    revert,
    take,
)
from qcow2.memory import MemoryNode
from stillframe.block.file import FileNode
from stillframe.block.node import ExtentKind, Node
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.block.raw import RawNode
from stillframe.errors import ImageCorrupt, InvalidRequest

KIB = 1024
CLUSTER = 64 * KIB
PART = CLUSTER // 32
SIZE = 20 * CLUSTER + 512
SUBCLUSTERS = {"cluster_size": CLUSTER, "extended_l2": True}


def words(node: Qcow2Node, cluster: int = 0) -> tuple[int, int, int]:
    """The L2 entry of a guest cluster: its first word, and which subclusters are allocated, and read as zeroes."""
    image = node.image
    with image.gate.lock:
        table = int.from_bytes(image.world.l1[:8], "big") & 0x00FFFFFFFFFFFE00
        entry = image.mapping.entries(table, cluster, 1)[0] if table else 0
    return entry & (1 << 64) - 1, entry >> 64 & 0xFFFFFFFF, entry >> 96


def mask(*parts: int) -> int:
    return sum(1 << part for part in parts)


# With QEMU.


@pytest.mark.usefixtures("every_qemu")
@pytest.mark.parametrize("cluster_size", [16384, 65536, 2 << 20])
@pytest.mark.parametrize("backed", [False, True])
def test_both_sides_read_what_the_other_wrote(cluster_size: int, backed: bool, tmp_path: Path) -> None:
    below, path = tmp_path / "below.raw", tmp_path / "image.qcow2"
    size = 40 * 65536 + 512
    below.write_bytes(random.Random(1).randbytes(30 * 65536 + 1024))
    backing = {"backing_file": below.name, "backing_format": "raw"} if backed else {}
    make(path, size, cluster_size=cluster_size, extended_l2=True, **backing)
    model = bytearray(below.read_bytes().ljust(size, b"\0") if backed else size)
    chance = random.Random(cluster_size)
    file = FileNode("below", str(below), read_only=True)
    lower = RawNode("lower", file, read_only=True) if backed else None
    try:
        for number in range(6 if LONG else 2):
            with opened(path, backing=lower) as node:
                exercise(node, model, chance, 40)
            assert_clean(path)
            assert as_raw(path) == model
            offset = chance.randrange(0, 1 << 20)
            qemu_io(path, f"write -P {number + 1} {offset} 3000", "write -z 150k 6k", "write -z -u 300k 2k")
            model[offset : offset + 3000] = bytes([number + 1]) * 3000
            model[150 * KIB : 156 * KIB] = bytes(6 * KIB)
            model[300 * KIB : 302 * KIB] = bytes(2 * KIB)
            qemu_io(path, "discard 512k 64k")
            model[512 * KIB : 576 * KIB] = as_raw(path)[512 * KIB : 576 * KIB]
    finally:
        file.close()


def exercise(node: Node, model: bytearray, chance: random.Random, steps: int) -> None:
    for _ in range(steps):
        length = chance.choice([1, 512, 1000, PART, 3 * PART, CLUSTER, 100_000])
        start = chance.randrange(0, len(model) - length)
        if chance.random() < 0.6:
            start &= ~(PART - 1)
        what = chance.choice(["write", "write", "zero", "keep", "discard", "flush"])
        if what == "write":
            data = chance.randbytes(length)
            node.write(start, data)
            model[start : start + length] = data
        elif what == "flush":
            node.flush()
        elif what == "discard":
            node.discard(start, length)
            after, before = node.read(start, length), model[start : start + length]
            assert all(new in (old, 0) for old, new in zip(before, after, strict=True))
            model[start : start + length] = after
        else:
            node.write_zeroes(start, length, unmap=what == "zero")
            model[start : start + length] = bytes(length)
        assert node.read(0, len(model)) == model


@pytest.mark.usefixtures("every_qemu")
def test_an_image_of_qemus_is_read_and_written_on(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "extended_l2=on", path, str(SIZE))
    qemu_io(path, "write -P 5 1k 1k", "write -P 6 70k 100k", "write -z 80k 2k", "write -z -u 192k 64k")
    model = bytearray(as_raw(path))
    with opened(path) as node:
        assert node.read(0, SIZE) == model
        exercise(node, model, random.Random(3), 60)
        assert node.info().format_specific["data"]["extended-l2"] is True  # type: ignore[index]
    assert_clean(path)
    assert as_raw(path) == model


@pytest.mark.usefixtures("every_qemu")
@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_compressed_clusters_among_subclusters_are_read_and_overwritten(method: str, tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image.qcow2"
    raw.write_bytes(b"".join(bytes([n % 7]) * 3000 for n in range(400)).ljust(20 * CLUSTER, b"\1"))
    options = f"extended_l2=on,compression_type={method}"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    model = bytearray(raw.read_bytes())
    with opened(path) as node:
        assert node.read(0, len(model)) == model
        node.write(PART + 5, b"w" * 100)
        model[PART + 5 : PART + 105] = b"w" * 100
        node.write_zeroes(CLUSTER + PART, PART)
        model[CLUSTER + PART : CLUSTER + 2 * PART] = bytes(PART)
        node.write_zeroes(2 * CLUSTER, CLUSTER)
        model[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
        node.discard(3 * CLUSTER + PART, PART)
        assert node.read(0, len(model)) == model
    assert_clean(path)
    assert as_raw(path) == model


@pytest.mark.usefixtures("every_qemu")
def test_snapshots_keep_their_subclusters_on_both_sides(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", SIZE, **SUBCLUSTERS)
    model, chance = bytearray(SIZE), random.Random(8)
    disks: dict[str, bytes] = {}
    for number in range(4):
        with opened(path) as node:
            exercise(node, model, chance, 15)
            take(node, f"ours {number}", chance.randbytes(150_000))
            disks[f"ours {number}"] = bytes(model)
            exercise(node, model, chance, 15)
        assert_clean(path)
        qemu_img("snapshot", "-c", f"theirs {number}", path)
        disks[f"theirs {number}"] = as_raw(path)
        assert disks[f"theirs {number}"] == model
    for name, disk in disks.items():
        assert as_raw(path, "-l", f"snapshot.name={name}") == disk
        with opened(path) as node:
            revert(node, name)
            assert node.read(0, SIZE) == disk
            model = bytearray(disk)
            exercise(node, model, chance, 5)
            if number := chance.randrange(2):
                delete(node, name)
        assert_clean(path)
        if not number:
            qemu_img("snapshot", "-d", name, path)
            assert_clean(path)


# No part that need not be.


def test_a_write_takes_the_parts_that_it_touches_and_no_other(tmp_path: Path) -> None:
    with opened(make(tmp_path / "image.qcow2", SIZE, **SUBCLUSTERS)) as node:
        node.write(3 * PART + 10, b"x" * PART)
        word, allocated, zero = words(node)
        assert (allocated, zero) == (mask(3, 4), 0)
        node.write(10 * PART, b"y")
        assert words(node) == (word, mask(3, 4, 10), 0)
        node.write_zeroes(4 * PART, 8 * PART)
        # Without anything below, what is not allocated reads as zeroes by itself; it may say so.
        assert words(node)[:2] == (word, mask(3))
        assert words(node)[2] & mask(4, 10) == mask(4, 10)
        node.write(4 * PART, b"z" * PART)
        assert words(node)[1] == mask(3, 4)
        kinds = [(each.kind, each.offset, each.length) for each in node.extents(2 * PART, 4 * PART)]
        assert (ExtentKind.DATA, 3 * PART, 2 * PART) in kinds


class Counting(MemoryNode):
    """A backing file that tells what was read of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, read_only=True)
        self.read_ranges: list[tuple[int, int]] = []

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self.read_ranges.append((offset, len(buffer)))
        super().readinto(offset, buffer)


def test_only_the_rest_of_a_part_is_copied_from_below(tmp_path: Path) -> None:
    below = Counting(random.Random(1).randbytes(SIZE))
    with opened(make(tmp_path / "image.qcow2", SIZE, **SUBCLUSTERS), backing=below) as node:
        node.write(5 * PART + 100, b"x" * 200)
        assert sorted(below.read_ranges) == [(5 * PART, 100), (5 * PART + 300, PART - 300)]
        assert words(node)[1] == mask(5)
        del below.read_ranges[:]
        node.write(6 * PART, b"y" * 2 * PART)
        node.write(5 * PART, b"z" * 3 * PART)
        node.write_zeroes(9 * PART, PART)
        node.discard(9 * PART, 2 * PART)
        assert not below.read_ranges
        assert words(node)[1:] == (mask(5, 6, 7), mask(9, 10))
        expected = bytearray(below.data)
        expected[5 * PART : 8 * PART] = b"z" * 3 * PART
        expected[9 * PART : 11 * PART] = bytes(2 * PART)
        assert node.read(0, SIZE) == expected


def test_a_cluster_that_a_snapshot_shares_takes_along_only_what_it_holds(tmp_path: Path) -> None:
    below = Counting(random.Random(1).randbytes(SIZE))
    with opened(make(tmp_path / "image.qcow2", SIZE, **SUBCLUSTERS), backing=below) as node:
        node.write(2 * PART, b"a" * PART)
        node.write_zeroes(4 * PART, PART)
        before = words(node)
        pending = node.snapshot_store.freeze()  # type: ignore[union-attr]
        del below.read_ranges[:]
        node.write(20 * PART, b"b" * PART)
        after = words(node)
        assert after[0] != before[0]
        assert after[1:] == (mask(2, 20), mask(4))
        assert not below.read_ranges
        expected = bytearray(below.data)
        for part, content in ((2, b"a"), (4, b"\0"), (20, b"b")):
            expected[part * PART : (part + 1) * PART] = content * PART
        assert node.read(0, SIZE) == expected
        pending.abandon()


def test_the_place_of_a_cluster_goes_with_its_last_part(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", SIZE, **SUBCLUSTERS)
    with opened(path) as node:
        node.write(0, b"x" * 3 * PART)
        node.discard(0, 2 * PART)
        assert words(node)[0]
        node.discard(2 * PART, PART)
        assert words(node)[0] == 0
        node.write_zeroes(CLUSTER, PART, unmap=False)
        node.write(CLUSTER, b"y" * PART)
        node.write_zeroes(CLUSTER, PART, unmap=False)
        assert words(node, 1)[0]
        assert node.read(0, SIZE) == bytes(SIZE)
    assert_clean(path)


def test_a_power_cut_shows_no_part_that_was_not_written(tmp_path: Path) -> None:
    """New parts of a cluster that is there already lie over whatever its place held before."""
    file = MemoryNode()
    create_image(file, SIZE, **SUBCLUSTERS)
    node = Qcow2Node("node", file)
    node.write(0, b"stale" * CLUSTER)
    node.flush()
    node.discard(0, 5 * CLUSTER)
    node.flush()
    node.write(0, b"a" * PART)
    node.flush()
    durable = bytes(file.data)
    node.write(PART, b"b" * PART)
    tables = bytes(file.data)
    host = words(node)[0] & 0x00FFFFFFFFFFFE00
    # The entry's table as it is, the new data not: nothing says yet that it is there.
    cut = bytearray(tables)
    cut[host + PART : host + 2 * PART] = b"?" * PART
    assert Qcow2Node("cut", MemoryNode(cut), read_only=True).read(0, 2 * PART) == b"a" * PART + bytes(PART)
    assert Qcow2Node("cut", MemoryNode(durable), read_only=True).read(0, 2 * PART)[PART:] == bytes(PART)
    node.flush()
    assert Qcow2Node("kept", MemoryNode(file.data), read_only=True).read(PART, PART) == b"b" * PART


# What an image may hold.


@pytest.mark.parametrize(
    ("word", "bitmap", "text"),
    [
        (None, 1 << 32 | 1, "Invalid cluster entry"),
        (0, 1, "Invalid cluster entry"),
        (1 << 62, 1, "Invalid compressed cluster entry"),
        (1 << 62, 1 << 63, "Invalid compressed cluster entry"),
        (1 << 63 | 512, 1, "unaligned"),
    ],
)
def test_bitmaps_that_contradict_are_corruption(word: int | None, bitmap: int, text: str) -> None:
    file = MemoryNode()
    create_image(file, SIZE, **SUBCLUSTERS)
    node = Qcow2Node("node", file)
    node.write(0, b"x" * PART)
    node.write(CLUSTER, b"y" * PART)
    node.close()
    node = Qcow2Node("node", file)
    present = words(node)[0]
    at = file.data.index(present.to_bytes(8, "big") + (1).to_bytes(8, "big"))
    file.data[at : at + 16] = (present if word is None else word).to_bytes(8, "big") + bitmap.to_bytes(
        8, "big"
    )
    node = Qcow2Node("node", file)
    for call in (
        lambda: node.read(0, 1),
        lambda: node.write(8 * PART, b"z"),
        lambda: node.write_zeroes(PART, PART),
        lambda: list(node.extents(0, PART)),
    ):
        with pytest.raises(ImageCorrupt, match=text):
            call()
    assert node.read(CLUSTER, PART) == b"y" * PART


def test_subclusters_need_large_clusters_and_version_3(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cluster sizes of at least 16384 bytes"):
        make(tmp_path / "a", SIZE, cluster_size=8192, extended_l2=True)
    with pytest.raises(InvalidRequest, match=r"compatibility level 1\.1"):
        make(tmp_path / "a", SIZE, compat="0.10", extended_l2=True)
    path = make(tmp_path / "image.qcow2", SIZE, cluster_size=16384, extended_l2=True)
    data = bytearray(path.read_bytes())
    data[23] = 13
    path.write_bytes(data)
    with pytest.raises(ImageCorrupt, match="Unsupported subcluster size: 256"), opened(path, read_only=True):
        pass


# Any sequence.

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["write", "write", "zero", "keep", "discard", "resize", "freeze", "commit", "revert"]
        ),
        st.integers(0, 3 * CLUSTER // 512),
        st.integers(1, 80),
        st.sampled_from([1, 512, PART]),
        st.integers(1, 255),
    ),
    max_size=30,
)


@settings(max_examples=300 if LONG else 40, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, below=st.integers(0, 4 * CLUSTER // 512))
def test_any_sequence_over_a_shorter_or_longer_backing_file_keeps_every_byte(
    steps: list[tuple[str, int, int, int, int]], below: int
) -> None:
    lower = MemoryNode(bytes((n // 512) % 255 + 1 for n in range(below * 512)), read_only=True)
    file = MemoryNode()
    size = 3 * CLUSTER + 1024
    create_image(file, size, **SUBCLUSTERS)
    node = Qcow2Node("node", file, backing=lower)
    model = bytearray(lower.data[:size].ljust(size, b"\0"))
    pending: Any = None
    frozen = b""
    taken: dict[str, bytes] = {}
    for number, (what, sector, count, unit, seed) in enumerate(steps):
        start = min(sector * 512 // unit * unit, len(model) - 1)
        length = min(count * unit, len(model) - start)
        if what == "write":
            node.write(start, bytes([seed]) * length)
            model[start : start + length] = bytes([seed]) * length
        elif what in ("zero", "keep"):
            node.write_zeroes(start, length, unmap=what == "zero")
            model[start : start + length] = bytes(length)
        elif what == "discard":
            node.discard(start, length)
            after, before = node.read(start, length), model[start : start + length]
            assert all(new in (old, 0) for old, new in zip(before, after, strict=True))
            model[start : start + length] = after
        elif what == "resize" and pending is None:
            new_size = max(512, (start // 512 + seed) * 512)
            node.truncate(new_size)
            model = model[:new_size].ljust(new_size, b"\0")
        elif what == "freeze" and pending is None:
            pending, frozen = node.snapshot_store.freeze(), bytes(model)  # type: ignore[union-attr]
            pending.write_state(0, b"state" * seed)
        elif what == "commit" and pending is not None:
            from stillframe.block.node import SnapshotRecord

            change = pending.prepare(SnapshotRecord(str(number), 1, 2))
            change.commit()
            change.finish()
            taken[str(number)], pending = frozen, None
        elif what == "revert" and pending is None and taken:
            name = sorted(taken)[seed % len(taken)]
            revert(node, name)
            model = bytearray(taken[name])
        assert node.read(0, node.size) == model
    if pending is not None:
        pending.abandon()
    for name, disk in taken.items():
        assert named(node, name).disk_size == len(disk)
        revert(node, name)
        assert node.read(0, node.size) == disk
        delete(node, name)
    node.close()
