"""Every limit of the format is met with a refusal that names it, and an image that is as it was before."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from peers import peer
from qcow2.crafting import entry, list_snapshots, set_refcount
from qcow2.images import LONG, assert_clean, checked, delete, make, named, opened, qemu_img, revert, take
from stillframe.block.file import FileNode
from stillframe.block.node import Node, SnapshotRecord
from stillframe.block.qcow2 import refcounts, shadow
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.layout import COMPRESSED, OFFSET_MASK
from stillframe.block.qcow2.snapshot_table import MAX_TABLE_BYTES
from stillframe.errors import ImageCorrupt, InvalidRequest, LimitReached

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)] if LONG else [512, 2 << 20]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def said_by_qemu_img(*arguments: str | Path) -> str:
    """What it says when it refuses."""
    done = subprocess.run([peer("qemu-img"), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    return done.stderr


def filled(node: Node, why: str) -> int:
    """Write until it is refused for this reason: how much went in."""
    for at in range(0, node.size, 65536):
        try:
            node.write(at, b"y" * 65536)
        except LimitReached as error:
            if why not in error.message:
                raise
            return at
    raise AssertionError("nothing was refused")


# Refcounts.


@pytest.mark.parametrize(
    ("cluster_size", "bits", "most"),
    [(512, 1, 0), (65536, 1, 0), (512, 2, 2), (65536, 2, 2), (512, 4, 14), (65536, 4, 14), (512, 8, 254)],
)
def test_as_many_snapshots_share_a_cluster_as_its_refcount_can_count(
    cluster_size: int, bits: int, most: int, tmp_path: Path
) -> None:
    path = make(tmp_path / "image.qcow2", 4 * cluster_size, cluster_size=cluster_size, refcount_bits=bits)
    shared = b"shared" * (cluster_size // 6)
    with opened(path) as node:
        node.write(0, shared)
        for number in range(most):
            take(node, f"s{number}")
        for _ in range(2):
            with pytest.raises(LimitReached, match=f"more often than refcounts of {bits} bits can count"):
                take(node, "one too many")
        assert len(node.snapshot_store.snapshots()) == most
        assert node.read(0, len(shared)) == shared
        # The image goes on: written, reverted, tidied up.
        node.write(cluster_size, b"later")
        if most:
            revert(node, f"s{most - 1}")
            assert node.read(cluster_size, 5) == bytes(5)
            delete(node, "s0")
            take(node, "fits again")
    assert_clean(path)
    with opened(path) as node:
        assert node.read(0, len(shared)) == shared
        for each in list(node.snapshot_store.snapshots()):
            delete(node, each.name)
    assert_clean(path)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_wide_refcounts_end_without_an_overflow(bits: int, tmp_path: Path) -> None:
    """No real image counts so far; of 64 bits we count 2 to the 62nd."""
    path = make(tmp_path / "image.qcow2", 1 << 20, refcount_bits=bits)
    with opened(path) as node:
        node.write(0, b"x" * 70_000)
        (extent, *_) = node.extents(0, 65536)
    assert extent.host_offset is not None
    cluster = extent.host_offset >> 16
    most = min((1 << bits) - 1, 1 << 62)
    for full in (most, (1 << bits) - 1):
        set_refcount(path, cluster, full)
        with opened(path) as node:
            with pytest.raises(LimitReached, match=f"refcounts of {bits} bits"):
                take(node, "one too many")
            assert node.read(0, 70_000) == b"x" * 70_000
    set_refcount(path, cluster, most - 1)
    with opened(path) as node:
        take(node, "the last")
        with pytest.raises(LimitReached, match=f"refcounts of {bits} bits"):
            take(node, "one too many")
    found = checked(path)
    assert (found.get("corruptions", 0), found["leaks"]) == (0, 1)
    qemu_img("check", "-r", "leaks", path)
    with opened(path) as node:
        take(node, "room again")
    assert_clean(path)


def test_compressed_clusters_that_share_one_are_counted_each(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"".join(bytes([number]) * 4096 for number in range(1, 13)))
    path = tmp_path / "packed.qcow2"
    qemu_img(
        *("convert", "-c", "-f", "raw", "-O", "qcow2"), "-o", "cluster_size=4k,refcount_bits=4", raw, path
    )
    with opened(path) as node:
        with pytest.raises(LimitReached, match="refcounts of 4 bits"):
            take(node, "twice twelve")
        assert node.read(0, node.size) == raw.read_bytes()
        node.write(0, b"own!" * 6144)
        take(node, "fewer")
        assert node.read(24576, node.size - 24576) == raw.read_bytes()[24576:]
    assert_clean(path)


def test_a_full_refcount_table_refuses_and_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table ends after one cluster here, which counts 16 MiB; at its real end, 8 MiB, it counts 32 GiB or more."""
    for module in (refcounts, shadow):
        monkeypatch.setattr(module, "MAX_REFCOUNT_TABLE_BYTES", 1024)
    path = make(tmp_path / "image.qcow2", 32 << 20, cluster_size=1024, refcount_bits=64)
    full = "refcount table of the image has reached its largest size of 8 MiB"
    with opened(path) as node:
        node.write(0, b"older" * 10_000)
        take(node, "older", b"state" * 1000)
        written = filled(node, full)
        assert 14 << 20 < written < 16 << 20
        for _ in range(2):
            with pytest.raises(LimitReached, match=full):
                take(node, "no room", bytes(1 << 20))
        assert node.read(0, written) == b"y" * written
        assert node.snapshot_store.read_state(named(node, "older"), 0, 9999) == b"state" * 1000
        node.discard(0, node.size)
        node.flush()
        node.write(0, b"z" * (8 << 20))
        revert(node, "older")
        assert node.read(0, 50_000) == b"older" * 10_000
        take(node, "again")
    assert_clean(path)


