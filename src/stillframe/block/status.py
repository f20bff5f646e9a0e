"""What a range of a disk is, seen through the whole chain of images: as `qemu-img map`, `compare` and `convert` look at it.

A driver's own extents say where a byte would come from. Here a cluster that is allocated and was never written, as
`preallocation=metadata` leaves them, is seen for the hole in the file that it is: otherwise a disk that holds
nothing would be read and compared to its end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from stillframe.block.node import Extent, ExtentKind, Node

_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Status:
    """A run of bytes that are alike; the names are those of QEMU's MapEntry.

    :param offset: of the run on the disk, in bytes. :param length: bytes.
    :param depth: which image of the chain it comes from, 0 for the top one.
    :param present: that image has it; else the chain ends there, or is shorter than the disk.
    :param zero: known to read as zeroes. :param data: there are bytes in the image file for it.
    :param host_offset: where in that image's file, if it lies there as it is.
    """

    offset: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    host_offset: int | None

    @property
    def end(self) -> int:
        """The byte behind the run."""
        return self.offset + self.length


def chain(node: Node) -> tuple[Node, ...]:
    """The node and what lies below it, by depth."""
    found = [node]
    while (below := found[-1].children.get("backing")) is not None:
        found.append(below)
    return tuple(found)


def data_file(node: Node) -> Node:
    """The child that guest data lies in; a node without children is its own."""
    return node.children.get("data-file") or node.children.get("file") or node


def statuses(node: Node, offset: int, length: int) -> Iterator[Status]:
    """A range of the disk as maximal runs, in order, covering it exactly."""
    layers = chain(node)
    holes = {depth for depth, layer in enumerate(layers) if _has_unwritten_clusters(layer)}
    held: Status | None = None
    for extent in node.extents(offset, length):
        for status in _statuses(extent, data_file(layers[extent.depth]) if extent.depth in holes else None):
            if held is not None and _follows(held, status):
                held = replace(held, length=held.length + status.length)
                continue
            if held is not None:
                yield held
            held = status
    if held is not None:
        yield held


def mapped(node: Node, offset: int = 0, length: int | None = None) -> Iterator[Status]:
    """`statuses` as `qemu-img map` shows them: the disk ends with a whole sector, and nothing is one run of no bytes.

    :param length: None for all that follows.
    """
    end = node.size if length is None else min(node.size, offset + length)
    shown_end = -(-end // _SECTOR) * _SECTOR if end == node.size else end
    if offset >= shown_end:
        yield Status(offset, 0, 0, present=False, zero=False, data=False, compressed=False, host_offset=None)
        return
    held: Status | None = None
    for status in statuses(node, offset, end - offset) if offset < end else ():
        if held is not None:
            yield held
        held = status
    if end == shown_end and held is not None:
        yield held
        return
    host = end if held is None else None if held.host_offset is None else held.host_offset + held.length
    rest = Status(
        max(offset, end),
        shown_end - max(offset, end),
        0,
        present=True,
        zero=True,
        data=False,
        compressed=False,
        host_offset=host,
    )
    if held is not None and _follows(held, rest):
        yield replace(held, length=held.length + rest.length)
        return
    if held is not None:
        yield held
    yield rest


def _statuses(extent: Extent, file: Node | None) -> Iterator[Status]:
    """:param file: where to look for holes under allocated clusters; None for not to."""
    is_data = extent.kind is ExtentKind.DATA
    status = Status(
        extent.offset,
        extent.length,
        extent.depth,
        present=extent.kind is not ExtentKind.UNALLOCATED,
        zero=not is_data,
        data=is_data,
        compressed=extent.compressed,
        host_offset=extent.host_offset,
    )
    host = extent.host_offset
    if file is None or host is None or not is_data:
        yield status
        return
    there = max(0, min(extent.length, file.size - host))
    for below in file.extents(host, there) if there else ():
        yield replace(
            status,
            offset=extent.offset + below.offset - host,
            length=below.length,
            host_offset=below.offset,
            zero=below.kind is not ExtentKind.DATA,
        )
    if there < extent.length:
        yield replace(
            status,
            offset=extent.offset + there,
            length=extent.length - there,
            host_offset=host + there,
            zero=True,
        )


def _follows(first: Status, second: Status) -> bool:
    if (
        first.depth != second.depth
        or first.present != second.present
        or first.zero != second.zero
        or first.data != second.data
        or first.compressed != second.compressed
    ):
        return False
    if first.host_offset is None or second.host_offset is None:
        return first.host_offset is second.host_offset
    return second.host_offset == first.host_offset + first.length


def _has_unwritten_clusters(layer: Node) -> bool:
    if layer.driver != "qcow2":
        return False
    from stillframe.block.qcow2.preallocation import has_unwritten_clusters

    return has_unwritten_clusters(layer)
