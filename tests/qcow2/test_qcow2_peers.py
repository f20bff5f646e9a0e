"""Images of ours read by QEMU's tools and theirs by us, over versions, cluster sizes and refcount widths."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from qcow2.images import (
    DATA,
    as_raw,
    assert_clean,
    checked,
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
from stillframe.block.node import ExtentKind
from stillframe.block.qcow2.check import check
from stillframe.block.raw import RawNode
from stillframe.errors import LimitReached, Unsupported

FORMATS: list[dict[str, Any]] = [
    *({"cluster_size": size} for size in (512, 1024, 4096, 65536, 2 << 20)),
    *({"cluster_size": size, "compat": "0.10"} for size in (512, 65536, 2 << 20)),
    *({"cluster_size": 65536, "refcount_bits": bits} for bits in (1, 2, 4, 8, 32, 64)),
    *({"cluster_size": 512, "refcount_bits": bits} for bits in (1, 64)),
    {"cluster_size": 65536, "lazy_refcounts": True},
]
SIZE = 5 * 1024 * 1024 + 512
pytestmark = pytest.mark.usefixtures("every_qemu")


def label(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def peer_options(options: dict[str, Any]) -> str:
    """Options of ours in qemu-img's words."""
    words = {"compat": "1.1"} | options
    return ",".join(f"{name}={'on' if value is True else value}" for name, value in words.items())


def scattered(seed: int) -> list[tuple[int, bytes]]:
    """Writes of all shapes: within clusters, across them, across L2 tables."""
    chance = random.Random(seed)
    writes = []
    for _ in range(30):
        length = chance.choice([1, 511, 512, 4096, 65536, 70_001, 200_000])
        writes.append((chance.randrange(0, SIZE - length), chance.randbytes(length)))
    return writes


@pytest.mark.parametrize("options", FORMATS, ids=label)
def test_what_we_write_is_what_qemu_reads(options: dict[str, Any], tmp_path: Path) -> None:
    path = make(tmp_path / "ours.qcow2", SIZE, **options)
    model = bytearray(SIZE)
    with opened(path) as node:
        for offset, data in scattered(1):
            node.write(offset, data)
            model[offset : offset + len(data)] = data
        node.write_zeroes(100_000, 300_000)
        model[100_000:400_000] = bytes(300_000)
        node.write_zeroes(500_000, 100_000, unmap=False)
        model[500_000:600_000] = bytes(100_000)
    assert_clean(path)
    assert as_raw(path) == model
    with opened(path, read_only=True) as node:
        assert node.read(0, SIZE) == model
        found = {each.offset: each.length for each in node.extents(0, SIZE) if each.kind is ExtentKind.DATA}
    listed = json.loads(qemu_img("map", "--output=json", path))
    assert sum(found.values()) == sum(each["length"] for each in listed if each["data"])


@pytest.mark.parametrize("options", FORMATS, ids=label)
def test_what_qemu_writes_is_what_we_read_and_write_on(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "theirs.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", peer_options(options), path, str(SIZE))
    qemu_io(path, "write -P 17 1000 300000", "write -P 18 1048576 1048576", "write -z 1200000 131072")
    expected = as_raw(path)
    with opened(path) as node:
        assert node.read(0, SIZE) == expected
        node.write(1_150_000, b"ours" * 30_000)
        node.discard(0, 65536 * 2)
        node.flush()
        after = node.read(0, SIZE)
    assert after[1_150_000:1_270_000] == b"ours" * 30_000
    assert as_raw(path) == after
    assert_clean(path)
    with opened(path) as node, opened(make(tmp_path / "copy.qcow2", SIZE, **options)) as copy:
        copy.write(0, node.read(0, SIZE))
    qemu_img("compare", path, tmp_path / "copy.qcow2")


@pytest.mark.parametrize("options", FORMATS, ids=label)
def test_snapshots_of_ours_are_qemus_to_apply_and_delete_and_the_reverse(
    options: dict[str, Any], tmp_path: Path
) -> None:
    path = make(tmp_path / "image.qcow2", SIZE, **options)
    state = random.Random(3).randbytes(333_333)
    disks: dict[str, bytes] = {}
    if options.get("refcount_bits") == 1:
        with opened(path) as node:
            node.write(0, b"x" * 100_000)
            with pytest.raises(LimitReached):
                take(node, "impossible")
            assert node.read(0, 100_000) == b"x" * 100_000
        assert_clean(path)
        return
    with opened(path) as node:
        node.write(0, b"a" * 1_500_000)
        disks["ours"] = node.read(0, SIZE)
        take(node, "ours", state)
        node.write(70_000, b"b" * 100_000)
    assert_clean(path)
    disks["theirs"] = as_raw(path)
    qemu_img("snapshot", "-c", "theirs", path)
    with opened(path) as node:
        node.write(0, b"c" * 3_000_000)
        assert node.snapshot_store.read_state(named(node, "ours"), 0, 1 << 30) == state
    assert_clean(path)
    for name in ("ours", "theirs"):
        if options.get("refcount_bits") != 2:
            # On its way QEMU counts one reference more than it needs in the end.
            qemu_img("snapshot", "-a", name, path)
            assert_clean(path)
            assert as_raw(path) == disks[name]
        with opened(path) as node:
            node.write(65_536, b"d" * 65_536)
            revert(node, name)
            assert node.read(0, SIZE) == disks[name]
            assert node.snapshot_store.read_state(named(node, "ours"), 0, 1 << 30) == state
        assert_clean(path)
        assert as_raw(path) == disks[name]
    qemu_img("snapshot", "-d", "ours", path)
    assert_clean(path)
    with opened(path) as node:
        delete(node, "theirs")
        assert not node.snapshot_store.snapshots()
        assert node.read(0, SIZE) == disks["theirs"]
    assert_clean(path)