def test_no_host_offset_is_given_out_beyond_the_formats_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refcounts, "MAX_OFFSET", 1 << 20)
    path = make(tmp_path / "image.qcow2", 4 << 20, cluster_size=512, refcount_bits=64)
    with opened(path) as node:
        written = filled(node, "largest size that qcow2 allows")
        with pytest.raises(LimitReached):
            take(node, "no room", bytes(1 << 20))
        assert written > 1 << 19
        assert node.read(0, written) == b"y" * written
        node.discard(0, 65536)
        node.flush()
        node.write(2 << 20, b"z" * 10_000)
    assert path.stat().st_size <= 1 << 20
    assert_clean(path)


def test_compressed_data_beyond_the_formats_end_is_followed_by_nobody(tmp_path: Path) -> None:
    """With clusters of 512 bytes an entry has room for 61 bits of offset."""
    path = make(tmp_path / "image.qcow2", 1 << 20, cluster_size=512)
    with opened(path) as node:
        node.write(0, b"x" * 5000)
        l2 = int.from_bytes(node.image.world.l1[:8], "big") & OFFSET_MASK
        node.flush()
    with path.open("r+b") as file:
        file.seek(l2)
        file.write((COMPRESSED | 1 << 60).to_bytes(8, "big"))
    with opened(path) as node:
        with pytest.raises(ImageCorrupt, match="lies outside the image file"):
            node.read(0, 10)
        with pytest.raises(ImageCorrupt, match="beyond the format's end"):
            take(node, "impossible")
        for attempt in (lambda: node.write(0, b"y" * 512), lambda: node.discard(0, 512)):
            with pytest.raises(ImageCorrupt, match="beyond the format's end"):
                attempt()
        assert node.read(512, 4488) == b"x" * 4488
    with opened(path, read_only=True) as node:
        assert not node.snapshot_store.snapshots()
        assert node.read(512, 4488) == b"x" * 4488
    found, theirs = check(FileNode("file", str(path), read_only=True)).as_qapi(), checked(path)
    assert (found["corruptions"], found["leaks"]) == (theirs["corruptions"], theirs["leaks"])


