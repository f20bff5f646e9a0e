"""The driver `qcow2`: a node over an image file, and optionally over a backing node."""

from collections.abc import Iterator, Mapping

from stillframe.block.node import Extent, ExtentKind, ImageInfo, Node, SnapshotInfo
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.layout import (
    CORRUPT,
    DIRTY,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    LAZY_REFCOUNTS,
    RECORD_NUMBER_SHIFT,
)
from stillframe.block.qcow2.mapping import DATA, PACKED, ZEROES, empty_entries
from stillframe.block.qcow2.snapshots import Snapshots
from stillframe.block.qcow2.unfinished import refuse_if_withheld
from stillframe.errors import InvalidRequest, Refused

_ZEROES = bytes(1 << 20)
_LOOKED_UP_AT_ONCE = 64 << 20


class Qcow2Node(Node):
    """An open qcow2 image. Any number of threads may use it.

    :param file: the child that holds the image; writable unless `read_only`. Whoever opened it closes it, after this.
    :param backing: what unallocated clusters show; None for zeroes, whatever name the image records.
    :param data: the child that holds guest data, where the header says that there is one; else None.
    :param tables_alone: read-only, to be described: guest data that has a file of its own needs none, and cannot be read.
    :param discard: False ignores `discard`, and keeps the place of what `write_zeroes` may unmap.
    :raise InvalidRequest: not a qcow2 image, or the header and `data` disagree.
    :raise Unsupported: a feature that is not done, by name.
    :raise ImageCorrupt: its tables are out of bounds, or it is marked corrupt and to be written.
    """

    driver = "qcow2"

    def __init__(
        self,
        node_name: str,
        file: Node,
        *,
        backing: Node | None = None,
        data: Node | None = None,
        read_only: bool = False,
        discard: bool = True,
        tables_alone: bool = False,
    ) -> None:
        super().__init__(node_name, read_only=read_only)
        self._file = file
        self._backing = backing
        self._data = data
        self._discard = discard
        self._image = Image(file, backing, data=data, read_only=read_only)
        if not tables_alone:
            self._image.reader.refuse_without_data()
        self._snapshots = Snapshots(self._image)
        self._is_closed = False

    @property
    def image(self) -> Image:
        """The open image, for `check` and `repair`."""
        return self._image

    @property
    def size(self) -> int:
        return self._image.header.size

    def hides_writes(self, *, seconds: float = 0.0) -> bool:
        """Whether a killed process has left writes that this read-only node does not show: the next open for writing brings
        them into the file.

        :param seconds: how long to wait for what is left of that process.
        """
        number = self._image.header.autoclear >> RECORD_NUMBER_SHIFT
        if not self.read_only or self._image.header.version < 3 or not number:
            return False
        from stillframe.block.qcow2.unflushed import is_waiting

        return is_waiting(self._file, number, seconds=seconds)

    def at_snapshot(self, snapshot: SnapshotInfo) -> Node:
        """The disk as it was at a snapshot, to be read: its size, its bytes, and what lies below the image.

        Until it is closed the snapshot is not deleted, nor is one applied.

        :raise NotFound: it is no longer there. :raise ImageCorrupt: its tables lie where they cannot.
        """
        from stillframe.block.qcow2.view import SnapshotView

        l1 = self._snapshots.begin_view(snapshot)
        return SnapshotView(self, l1, snapshot.disk_size, lambda: self._snapshots.end_view(snapshot))

    def freeze_view(self) -> Node | None:
        """See `Node`: a snapshot that stays pending, and is abandoned when the view is closed."""
        from stillframe.block.qcow2.view import SnapshotView

        if self.snapshot_store is None or self.read_only:
            return None
        pending = self._snapshots.freeze()
        with self._image.gate.lock:
            # A copy: the table itself may come to change in place.
            l1 = bytes(pending.frozen_l1)
        return SnapshotView(self, l1, self.size, pending.abandon)

    def write_compressed(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """`write` for whole clusters, stored compressed where that makes them smaller.

        :raise InvalidRequest: they do not begin and end where clusters do, or the disk.
        :raise Unsupported: the image can have no compressed clusters.
        """
        from stillframe.block.qcow2.packing import write_compressed

        view = memoryview(data).cast("B")
        self._refuse_write(offset, len(view))
        write_compressed(self._image, offset, view)

    @property
    def children(self) -> Mapping[str, Node]:
        there = {"file": self._file, "data-file": self._data, "backing": self._backing}
        return {role: node for role, node in there.items() if node is not None}

    @property
    def snapshot_store(self) -> Snapshots | None:
        """None with a data file of its own, whose clusters nothing counts: the format rules snapshots out."""
        return None if self._image.header.has_data_file else self._snapshots

    @property
    def is_switching(self) -> bool:
        # Without the gate's lock, which a change holds for long: it is a hint.
        return self._image.gate.is_switching

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._refuse_outside(offset, len(buffer))
        while len(buffer) > _LOOKED_UP_AT_ONCE:
            self._image.read_tree(None, offset, buffer[:_LOOKED_UP_AT_ONCE])
            offset += _LOOKED_UP_AT_ONCE
            buffer = buffer[_LOOKED_UP_AT_ONCE:]
        if buffer:
            self._image.read_tree(None, offset, buffer)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        from stillframe.block.qcow2.writing import write

        view = memoryview(data).cast("B")
        self._refuse_write(offset, len(view))
        write(self._image, offset, view)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        from stillframe.block.qcow2.writing import unmap as unmap_clusters
        from stillframe.block.qcow2.writing import zero_data_file

        self._refuse_write(offset, length)
        unmap = unmap and self._discard
        if self._image.is_data_file_raw:
            zero_data_file(self._image, offset, length, unmap=unmap)
            return
        start, end = self._whole_subclusters(offset, length)
        if start >= end:
            self._write_zero_bytes(offset, offset + length)
            return
        self._write_zero_bytes(offset, start)
        if self._image.header.version < 3 and (self._backing is not None or not unmap):
            # Version 2 has no mark for zeroes: unallocated clusters would show what lies below, or lose their place.
            self._write_zero_bytes(start, end)
        else:
            left = unmap_clusters(self._image, start, end, keep_place=not unmap, reads_zero=True)
            for part in left:
                self._write_zero_bytes(*part)
        self._write_zero_bytes(end, offset + length)

    def discard(self, offset: int, length: int) -> None:
        from stillframe.block.qcow2.writing import unmap, zero_data_file

        self._refuse_write(offset, length)
        if not self._discard or (self._image.header.version < 3 and self._backing is not None):
            return
        if self._image.is_data_file_raw:
            # With the tables or without them, the same is read.
            zero_data_file(self._image, offset, length, unmap=True)
            return
        start, end = self._whole_subclusters(offset, length)
        if start < end:
            unmap(self._image, start, end, keep_place=False, reads_zero=True)

    def flush(self) -> None:
        if not self.read_only:
            self._image.flush()

    def truncate(self, size: int) -> None:
        """See `Node.truncate`; the caller holds requests back, and it is durable at the return.

        :raise InvalidRequest: not a multiple of 512. :raise LimitReached: larger than the format allows.
        :raise Unsupported: a version 2 image with snapshots, and others that cannot be resized, by name.
        """
        from stillframe.block.qcow2.resize import truncate

        self._refuse_read_only()
        truncate(self._image, size)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._refuse_outside(offset, length)
        return self.tree_extents(None, offset, length)

    def tree_extents(self, l1: bytes | bytearray | None, offset: int, length: int) -> Iterator[Extent]:
        """`extents` of a tree of tables, with what lies below it; None for the active one."""
        end = offset + length
        held: Extent | None = None
        while offset < end:
            part = min(end - offset, _LOOKED_UP_AT_ONCE)
            empty = min(end - offset, self._empty_from(l1, offset))
            found = self._below(offset, empty) if empty > part else self._looked_up(l1, offset, part)
            part = max(part, empty)
            for extent in found:
                if held is not None and _follows(held, extent):
                    held = _joined(held, extent)
                    continue
                if held is not None:
                    yield held
                held = extent
            offset += part
        if held is not None:
            yield held

    def _empty_from(self, l1: bytes | bytearray | None, offset: int) -> int:
        """How many bytes from `offset` on have no L2 table at all."""
        image = self._image
        span = image.header.l2_span
        index = offset // span
        with image.gate.lock:
            return max(
                0, (index + empty_entries(image.world.l1 if l1 is None else l1, index)) * span - offset
            )

    def _looked_up(self, l1: bytes | bytearray | None, offset: int, length: int) -> Iterator[Extent]:
        image = self._image
        with image.gate.lock:
            runs = image.mapping.runs(image.world.l1 if l1 is None else l1, offset, length)
        for kind, size, where in runs:
            if kind == DATA:
                yield Extent(offset, size, ExtentKind.DATA, host_offset=where)
            elif kind == PACKED:
                yield Extent(offset, size, ExtentKind.DATA, compressed=True)
            elif kind == ZEROES:
                yield Extent(offset, size, ExtentKind.ZERO, host_offset=where or None)
            else:
                yield from self._below(offset, size)
            offset += size

    def _below(self, offset: int, length: int) -> Iterator[Extent]:
        there = 0
        if self._backing is not None:
            there = max(0, min(length, self._backing.size - offset))
            for extent in self._backing.extents(offset, there) if there else ():
                yield Extent(
                    extent.offset,
                    extent.length,
                    extent.kind,
                    extent.host_offset,
                    extent.depth + 1,
                    extent.compressed,
                )
        if there < length:
            yield Extent(offset + there, length - there, ExtentKind.UNALLOCATED)

    def info(self) -> ImageInfo:
        header = self._image.header
        below = self._file.info()
        data: dict[str, object] = {
            "compat": "0.10" if header.version == 2 else "1.1",
            "compression-type": header.compression_name,
        }
        if header.version >= 3:
            data["lazy-refcounts"] = bool(header.compatible & LAZY_REFCOUNTS)
        if self._image.has_bitmaps:
            from stillframe.block.qcow2.bitmaps import bitmaps_json

            data["bitmaps"] = bitmaps_json(self._image)
        data["refcount-bits"] = header.refcount_bits
        if header.has_data_file:
            named = header.extension(EXTENSION_DATA_FILE)
            if named is not None:
                data["data-file"] = named.decode("utf-8", "surrogateescape")
            data["data-file-raw"] = header.is_data_file_raw
        if header.version >= 3:
            data["corrupt"] = bool(header.incompatible & CORRUPT)
            data["extended-l2"] = header.has_extended_l2
        name = header.backing_name.decode("utf-8", "surrogateescape")
        kind = header.extension(EXTENSION_BACKING_FORMAT)
        return ImageInfo(
            filename=below.filename,
            format="qcow2",
            virtual_size=header.size,
            actual_size=below.actual_size,
            cluster_size=header.cluster_size,
            dirty=bool(header.incompatible & DIRTY),
            backing_filename=name or None,
            backing_format=kind.decode("utf-8", "replace") if name and kind else None,
            snapshots=() if header.has_data_file else tuple(self._snapshots.snapshots()),
            format_specific={"type": "qcow2", "data": data},
            children=(("file", below),),
        )

    def close(self) -> None:
        """Flush, and give back what was allocated ahead; the children stay open."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self.read_only:
            self._image.close()

    def _whole_subclusters(self, offset: int, length: int) -> tuple[int, int]:
        """What of a range can read as zeroes by its mapping, as start and end; the disk's last part may be cut short."""
        size = self._image.l2.subcluster_size
        end = offset + length
        start = -(-offset // size) * size
        return start, end if end == self.size else end // size * size

    def _write_zero_bytes(self, offset: int, end: int) -> None:
        """Zeroes as data, where there are none yet."""
        from stillframe.block.qcow2.writing import write

        for extent in self._image_runs(offset, end):
            at, stop = extent
            while at < stop:
                part = min(len(_ZEROES), stop - at)
                write(self._image, at, memoryview(_ZEROES)[:part])
                at += part

    def _image_runs(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges that do not read as zeroes by their mapping."""
        if offset >= end:
            return
        for extent in self.extents(offset, end - offset):
            if extent.kind is ExtentKind.DATA or extent.depth:
                yield extent.offset, extent.offset + extent.length

    def _refuse_outside(self, offset: int, length: int) -> None:
        if self._image.is_withheld:
            refuse_if_withheld(self._image)
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InvalidRequest(
                f"{length} bytes at {offset} lie outside node '{self.node_name}', which has {self.size} bytes"
            )

    def _refuse_read_only(self) -> None:
        if self.read_only:
            raise Refused(f"Block node '{self.node_name}' is read-only")
        if self._image.is_withheld:
            refuse_if_withheld(self._image)

    def _refuse_write(self, offset: int, length: int) -> None:
        self._refuse_read_only()
        self._refuse_outside(offset, length)


def _follows(first: Extent, second: Extent) -> bool:
    if (first.kind, first.depth, first.compressed) != (second.kind, second.depth, second.compressed):
        return False
    if first.host_offset is None or second.host_offset is None:
        return first.host_offset is second.host_offset
    return second.host_offset == first.host_offset + first.length


def _joined(first: Extent, second: Extent) -> Extent:
    return Extent(
        first.offset,
        first.length + second.length,
        first.kind,
        first.host_offset,
        first.depth,
        first.compressed,
    )
