"""The disk made larger or smaller, snapshots or not."""

from dataclasses import replace

from stillframe.block.qcow2.changes import switch_now
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK
from stillframe.block.qcow2.mapping import DATA, l1_entry
from stillframe.block.qcow2.writing import flush_if_due, unmap, write
from stillframe.errors import InUse, InvalidRequest, LimitReached, Unsupported

_ZEROES = bytes(1 << 20)


def truncate(image: Image, size: int) -> None:
    """Set the disk's size, durably. New bytes read as zeroes; what is cut off is gone, from snapshots it is not.

    The caller holds requests back.

    :raise InvalidRequest: not a multiple of 512. :raise LimitReached: larger than the format allows.
    :raise Unsupported: a version 2 image with snapshots, or one with a snapshot that does not record its disk's size.
    :raise InUse: a snapshot is pending.
    """
    with image.gate.lock:
        image.shows = None
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
                remedy="Run `stillframe image check --repair all` on the image, which records the present size.",
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
    if old.has_data_file:
        # A file or device that is longer than the disk was may hold anything there.
        image.data.write_zeroes(old.size, size - old.size, unmap=True)
        image.data.grow(size)
        if image.is_data_file_raw:
            image.data.shrink(size)
    else:
        _clear_tail(image, old.size)
    if image.backing is not None:
        _hide_backing(image, old.size, min(size, image.backing.size))
    image.flush()
    image.switch_world(replace(image.world, header=replace(image.header, size=size)))


def _shrink(image: Image, size: int) -> None:
    image.flush()
    image.switch_world(replace(image.world, header=replace(image.header, size=size)))
    _cut_tree(image, size)
    if image.header.has_data_file:
        image.data.shrink(size)


def _cut_tree(image: Image, size: int) -> None:
    """Take everything behind `size` out of the active tree, a state area that a load by QEMU left there too."""
    header = image.header
    first = header.clusters_for(size)
    keep = header.l1_entries_for(size)
    unmap(image, first * header.cluster_size, keep * header.l2_span, keep_place=False, reads_zero=False)
    with image.gate.mapping(first, (1 << 63) - 1):
        for index in range(keep, header.l1_size):
            with image.gate.lock:
                is_cut = _cut_table(image, index)
            if is_cut:
                flush_if_due(image)


def _cut_table(image: Image, index: int) -> bool:
    """Take an L2 table as a whole out of the active tree; whether there was one. Lock held."""
    offset = l1_entry(image.world.l1, index) & OFFSET_MASK
    if not offset:
        return False
    image.refuse_foreign_table(offset)
    entries = image.mapping.entries(offset, 0, image.header.l2_entries)
    image.set_l1_entry(index, 0)
    dropped = [offset >> image.header.cluster_bits]
    for entry in entries:
        if entry:
            dropped += image.l2.counted(entry)
    image.drop(dropped)
    return True


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
    if image.header.version >= 3:
        unmap(image, start, -(-end // size) * size, keep_place=False, reads_zero=True)
        return
    for at in range(start, end, len(_ZEROES)):
        write(image, at, memoryview(_ZEROES)[: end - at])
