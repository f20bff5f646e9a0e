"""The disk made larger or smaller, snapshots or not."""

import struct
from dataclasses import replace

from stillframe.block.qcow2.changes import switch_now
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK
from stillframe.block.qcow2.mapping import DATA, host_clusters
from stillframe.block.qcow2.writing import unmap, write
from stillframe.errors import InUse, InvalidRequest, LimitReached, Unsupported

_ZEROES = bytes(1 << 20)


def truncate(image: Image, size: int) -> None:
    """Set the disk's size, durably. New bytes read as zeroes; what is cut off is gone, from snapshots it is not.

    The caller holds requests back.

    :raise InvalidRequest: not a multiple of 512. :raise LimitReached: larger than the format allows.
    :raise Unsupported: a version 2 image with snapshots, or one with a snapshot that does not record its disk's size.
    :raise InUse: a snapshot is pending.
    """
    image.refuse_if_broken()
    old = image.header
    if size < 0 or size % 512:
        raise InvalidRequest("The new size must be a multiple of 512")
    if size == old.size:
        return
    if old.l1_entries_for(size) * 8 > MAX_L1_BYTES:
        raise LimitReached("Image size is too large for this cluster size")
    if image.world.snapshots:
        if old.version < 3:
            raise Unsupported("Can't resize a v2 image which has snapshots")
        if not all(entry.is_complete for entry in image.world.snapshots):
            raise Unsupported(
                "Can't resize an image with a snapshot that does not record its size",
                remedy="Run `qemu-img check -r all` on the image.",
            )
    if image.has_bitmaps:
        raise Unsupported("Can't resize an image with persistent bitmaps", remedy="Remove the bitmaps first.")
    with image.gate.drained():
        if image.pending is not None or image.gate.is_switching:
            raise InUse("A snapshot of the image is pending: commit or abandon it first")
    if size > old.size:
        _grow(image, size)
    else:
        _shrink(image, size)
    image.flush()


def _grow(image: Image, size: int) -> None:
    old = image.header
    _cut_tree(image, old.size)
    if old.l1_entries_for(size) > old.l1_size:
        l1 = bytearray(image.world.l1).ljust(old.l1_entries_for(size) * 8, b"\0")
        switch_now(image, lambda shadow: shadow.world(l1=l1, snapshots=None))
    _clear_tail(image, old.size)
    if image.backing is not None:
        _hide_backing(image, old.size, min(size, image.backing.size))
    image.flush()
    image.switch_world(replace(image.world, header=replace(image.header, size=size)))


def _shrink(image: Image, size: int) -> None:
    image.flush()
    image.switch_world(replace(image.world, header=replace(image.header, size=size)))
    _cut_tree(image, size)


def _cut_tree(image: Image, size: int) -> None:
    """Take everything behind `size` out of the active tree, a state area that a load by QEMU left there too."""
    header = image.header
    first = header.clusters_for(size)
    keep = header.l1_entries_for(size)
    if first < keep * header.l2_entries:
        unmap(image, first, keep * header.l2_entries - 1, keep_place=False, reads_zero=False)
    with image.gate.mapping(first, (1 << 63) - 1), image.gate.lock:
        for index in range(keep, image.header.l1_size):
            offset: int = struct.unpack_from(">Q", image.world.l1, index * 8)[0] & OFFSET_MASK
            if not offset:
                continue
            entries = image.mapping.entries(offset, 0, header.l2_entries)
            image.set_l1_entry(index, 0)
            dropped = [offset >> header.cluster_bits]
            for entry in entries:
                dropped += host_clusters(entry, header.cluster_bits)
            image.drop(dropped)


def _clear_tail(image: Image, size: int) -> None:
    """What the last cluster holds behind the disk's end was never the guest's: it becomes zeroes."""
    tail = -size % image.cluster_size
    if not tail:
        return
    with image.gate.lock:
        runs = image.mapping.runs(image.world.l1, size, tail)
    if any(kind >= DATA for kind, _, _ in runs):
        for at in range(size, size + tail, len(_ZEROES)):
            write(image, at, memoryview(_ZEROES)[: size + tail - at])


def _hide_backing(image: Image, start: int, end: int) -> None:
    """New bytes are zeroes even where the node below is longer than the disk was."""
    size = image.cluster_size
    if start % size and start < end:
        stop = min(end, -(-start // size) * size)
        write(image, start, memoryview(bytes(stop - start)))
        start = stop
    if start >= end:
        return
    first, last = start // size, (end - 1) // size
    if image.header.version >= 3:
        unmap(image, first, last, keep_place=False, reads_zero=True)
        return
    for at in range(start, end, len(_ZEROES)):
        write(image, at, memoryview(_ZEROES)[: end - at])