def test_snapshots_are_listed_in_qemus_words(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    with opened(path) as node:
        take(node, "first", b"s" * 5000, vm_clock_ns=3_000_000_007, icount=99)
        take(node, "zweitens äöü", vm_clock_ns=1)
    listed = json.loads(qemu_img("info", "--output=json", path))["snapshots"]
    assert [(each["id"], each["name"], each["vm-state-size"], each.get("icount")) for each in listed] == [
        ("1", "first", 5000, 99),
        ("2", "zweitens äöü", 0, None),
    ]
    assert (listed[0]["vm-clock-sec"], listed[0]["vm-clock-nsec"]) == (3, 7)
    assert (listed[0]["date-sec"], listed[0]["date-nsec"]) == (1_700_000_000, 5)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_compressed_clusters_are_read_overwritten_and_snapshotted(method: str, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    content = b"".join(bytes([n % 7]) * 3000 + random.Random(n).randbytes(100) for n in range(600))
    raw.write_bytes(content.ljust(2 << 20, b"\1"))
    path = tmp_path / "packed.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={method}", raw, path)
    model = bytearray(raw.read_bytes())
    with opened(path) as node:
        assert node.read(0, len(model)) == model
        assert any(each.compressed for each in node.extents(0, node.size))
        take(node, "packed")
        node.write(100_000, b"w" * 50_000)
        model[100_000:150_000] = b"w" * 50_000
        node.write_zeroes(65536 * 5, 65536)
        model[65536 * 5 : 65536 * 6] = bytes(65536)
        assert node.read(0, len(model)) == model
    assert_clean(path)
    assert as_raw(path) == model
    with opened(path) as node:
        revert(node, "packed")
        delete(node, "packed")
        assert node.read(0, node.size) == raw.read_bytes()
    assert_clean(path)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("longer", [True, False])
def test_a_backing_file_shows_where_nothing_was_written_and_nowhere_else(
    compat: str, longer: bool, tmp_path: Path
) -> None:
    below = tmp_path / "below.raw"
    below.write_bytes(random.Random(1).randbytes((3 << 20) if longer else 700_001 // 512 * 512))
    path = tmp_path / "above.qcow2"
    size = 2 << 20
    qemu_img(
        "create", "-f", "qcow2", "-o", f"compat={compat}", "-b", below.name, "-F", "raw", path, str(size)
    )
    model = bytearray(below.read_bytes()[:size].ljust(size, b"\0"))
    file = FileNode("below", str(below), read_only=True)
    try:
        with opened(path, backing=RawNode("raw", file, read_only=True)) as node:
            assert node.read(0, size) == model
            for offset, length in ((10, 100), (65_530, 10), (600_000, 200_000), (size - 5, 5)):
                node.write(offset, b"n" * length)
                model[offset : offset + length] = b"n" * length
            node.write_zeroes(200_001, 200_000)
            model[200_001:400_001] = bytes(200_000)
            take(node, "kept")
            node.write(0, b"later")
            revert(node, "kept")
            assert node.read(0, size) == model
            if compat == "1.1":
                node.truncate(3 << 20)
                model.extend(bytes(1 << 20))
                assert node.read(0, 3 << 20) == model
    finally:
        file.close()
    assert as_raw(path) == model
    assert_clean(path)


@pytest.mark.parametrize("name", ["fx-v2", "fx-v3", "fx-v3-zstd"])
def test_machine_state_that_qemu_saved_is_read_as_it_lies(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.qcow2"
    path.write_bytes(gzip.decompress((DATA / f"{name}.qcow2.gz").read_bytes()))
    with opened(path) as node:
        first = named(node, "one")
        state = node.snapshot_store.read_state(first, 0, 1 << 20)
        assert len(state) == first.state_size == 1107
        assert state[:8] == b"QEVM\0\0\0\3"
        assert node.snapshot_store.read_state(first, 1100, 100) == state[1100:]
        before = node.read(0, node.size)
        take(node, "ours", state * 3)
        revert(node, "one")
        delete(node, "two")
        assert node.snapshot_store.read_state(named(node, "ours"), 0, 1 << 20) == state * 3
        assert len(before) == node.size
    assert_clean(path)


@pytest.mark.usefixtures("every_qemu")
def test_snapshots_of_a_machine_with_extended_l2_entries_are_applied_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "fx.qcow2"
    path.write_bytes(gzip.decompress((DATA / "fx-v3-extl2.qcow2.gz").read_bytes()))
    with opened(path) as node:
        names = [each.name for each in node.snapshot_store.snapshots()]
    assert names
    for name in names:
        expected = as_raw(path, "-l", f"snapshot.name={name}")
        with opened(path) as node:
            state = node.snapshot_store.read_state(named(node, name), 0, 1 << 30)
            assert len(state) == named(node, name).state_size
            revert(node, name)
            assert node.read(0, node.size) == expected
            node.write(5000, b"written on" * 1000)
            take(node, f"again {name}", state)
            delete(node, name)
            assert node.snapshot_store.read_state(named(node, f"again {name}"), 0, 1 << 30) == state
        assert_clean(path)


@pytest.mark.parametrize(("method", "name"), [(1, "AES"), (2, "LUKS")])
def test_encryption_is_refused_by_name(method: int, name: str, tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    data = bytearray(path.read_bytes())
    data[35] = method
    path.write_bytes(data)
    with pytest.raises(Unsupported, match=f"{name} encryption"), opened(path, read_only=True):
        pass


def test_a_dirty_image_has_its_refcounts_rebuilt_when_it_is_opened_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "dirty.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M")
    # `abort` leaves the dirty bit set and the refcounts behind.
    import subprocess

    from peers import peer

    subprocess.run(
        [peer("qemu-io"), "-c", "write -P 5 0 1M", "-c", "flush", "-c", "abort", str(path)],
        capture_output=True,
    )
    assert checked(path).get("corruptions"), "the image is not dirty, so this shows nothing"
    with opened(path) as node:
        assert node.read(0, 1 << 20) == b"\5" * (1 << 20)
        node.write(2 << 20, b"x")
    assert_clean(path)


def test_a_corrupt_image_is_only_read_until_it_is_repaired(tmp_path: Path) -> None:
    from stillframe.block.qcow2.repair import repair
    from stillframe.errors import ImageCorrupt

    path = make(tmp_path / "image.qcow2", 1 << 20)
    data = bytearray(path.read_bytes())
    data[79] |= 2
    path.write_bytes(data)
    with pytest.raises(ImageCorrupt, match="qcow2: Image is corrupt; cannot be opened read/write"):
        with opened(path):
            pass
    with opened(path, read_only=True) as node:
        assert node.read(0, 10) == bytes(10)
    file = FileNode("file", str(path))
    assert repair(file, "leaks").corruptions == 0
    file.close()
    with opened(path) as node:
        node.write(0, b"again")


def test_dirty_bitmaps_hold_a_revert_back_and_are_no_longer_promised_after_writing(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    with opened(path) as node:
        take(node, "before")
    qemu_img("bitmap", "--add", path, "changes")
    with opened(path) as node:
        with pytest.raises(Unsupported, match=r"^Device has active dirty bitmaps$"):
            node.snapshot_store.prepare_revert(named(node, "before"))
        node.write(0, b"unrecorded")
    info = json.loads(qemu_img("info", "--output=json", path))
    assert not any(
        "in-use" not in each["flags"] for each in info["format-specific"]["data"].get("bitmaps", [])
    )


def test_check_counts_as_qemu_counts(tmp_path: Path) -> None:
    """On clean and damaged images: the same corruptions, leaks, fragments and ends."""
    path = make(tmp_path / "image.qcow2", 4 << 20, cluster_size=4096)
    with opened(path) as node:
        for offset, data in scattered(5):
            if offset + len(data) <= node.size:
                node.write(offset, data)
        take(node, "one", b"state" * 1000)
        node.write(0, b"x" * 100_000)
    clean = path.read_bytes()
    table = int.from_bytes(clean[48:56], "big")
    block = int.from_bytes(clean[table : table + 8], "big")
    l1 = int.from_bytes(clean[40:48], "big")
    l2 = int.from_bytes(clean[l1 : l1 + 8], "big") & 0xFFFFFFFFFFFE00
    damages = {
        "clean": [],
        "leak": [(block + 2 * 700, b"\0\1")],
        "too low": [(block + 2 * 6, b"\0\0")],
        "too high": [(block + 2 * 6, b"\0\7")],
        "copied lost": [(l2 + 8, bytes([clean[l2 + 8] ^ 0x80]))],
        "l1 reserved bits": [(l1 + 7, b"\1")],
        "l2 reserved bits": [(l2 + 7, b"\4")],
        "l2 unaligned": [(l2 + 6, b"\2")],
        "beyond the end": [(l2 + 3, b"\7")],
    }
    for name, changes in damages.items():
        data = bytearray(clean)
        for at, new in changes:
            data[at : at + len(new)] = new
        path.write_bytes(data)
        theirs = checked(path)
        file = FileNode("file", str(path), read_only=True)
        ours = check(file).as_qapi()
        file.close()
        assert ours == theirs, name
