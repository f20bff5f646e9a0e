"""Clusters that are allocated before anything is written to them."""

from typing import Literal

import numpy as np

from stillframe.block.file import FileNode
from stillframe.block.node import Node
from stillframe.block.qcow2.image_file import ImageFile
from stillframe.block.qcow2.layout import COPIED, Header
from stillframe.block.qcow2.node import Qcow2Node

_TABLES_AT_ONCE = 4 << 20
_ZEROES = bytes(1 << 20)
_EVERY_SUBCLUSTER = (1 << 32) - 1


def has_unwritten_clusters(node: Node) -> bool:
    """Whether the file is so sparse that clusters in use must be holes in it.

    By QEMU's measure: a ninth more clusters in use, and at least two more, than the file takes space for. No table says so,
    and to ask the file system about each cluster would cost ordinary images much.
    """
    if not isinstance(node, Qcow2Node):
        return False
    image = node.image
    taken = node.info().actual_size
    if taken is None or image.header.has_data_file:
        return False
    written = taken // image.cluster_size
    threshold = max(written * 10 // 9, written + 2)
    if image.file.size // image.cluster_size < threshold:
        return False
    counted = 0
    with image.gate.lock:
        for index in np.flatnonzero(np.frombuffer(image.world.refcount_table, ">u8")).tolist():
            block = image.refcounts.block(index)
            counted += 0 if block is None else int(np.count_nonzero(block))
            if counted >= threshold:
                return True
    return False


def write_mapped_tables(file: ImageFile, header: Header, first_table: int, first_data: int) -> None:
    """Fill the L1 table of a new image and write its L2 tables, so that every cluster of the disk has its place, in order.

    The clusters are counted already. With extended L2 entries no subcluster is said to hold data, so that what lies below
    is seen; but for a raw data file, which is the disk whatever the tables say.

    :param first_table: the cluster of the first L2 table; they lie in a row. :param first_data: that of the disk's first.
    """
    size, words = header.cluster_size, header.l2_entry_words
    clusters = header.clusters_for(header.size)
    tables = np.arange(first_table, first_table + header.l1_size, dtype=np.uint64) * np.uint64(size)
    file.write(header.l1_offset, (tables | np.uint64(COPIED)).astype(">u8").tobytes())
    step = max(1, _TABLES_AT_ONCE // size)
    for table in range(0, header.l1_size, step):
        first = table * header.l2_entries
        count = min(step, header.l1_size - table)
        entries = np.zeros((count * header.l2_entries, words), ">u8")
        there = min(len(entries), clusters - first)
        places = np.arange(first_data + first, first_data + first + there, dtype=np.uint64) * np.uint64(size)
        entries[:there, 0] = places | np.uint64(COPIED)
        if words > 1 and header.is_data_file_raw:
            entries[:there, 1] = _EVERY_SUBCLUSTER
        file.write((first_table + table) * size, entries.tobytes())


def take_space(
    node: Node, offset: int, length: int, how: Literal["off", "metadata", "falloc", "full"]
) -> None:
    """Take space of the storage for clusters of a new image: "falloc" reserves it, "full" writes zeroes.

    :raise NoSpace: there is not so much.
    """
    if how == "falloc" and isinstance(node, FileNode):
        node.reserve(offset, length)
    elif how in ("falloc", "full"):
        for at in range(offset, offset + length, len(_ZEROES)):
            node.write(at, memoryview(_ZEROES)[: offset + length - at])
