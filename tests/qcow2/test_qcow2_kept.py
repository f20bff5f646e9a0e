"""What other programs keep in an image is there, byte for byte, after everything that we do to it."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qcow2.crafting import entry, list_snapshots
from qcow2.images import (
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
from stillframe.block.file import FileNode
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.layout import pack_header, parse_header
from stillframe.block.qcow2.repair import repair
from stillframe.block.qcow2.snapshot_table import pack_extra
from stillframe.errors import Unsupported

OPERATIONS: list[Callable[[Qcow2Node], object]] = [
    lambda node: node.flush(),
    lambda node: node.write(70_000, b"changed" * 20_000),
    lambda node: take(node, "ours", b"state" * 9999),
    lambda node: node.discard(0, 1 << 20),
    lambda node: revert(node, "ours"),
    lambda node: node.truncate(5 << 20),
    lambda node: node.truncate(3 << 20),
    lambda node: take(node, "smaller"),
    lambda node: revert(node, "ours"),
    lambda node: delete(node, "ours"),
    lambda node: node.write_zeroes(0, 3 << 20),
]


def damaged(path: Path) -> None:
    """A leak."""
    with opened(path, read_only=True) as node:
        header = node.image.header
    with path.open("r+b") as file:
        file.seek(header.refcount_table_offset)
        block = int.from_bytes(file.read(8), "big")
        file.seek(block + 500 * header.refcount_bits // 8)
        file.write(b"\1" * (header.refcount_bits // 8))


def repaired(path: Path) -> None:
    """By us, once with something to repair."""
    damaged(path)
    for what in ("leaks", "all"):
        file_node = FileNode("file", str(path))
        try:
            repair(file_node, what)
        finally:
            file_node.close()


def test_header_extensions_and_bits_that_we_do_not_know_stay_as_they_are(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 4 << 20)
    data = path.read_bytes()
    header = parse_header(data[:65536])
    foreign = random.Random(1).randbytes(333)
    header = replace(
        header,
        extensions=((0x11223344, foreign), *header.extensions, (0x55667788, b""), (0x11223344, b"twice")),
        compatible=header.compatible | 1 << 41 | 1 << 63,
        autoclear=1 << 9,
        header_length=128,
    )
    first = bytearray(pack_header(header))
    first[112:128] = b"fields of others"
    path.write_bytes(bytes(first) + data[len(first) :])
    kept = path.read_bytes()[80:88] + path.read_bytes()[96:65536]
    with opened(path, read_only=True) as node:
        assert node.image.header.autoclear == 1 << 9
    for operation in OPERATIONS:
        with opened(path) as node:
            assert node.image.header.autoclear == 0
            operation(node)
        now = path.read_bytes()
        assert now[80:88] + now[96:65536] == kept
        assert now[88:96] == bytes(8)
        assert_clean(path)
    repaired(path)
    now = path.read_bytes()
    assert now[80:88] + now[96:65536] == kept
    assert_clean(path)


def test_extra_data_of_snapshots_that_we_do_not_know_stays_as_it_is(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 4 << 20)
    chance = random.Random(2)
    known = pack_extra(0, 4 << 20, 77, b"")
    foreign = [known + chance.randbytes(length) for length in (1000, 1, 8, 24, 999)]
    listed = [entry(at + 1, b"foreign %d" % at, extra=extra) for at, extra in enumerate(foreign)]
    list_snapshots(path, [replace(each, date_sec=7, date_nsec=8, vm_clock_ns=1 << 40) for each in listed])

    def of_others() -> list[tuple[bytes, bytes, bytes, int, int, int]]:
        with opened(path, read_only=True) as node:
            return [
                (each.id, each.name, each.extra, each.date_sec, each.date_nsec, each.vm_clock_ns)
                for each in node.image.world.snapshots
                if each.name.startswith(b"foreign")
            ]

    before = of_others()
    assert [each[2] for each in before] == foreign
    for operation in OPERATIONS:
        with opened(path) as node:
            operation(node)
        assert of_others() == before
        assert_clean(path)
    with opened(path) as node:
        delete(node, "foreign 1")
        revert(node, "foreign 4")
        assert node.size == 4 << 20
    del before[1]
    repaired(path)
    assert of_others() == before
    assert_clean(path)


# Persistent bitmaps.


def bitmaps(path: Path) -> dict[str, list[str]]:
    """Flags by name, as qemu-img sees them."""
    data = json.loads(qemu_img("info", "--output=json", path))["format-specific"]["data"]
    return {each["name"]: each["flags"] for each in data.get("bitmaps", [])}


def recorded(tmp_path: Path) -> Path:
    """An image with two bitmaps, one of which has seen writes."""
    path = make(tmp_path / "image.qcow2", 4 << 20)
    with opened(path) as node:
        take(node, "before")
    qemu_img("bitmap", "--add", path, "seen")
    qemu_img("bitmap", "--add", "--disable", "-g", "4096", path, "idle")
    qemu_io(path, "write -P 3 1M 100k")
    return path


@pytest.mark.usefixtures("every_qemu")
def test_bitmaps_stay_in_force_while_only_snapshots_come_and_go(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    assert bitmaps(path) == {"seen": ["auto"], "idle": []}
    with opened(path) as node:
        where = node.image.header.extensions
        take(node, "ours", b"state" * 9999)
        delete(node, "before")
        node.flush()
    assert_clean(path)
    repaired(path)
    assert_clean(path)
    with opened(path, read_only=True) as node:
        assert node.image.header.extensions == where
        assert node.info().format_specific["data"]["bitmaps"] == [  # type: ignore[index]
            {"flags": ["auto"], "name": "seen", "granularity": 65536},
            {"flags": [], "name": "idle", "granularity": 4096},
        ]
    assert bitmaps(path) == {"seen": ["auto"], "idle": []}
    # They say what they said: stock tools can copy them.
    qemu_img("bitmap", "--add", path, "copy")
    qemu_img("bitmap", "--merge", "seen", path, "copy")
    qemu_img("snapshot", "-d", "ours", path)
    assert_clean(path)


@pytest.mark.usefixtures("every_qemu")
@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.write(1 << 20, b"in place"),
        lambda node: node.write(3 << 20, b"allocating"),
        lambda node: node.write_zeroes(1 << 20, 65536),
        lambda node: node.discard(1 << 20, 65536),
    ],
    ids=["in place", "allocating", "zeroes", "discard"],
)
def test_a_change_of_the_disk_that_bitmaps_do_not_record_is_owned_up_to(
    change: Callable[[Qcow2Node], None], tmp_path: Path
) -> None:
    path = recorded(tmp_path)
    with opened(path) as node:
        change(node)
        # Before the change, and not at the end: a crash must not leave a bitmap that lies.
        flags = {each["name"]: each["flags"] for each in node.info().format_specific["data"]["bitmaps"]}  # type: ignore[index]
        assert flags == {"seen": ["in-use", "auto"], "idle": ["in-use"]}
        content = node.read(0, node.size)
    assert_clean(path)
    assert bitmaps(path) == {"seen": ["in-use", "auto"], "idle": ["in-use"]}
    assert as_raw(path) == content
    for name in ("seen", "idle"):
        qemu_img("bitmap", "--remove", path, name)
    assert_clean(path)
    with opened(path) as node:
        revert(node, "before")
    assert_clean(path)


@pytest.mark.usefixtures("every_qemu")
def test_a_repair_keeps_the_snapshots_of_an_image_with_bitmaps(tmp_path: Path) -> None:
    """A repair by qemu-img loses them all (repair-keeps-snapshots-beside-bitmaps): should it stop doing so, say so."""
    path = recorded(tmp_path)
    repaired(path)
    with opened(path) as node:
        assert [each.name for each in node.snapshot_store.snapshots()] == ["before"]
    assert bitmaps(path) == {"seen": ["auto"], "idle": []}
    assert_clean(path)
    damaged(path)
    qemu_img("check", "-r", "leaks", path)
    with opened(path, read_only=True) as node:
        assert not node.snapshot_store.snapshots(), "qemu-img has learnt it: docs/differences.md"


def test_a_revert_and_a_resize_are_refused_while_there_are_bitmaps(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    for _ in range(2):
        with opened(path) as node:
            before = node.read(0, node.size)
            with pytest.raises(Unsupported, match=r"^Device has active dirty bitmaps$"):
                node.snapshot_store.prepare_revert(named(node, "before"))
            with pytest.raises(Unsupported, match=r"^Can't resize an image with persistent bitmaps$"):
                node.truncate(8 << 20)
            assert node.read(0, node.size) == before
            node.write(0, b"in use now")
    assert_clean(path)


def test_where_the_directory_of_bitmaps_cannot_be_read_it_is_no_longer_promised(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    with opened(path, read_only=True) as node:
        extension = dict(node.image.header.extensions)[0x23852875]
    data = bytearray(path.read_bytes())
    at = data.index(extension)
    data[at + 16 : at + 24] = (1 << 50).to_bytes(8, "big")
    path.write_bytes(data)
    with opened(path) as node:
        node.write(0, b"x")
    assert path.read_bytes()[88:96] == bytes(8)


def test_snapshots_without_sizes_are_completed_by_the_repair_that_a_resize_advises(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    foreign = pack_extra(7, 1 << 20, None, b"") + b"more"
    listed = [
        entry(1, b"bare", extra=b"", state_size_32=5),
        entry(2, b"state size alone", extra=(6).to_bytes(8, "big")),
        entry(3, b"complete", extra=foreign),
    ]
    list_snapshots(path, listed)
    with opened(path) as node:
        node.write(0, b"content")
        before = node.snapshot_store.snapshots()
        with pytest.raises(Unsupported, match="does not record its size") as refused:
            node.truncate(2 << 20)
        assert "stillframe image check --repair all" in str(refused.value.remedy)
    file = FileNode("file", str(path))
    result = repair(file, "all")
    file.close()
    assert (result.corruptions, result.corruptions_fixed, result.leaks) == (0, 2, 0)
    assert_clean(path)
    with opened(path) as node:
        assert node.snapshot_store.snapshots() == before
        assert [len(each.extra) for each in node.image.world.snapshots] == [24, 24, 28]
        node.truncate(2 << 20)
        assert [each.disk_size for each in node.snapshot_store.snapshots()] == [1 << 20] * 3
    shown = json.loads(qemu_img("info", "--output=json", path))["snapshots"]
    assert [each["vm-state-size"] for each in shown] == [5, 6, 7]
    assert_clean(path)
