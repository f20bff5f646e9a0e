"""Images whose tables claim what cannot be: the same bytes millions of times over, or more than any disk has.

Each would cost hours or hundreds of gigabytes if it were believed. The bound on time is that of every test.
"""

import struct
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from fuzzing.disks import SmallDisk, attempt, check_it, look_at, repair_it, use, write_to
from fuzzing.seeds import snapshot_entry
from qcow2.images import take
from qcow2.memory import MemoryNode
from qcow2.scenes import scene
from stillframe.block.node import ExtentKind
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.errors import ImageCorrupt, StillframeError

pytestmark = pytest.mark.timeout(120)

MEMORY = 256 << 20
COPIED = 1 << 63


@pytest.fixture(autouse=True)
def _bounded(request: pytest.FixtureRequest) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        is_wide = request.node.name == "test_one_bit_refcounts_in_the_largest_clusters"
        assert tracemalloc.get_traced_memory()[1] < (5 * MEMORY if is_wide else MEMORY)
    finally:
        tracemalloc.stop()


def empty(cluster_size: int = 65536, size: int = 1 << 20, refcount_bits: int = 16) -> bytearray:
    """An image without data."""
    file = MemoryNode()
    create_image(file, size, cluster_size=cluster_size, refcount_bits=refcount_bits)
    return file.data


def put(image: bytearray, at: int, form: str, *values: int) -> None:
    """Numbers into an image."""
    struct.pack_into(form, image, at, *values)


def append(image: bytearray, data: bytes, cluster_size: int = 65536) -> int:
    """Bytes behind an image, from a cluster's start on: their offset."""
    image.extend(bytes(-len(image) % cluster_size))
    at = len(image)
    image.extend(data)
    image.extend(bytes(-len(image) % cluster_size))
    return at


ALL: tuple[Callable[[bytes], None], ...] = (look_at, check_it, write_to, repair_it)


@pytest.mark.parametrize("where", ["past the end", "inside"])
@pytest.mark.parametrize("step", ALL)
def test_snapshots_that_all_claim_the_largest_l1(step: Callable[[bytes], None], where: str) -> None:
    """65,536 times 32 MiB is two tebibytes."""
    image = empty(512, 64 << 10)
    entries, offset = (1 << 22, 1 << 40) if where == "past the end" else (1 << 13, 512)
    table = append(image, snapshot_entry(offset, entries) * 16384, 512)
    put(image, 60, ">IQ", 16384, table)
    step(bytes(image))


@pytest.mark.parametrize("step", ALL)
def test_an_l1_that_names_one_table_a_hundred_thousand_times(step: Callable[[bytes], None]) -> None:
    image = empty(size=1 << 16)
    cluster = append(image, b"\x11" * 65536)
    table = append(image, struct.pack(">Q", cluster) * 8192)
    l1 = append(image, struct.pack(">Q", table) * (1 << 17))
    put(image, 36, ">IQ", 1 << 17, l1)
    put(image, 24, ">Q", (1 << 17) * (8192 * 65536))
    step(bytes(image))


@pytest.mark.parametrize("step", ALL)
def test_a_refcount_table_that_names_one_full_block_a_million_times(step: Callable[[bytes], None]) -> None:
    image = empty(1 << 16, 1 << 16)
    block = append(image, b"\0\1" * (1 << 15))
    table = append(image, struct.pack(">Q", block) * (1 << 20))
    put(image, 48, ">QI", table, 128)
    step(bytes(image))


@pytest.mark.parametrize("step", [check_it, repair_it])
def test_bitmaps_that_all_lie_in_one_place(step: Callable[[bytes], None]) -> None:
    image = empty(512, 64 << 10)
    table = append(image, struct.pack(">Q", 512) * (1 << 16), 512)
    entry = struct.pack(">QIIBBHI", table, 1 << 16, 0, 1, 16, 1, 0) + b"b".ljust(8, b"\0")
    directory = append(image, entry * 10_000, 512)
    put(image, 88, ">Q", 1)
    put(image, 112, ">IIIIQQ", 0x23852875, 24, 10_000, 0, len(entry) * 10_000, directory)
    step(bytes(image))


def test_one_bit_refcounts_in_the_largest_clusters() -> None:
    """A block of 2 MiB counts 16 million clusters; the table names sixty-four of them."""
    image = empty(2 << 20, 2 << 20, 1)
    table = int.from_bytes(image[48:56], "big")
    first = image[table : table + 8]
    put(image, table, ">64Q", *[int.from_bytes(first, "big")] * 64)
    use(bytes(image))


def test_an_empty_disk_of_exbibytes_is_one_extent() -> None:
    image = empty(2 << 20, 2 << 20)
    put(image, 24, ">Q", 1 << 61)
    put(image, 36, ">I", 1 << 22)
    node = Qcow2Node("node", SmallDisk(image, read_only=True), read_only=True)
    extents = list(node.extents(0, node.size))
    assert [(each.offset, each.length, each.kind) for each in extents] == [
        (0, 1 << 61, ExtentKind.UNALLOCATED)
    ]


