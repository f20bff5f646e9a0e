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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from qcow2.images import take
from qcow2.memory import MemoryNode
from qcow2.worlds import Content
from stillframe.block.qcow2 import Qcow2Node, create_image, refcounts
from stillframe.block.qcow2.layout import COMPRESSED, DIRTY, OFFSET_MASK
from stillframe.block.qcow2.mapping import l1_entry

STATE = bytes(range(256)) * 300


@dataclass(frozen=True)
class Options:
    """How an image is made.

    :param lease: bytes of the first lease, and the largest; 0 for 16 clusters, so that small images see many leases.
    """

    cluster_size: int = 65536
    refcount_bits: int = 16
    compat: str = "1.1"
    lease: int = 0

    def __str__(self) -> str:
        version = "v2" if self.compat == "0.10" else "v3"
        return f"{self.cluster_size}-{self.refcount_bits}-{version}" + ("-lease" if self.lease else "")

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
    """An image's bytes, and what it holds."""

    image: bytes
    content: Content


def content_of(node: Qcow2Node) -> Content:
    """Everything that an image holds; of snapshots the disks as well, by looking through their own tables."""
    store = node.snapshot_store
    found = {}
    for info in store.snapshots():
        entry = store._find(info)
        disk = bytearray(info.disk_size)
        l1 = node.image.file.read(entry.l1_offset, entry.l1_size * 8)
        node.image.read_tree(l1, 0, memoryview(disk))
        found[info.name] = (bytes(disk), store.read_state(info, 0, 1 << 30))
    return Content(node.read(0, node.size), found)


def _made(options: Options, work: Callable[[Qcow2Node], None], *, close: bool = True) -> Scene:
    file = MemoryNode()
    create_image(
        file,
        options.disk_size,
        cluster_size=options.cluster_size,
        refcount_bits=options.refcount_bits,
        compat=options.compat,  # type: ignore[arg-type]
    )
    return _lived(bytes(file.data), options, work, close=close)


def _lived(image: bytes, options: Options, work: Callable[[Qcow2Node], None], *, close: bool = True) -> Scene:
    file = MemoryNode(image)
    with options.in_force():
        node = Qcow2Node("node", file)
        work(node)
        node.flush()
        content = content_of(node)
        if close:
            node.close()
    return Scene(bytes(file.data), content)


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

    return _lived(worn(options).image, options, work, close=False)


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
    return Scene(bytes(file.data), start.content)


@cache
def foreign(options: Options) -> Scene:
    start = worn(options)
    image = bytearray(start.image)
    image[88:96] = (1 << 9 | 1 << 3).to_bytes(8, "big")
    return Scene(bytes(image), start.content)


def scene(cluster_size: int) -> Scene:
    """The worn image of ordinary options."""
    return worn(Options(cluster_size))