# Sizes.


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_the_largest_disk_of_each_cluster_size_is_qemus(cluster_size: int, tmp_path: Path) -> None:
    largest = (32 << 20) // 8 * (cluster_size // 8) * cluster_size
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    make(ours, largest, cluster_size=cluster_size)
    qemu_img("create", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", theirs, str(largest))
    with pytest.raises(InvalidRequest, match="too large for this cluster size"):
        make(tmp_path / "more.qcow2", largest + 512, cluster_size=cluster_size)
    said = said_by_qemu_img(
        *("create", "-f", "qcow2", "-o", f"cluster_size={cluster_size}"), theirs, str(largest + 512)
    )
    assert "image size is too large" in said
    with opened(ours) as node:
        node.write(largest - 700, b"end" * 100)
        before = node.image.world
        with pytest.raises(LimitReached, match="too large for this cluster size"):
            node.truncate(largest + 512)
        pending = node.snapshot_store.freeze()
        with pytest.raises(LimitReached, match=r"does not fit into the image's L1 table"):
            pending.write_state(0, b"state")
        pending.abandon()
        assert node.image.world == before
        take(node, "without state")
        assert node.read(largest - 700, 700) == (b"end" * 100).ljust(700, b"\0")
    ours_shown = json.loads(qemu_img("info", "--output=json", ours))
    assert (ours_shown["virtual-size"], len(ours_shown["snapshots"])) == (largest, 1)
    assert (
        "end"
        in subprocess.run(
            [peer("qemu-io"), "-r", "-c", f"read -v {largest - 700} 300", str(ours)],
            capture_output=True,
            text=True,
        ).stdout
    )


def test_state_is_refused_where_the_l1_table_ends(tmp_path: Path) -> None:
    """32 KiB of disk, or of state, for each entry of 8 bytes."""
    span = 512 * 64
    path = make(tmp_path / "image.qcow2", ((32 << 20) // 8 - 2) * span, cluster_size=512)
    with opened(path) as node:
        pending = node.snapshot_store.freeze()
        pending.write_state(0, b"s" * 2 * span)
        with pytest.raises(LimitReached, match=f"Machine state of {2 * span + 1} bytes does not fit"):
            pending.write_state(2 * span, b"s")
        pending.abandon()
        take(node, "exactly", b"s" * 2 * span)
        assert node.snapshot_store.read_state(named(node, "exactly"), 0, 1 << 20) == b"s" * 2 * span
    assert_clean(path)


@pytest.mark.usefixtures("every_qemu")
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_state_of_more_than_4_gib_keeps_its_size(compat: str, tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20, cluster_size=2 << 20, compat=compat)
    size = (5 << 30) + 3
    with opened(path) as node:
        pending = node.snapshot_store.freeze()
        pending.write_state(0, b"begin")
        pending.write_state(size - 3, b"end")
        change = pending.prepare(SnapshotRecord("large", 1, 2))
        change.commit()
        change.finish()
    assert_clean(path)
    (shown,) = json.loads(qemu_img("info", "--output=json", path))["snapshots"]
    assert shown["vm-state-size"] == size
    qemu_img("snapshot", "-c", "another", path)
    with opened(path) as node:
        found = named(node, "large")
        assert found.state_size == size
        assert node.snapshot_store.read_state(found, 0, 5) == b"begin"
        assert node.snapshot_store.read_state(found, size - 4, 100) == b"\0end"
        delete(node, "large")
    assert_clean(path)


def test_old_entries_hold_their_size_in_32_bits(tmp_path: Path) -> None:
    """Entries without extra data, as QEMU wrote them before 1.1: up to 4 GiB less one, and the disk's present size."""
    path = make(tmp_path / "image.qcow2", 1 << 20, compat="0.10")
    size = (1 << 32) - 1
    list_snapshots(path, [entry(1, b"old", extra=b"", state_size_32=size)])
    with opened(path) as node:
        found = named(node, "old")
        assert (found.state_size, found.disk_size, found.icount) == (size, 1 << 20, None)
        assert node.snapshot_store.read_state(found, size - 2, 100) == bytes(2)
        take(node, "new")
    assert [
        each["vm-state-size"] for each in json.loads(qemu_img("info", "--output=json", path))["snapshots"]
    ] == [
        size,
        0,
    ]
    with opened(path) as node:
        assert named(node, "old").state_size == size
    assert_clean(path)


# The snapshot table.


def test_an_image_holds_65536_snapshots_and_no_more(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 512)
    list_snapshots(path, [entry(number, b"s%d" % number) for number in range(1, 65536)])
    with opened(path) as node:
        node.write(0, b"content")
        take(node, "the last")
        assert named(node, "the last").id == "65536"
    before = digest(path)
    with opened(path) as node:
        for _ in range(2):
            with pytest.raises(LimitReached, match="An image holds at most 65536 snapshots"):
                take(node, "one too many")
        assert len(node.snapshot_store.snapshots()) == 65536
    assert digest(path) == before
    assert "File too large" in said_by_qemu_img("snapshot", "-c", "one too many", path)
    if LONG:
        # A quarter of a minute, most of it for looking each name up in all others.
        assert_clean(path)
    with opened(path) as node:
        delete(node, "s3")
        take(node, "instead")
        assert named(node, "instead").id == "65537"
        revert(node, "the last")
        assert node.read(0, 7) == b"content"
    with path.open("r+b") as file:
        file.seek(60)
        file.write((65537).to_bytes(4, "big"))
    with pytest.raises(ImageCorrupt, match=r"^Snapshot table too large$"), opened(path, read_only=True):
        pass
    assert "Snapshot table too large" in said_by_qemu_img("info", path)


def test_a_snapshot_table_of_64_mib_is_the_largest(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 512, cluster_size=2 << 20)
    one = 40 + 24 + 4
    large = [entry(1000 + number, bytes(65536 - one)) for number in range(1023)]
    left = MAX_TABLE_BYTES - 1023 * 65536 - 65536
    assert left == 0
    # Room for an entry with a name of exactly 200 bytes, after one that fills what is left.
    filler = entry(3000, bytes(65536 - one - (one + 200 + 4)))
    list_snapshots(path, [*large, filler])
    with opened(path) as node:
        with pytest.raises(LimitReached, match=r"^Snapshot table is too big$"):
            take(node, "n" * 205)
        take(node, "n" * 200)
        assert node.image.world.snapshot_table_length <= MAX_TABLE_BYTES
        with pytest.raises(LimitReached, match=r"^Snapshot table is too big$"):
            take(node, "x")
        assert len(node.snapshot_store.snapshots()) == 1025
    assert len(json.loads(qemu_img("info", "--output=json", path))["snapshots"]) == 1025
    with opened(path) as node:
        delete(node, "n" * 200)
    assert_clean(path)


# Names and ids.


@pytest.mark.usefixtures("every_qemu")
def test_names_have_255_bytes_and_longer_ones_of_others_are_kept(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    long, longest = "ä" * 150, b"n" * 65535
    list_snapshots(path, [entry(1, long.encode()), entry(2, longest), entry(3, b"\xff\xfe"), entry(4, b"")])
    with opened(path) as node:
        for name in ("x" * 256, "ä" * 128, "\U0001f4f7" * 64):
            with pytest.raises(InvalidRequest, match=r"^The snapshot name has 256 bytes, 255 are allowed$"):
                take(node, name)
        take(node, "x" * 255)
        names = [each.name for each in node.snapshot_store.snapshots()]
        assert names == [long, longest.decode(), "\udcff\udcfe", "", "x" * 255]
        delete(node, "\udcff\udcfe")
        delete(node, "")
        revert(node, long)
    assert_clean(path)
    shown = json.loads(qemu_img("info", "--output=json", path))["snapshots"]
    # It shows the first 255 bytes.
    assert [each["name"][:100] for each in shown] == [long[:100], longest.decode()[:100], "x" * 100]


@pytest.mark.parametrize(
    "ids",
    [
        ["abc", "", "-7", "+9", "12x"],
        ["18446744073709551615"],
        ["9999999999999999999", "10000000000000000000"],
        ["18446744073709551614"],
        ["7", "007", "0000000000000000000000000000000000009"],
        ["9" * 300, "1", "2"],
    ],
)
def test_a_new_id_is_a_number_that_no_other_snapshot_has(ids: list[str], tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    list_snapshots(path, [entry(0, f"n{at}".encode(), id=text.encode()) for at, text in enumerate(ids)])
    with opened(path) as node:
        for number in range(3):
            take(node, f"new {number}", b"state %d" % number)
        found = [each.id for each in node.snapshot_store.snapshots()]
        assert found[: len(ids)] == ids
        assert len(set(found)) == len(found)
        assert all(each.isdecimal() and int(each) < 1 << 64 for each in found[len(ids) :])
        for number in range(3):
            info = named(node, f"new {number}")
            assert node.snapshot_store.read_state(info, 0, 100) == b"state %d" % number
    assert_clean(path)
