"""Images with a past, from which crash and error tests start.

worn         two snapshots with machine state; clusters shared with both, with one and with none; zero clusters
compressed   the same, with compressed clusters
resized      the second snapshot is of a larger disk
plain        a disk without snapshots, for refcounts too narrow to share
leaky        a worn image whose user was killed: part of a lease has leaked
dirty        refcounts were put off (the dirty bit), and have to be rebuilt at the next open for writing
foreign      autoclear bits are set that are not known here
"""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from qcow2.images import take
from qcow2.memory import MemoryNode
from qcow2.worlds import Content
from stillframe.block.node import Node
from stillframe.block.qcow2 import Qcow2Node, create_image, refcounts
from stillframe.block.qcow2.layout import COMPRESSED, DIRTY, OFFSET_MASK
from stillframe.block.qcow2.mapping import l1_entry

DATA_FILE = "disk.data"
"""The name of a data file, as its image records it."""

STATE = bytes(range(256)) * 300


@dataclass(frozen=True)
class Options:
    """How an image is made.

    :param data_file: "" for none, "own" for one of the guest's data, "raw" for one that is the disk at any time.
    :param lease: bytes of the first lease, and the largest; 0 for 16 clusters, so that small images see many leases.
    """

    cluster_size: int = 65536
    refcount_bits: int = 16
    compat: str = "1.1"
    lease: int = 0
    data_file: str = ""
    extended_l2: bool = False

    def __str__(self) -> str:
        version = "v2" if self.compat == "0.10" else "v3"
        return (
            f"{self.cluster_size}-{self.refcount_bits}-{version}"
            + ("-lease" if self.lease else "")
            + (f"-{self.data_file}-data" if self.data_file else "")
            + ("-extended" if self.extended_l2 else "")
        )

    @property
    def disk_size(self) -> int:
        """Of the worn disk: not whole clusters, and small enough that all images together stay so."""
        clusters = {512: 100, 4096: 40}.get(self.cluster_size, 24)
        return clusters * self.cluster_size + 1024

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Images that are opened in the block lease as these options say."""
        before = refcounts.FIRST_LEASE_BYTES, refcounts.LARGEST_LEASE_BYTES
        refcounts.FIRST_LEASE_BYTES = refcounts.LARGEST_LEASE_BYTES = self.lease
        try:
            yield
        finally:
            refcounts.FIRST_LEASE_BYTES, refcounts.LARGEST_LEASE_BYTES = before


@dataclass(frozen=True)
class Scene:
    """An image's files, first that of its tables, and what it holds."""

    files: tuple[bytes, ...]
    content: Content

    @property
    def image(self) -> bytes:
        """The bytes of the first."""
        return self.files[0]


def open_image(files: Sequence[Node], *, read_only: bool = False) -> list[Qcow2Node]:
    """The node of an image over its files."""
    return [Qcow2Node("node", files[0], data=files[1] if len(files) > 1 else None, read_only=read_only)]


def content_of(node: Qcow2Node) -> Content:
    """Everything that an image holds; of snapshots the disks as well, by looking through their own tables."""
    store = node.snapshot_store
    found = {}
    for info in store.snapshots() if store is not None else ():
        entry = store._find(info)
        disk = bytearray(info.disk_size)
        l1 = node.image.file.read(entry.l1_offset, entry.l1_size * 8)
        node.image.read_tree(l1, 0, memoryview(disk))
        found[info.name] = (bytes(disk), store.read_state(info, 0, 1 << 30))
    return Content(node.read(0, node.size), found)


def _made(options: Options, work: Callable[[Qcow2Node], None]) -> Scene:
    files = [MemoryNode(), MemoryNode()] if options.data_file else [MemoryNode()]
    create_image(
        files[0],
        options.disk_size,
        cluster_size=options.cluster_size,
        refcount_bits=options.refcount_bits,
        compat=options.compat,  # type: ignore[arg-type]
        data=files[1] if options.data_file else None,
        data_file=DATA_FILE if options.data_file else None,
        data_file_raw=options.data_file == "raw",
        extended_l2=options.extended_l2,
    )
    return _lived(tuple(bytes(file.data) for file in files), options, work)