def test_a_shrink_of_a_disk_that_shares_its_tables_with_itself_holds_no_list_of_everything() -> None:
    image = empty(size=1 << 16)
    cluster = append(image, b"\x11" * 65536)
    table = append(image, struct.pack(">Q", cluster) * 8192)
    l1 = append(image, bytes(8) + struct.pack(">Q", table) * 19_999)
    put(image, 36, ">IQ", 20_000, l1)
    put(image, 24, ">Q", 20_000 * (8192 * 65536))
    node = Qcow2Node("node", SmallDisk(image))
    attempt(lambda: node.truncate(512))
    attempt(node.close)


TABLES = {"active L1 table": 40, "refcount table": 48, "snapshot table": 64}


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("doing", ["write", "snapshot"])
def test_a_refcount_of_zero_hands_no_table_out(what: str, doing: str) -> None:
    """The image says that a table's cluster is free: it is marked corrupt, and every byte of the table stays."""
    start = scene(65536)
    image = bytearray(start.image)
    place = int.from_bytes(image[TABLES[what] : TABLES[what] + 8], "big")
    refcounts = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[refcounts : refcounts + 8], "big")
    # Everything before it is in use, so that it is the first that is found.
    for cluster in range(place >> 16):
        at = block + 2 * cluster
        if image[at : at + 2] == b"\0\0":
            put(image, at, ">H", 1)
    put(image, block + 2 * (place >> 16), ">H", 0)
    disk = MemoryNode(image)
    node = Qcow2Node("node", disk)
    words = rf"Preventing invalid write on metadata \(overlaps with {what}\)"
    steps = {
        "write": lambda: node.write(20 * 65536, b"x" * 3 * 65536),
        "snapshot": lambda: take(node, "new", b"state" * 50_000),
    }
    with pytest.raises(ImageCorrupt, match=words):
        steps[doing]()
    assert disk.data[place : place + 65536] == image[place : place + 65536]
    assert disk.data[79] & 2
    with pytest.raises(StillframeError):
        node.write(0, b"x")


@pytest.mark.parametrize("what", ["qcow2_header", *TABLES])
def test_tables_that_point_at_tables_are_never_written_as_tables(what: str) -> None:
    """An L1 entry whose table would be the header, the L1 itself, the refcount table or the snapshots."""
    start = scene(65536)
    image = bytearray(start.image)
    place = int.from_bytes(image[TABLES[what] : TABLES[what] + 8], "big") if what in TABLES else 0
    l1 = int.from_bytes(image[40:48], "big")
    put(image, l1, ">Q", COPIED | place)
    disk = MemoryNode(image)
    node = Qcow2Node("node", disk)
    if place:
        with pytest.raises(ImageCorrupt):
            node.write(7 * 65536, b"x" * 100)
        assert disk.data[place : place + 65536] == image[place : place + 65536]
    else:
        # An offset of zero means no table, flag or not.
        node.write(7 * 65536, b"x" * 100)
        assert disk.data[:72] == image[:72]


@pytest.mark.parametrize("state_size", [1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_state_of_any_size_is_read_as_far_as_it_was_asked_for(state_size: int) -> None:
    image = empty()
    table = append(image, snapshot_entry(0, 0, state_size))
    put(image, 60, ">IQ", 1, table)
    node = Qcow2Node("node", SmallDisk(image, read_only=True), read_only=True)
    (info,) = node.snapshot_store.snapshots()
    assert info.state_size == state_size
    assert node.snapshot_store.read_state(info, 0, 1000) == bytes(min(1000, state_size))
    assert node.snapshot_store.read_state(info, state_size - 1, 1000) == b"\0"
    assert node.snapshot_store.read_state(info, state_size + 5, 1000) == b""


@pytest.mark.parametrize("offset", [1, 0x10200, 1 << 56, (1 << 64) - 65536])
def test_a_snapshot_whose_l1_is_nowhere_can_be_listed_and_nothing_else(offset: int) -> None:
    image = empty()
    table = append(image, snapshot_entry(offset, 2, 100))
    put(image, 60, ">IQ", 1, table)
    node = Qcow2Node("node", SmallDisk(image))
    (info,) = node.snapshot_store.snapshots()
    for step in (
        lambda: node.snapshot_store.read_state(info, 0, 10),
        lambda: node.snapshot_store.prepare_revert(info),
        lambda: node.snapshot_store.prepare_delete(info),
    ):
        with pytest.raises(ImageCorrupt, match="Snapshot L1 table offset invalid"):
            step()


@pytest.mark.parametrize("length", [17, 0x7FFFFFFF, 0xFFFFFFF8, 0xFFFFFFFF])
def test_an_extension_longer_than_its_cluster_is_refused(length: int) -> None:
    image = empty(512, 64 << 10)
    put(image, 112, ">II", 0x12345678, 512 if length == 17 else length)
    with pytest.raises(ImageCorrupt, match="Header extension too large"):
        Qcow2Node("node", SmallDisk(image, read_only=True), read_only=True)