def _lived(
    before: tuple[bytes, ...], options: Options, work: Callable[[Qcow2Node], None], *, close: bool = True
) -> Scene:
    files = [MemoryNode(each) for each in before]
    with options.in_force():
        (node,) = open_image(files)
        work(node)
        node.flush()
        content = content_of(node)
        if close:
            node.close()
    return Scene(tuple(bytes(file.data) for file in files), content)


@cache
def worn(options: Options) -> Scene:
    return _made(options, _wear)


def _wear(node: Qcow2Node) -> None:
    cluster = node.image.cluster_size
    node.write(0, b"\x11" * (12 * cluster + 100))
    take(node, "first", STATE)
    node.write(3 * cluster - 10, b"\x22" * (4 * cluster))
    node.write_zeroes(8 * cluster, cluster)
    node.write(19 * cluster, b"\x33" * 700)
    take(node, "second", STATE[::-1])
    node.write(5 * cluster, b"\x44" * cluster)


@cache
def compressed(options: Options) -> Scene:
    def work(node: Qcow2Node) -> None:
        compress(node, 0, 4)
        _wear(node)
        compress(node, 14, 3)

    return _made(options, work)


def compress(node: Qcow2Node, first: int, count: int) -> None:
    """Put compressed clusters, of two halves each, where nothing is."""
    image, cluster = node.image, node.image.cluster_size
    offset_bits = 70 - image.header.cluster_bits
    for number in range(first, first + count):
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        halves = bytes([0x40 + number]) * (cluster // 2) + bytes([0x80 + number]) * (cluster // 2)
        data = packer.compress(halves) + packer.flush()
        l1_index, index = divmod(number, image.header.l2_entries)
        with image.gate.lock:
            table = image.own_table(l1_index)
            place = image.refcounts.allocate(1)[0] * cluster + 37
            sectors = (place + len(data) - 1) // 512 - place // 512
            image.file.write(place, data)
            image.mapping.store(table, index, [COMPRESSED | sectors << offset_bits | place])
    node.flush()


@cache
def resized(options: Options) -> Scene:
    def work(node: Qcow2Node) -> None:
        cluster = node.image.cluster_size
        node.write(0, b"\x11" * (6 * cluster + 100))
        take(node, "first", STATE)
        node.truncate(2 * options.disk_size - 1024)
        node.write(node.size - 2 * cluster - 700, b"\x21" * (2 * cluster))
        take(node, "second", STATE[::-1])
        node.truncate(options.disk_size)
        node.write(5 * cluster, b"\x44" * cluster)

    return _made(options, work)


@cache
def plain(options: Options) -> Scene:
    def work(node: Qcow2Node) -> None:
        cluster = node.image.cluster_size
        node.write(0, b"\x11" * (8 * cluster + 100))
        node.write_zeroes(5 * cluster, cluster)
        node.write(19 * cluster, b"\x33" * 700)

    return _made(options, work)


@cache
def leaky(options: Options) -> Scene:
    def work(node: Qcow2Node) -> None:
        node.write(15 * node.image.cluster_size, b"\x33")

    return _lived(worn(options).files, options, work, close=False)


@cache
def dirty(options: Options) -> Scene:
    """Refcounts of data that are too low, as another program's lazy ones are, and one that is too high."""
    start = worn(options)
    file = MemoryNode(start.image)
    image = Qcow2Node("node", file).image
    table = image.mapping.table(l1_entry(image.world.l1, 0) & OFFSET_MASK)
    width = image.header.refcount_bits // 8
    counts = image.refcounts.block_offset(0)
    for index in (1, 5):
        host = struct.unpack_from(">Q", table, index * 8)[0] & OFFSET_MASK
        file.write(counts + host // options.cluster_size * width, bytes(width))
    file.write(72, DIRTY.to_bytes(8, "big"))
    return Scene((bytes(file.data),), start.content)


@cache
def foreign(options: Options) -> Scene:
    start = worn(options)
    image = bytearray(start.image)
    image[88:96] = (int.from_bytes(image[88:96], "big") | 1 << 9 | 1 << 3).to_bytes(8, "big")
    return Scene((bytes(image), *start.files[1:]), start.content)


def scene(cluster_size: int) -> Scene:
    """The worn image of ordinary options."""
    return worn(Options(cluster_size))
