"""An open qcow2 image: its file, the tables in force, and what all operations on it share.

The *world* is one whole set of tables: bytes 24..71 of the header and what they lead to. One write of these bytes
switches from one world to the next (shadow.py); smaller changes are made inside the world in force, in an order
that mapping.py and refcounts.py state.
"""

import contextlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stillframe.block.node import Node
from stillframe.block.qcow2.first_sector import FirstSector
from stillframe.block.qcow2.gate import Gate
from stillframe.block.qcow2.image_file import ImageFile
from stillframe.block.qcow2.layout import (
    BITMAPS_CONSISTENT,
    COPIED,
    CORRUPT,
    DIRTY,
    EXTENSION_BITMAPS,
    LOADING,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    OFFSET_MASK,
    OTHER_AUTOCLEAR,
    RAW_DATA_FILE,
    RECORD_NUMBER_SHIFT,
    Header,
    parse_header,
)
from stillframe.block.qcow2.mapping import (
    Deferred,
    Mapping,
    l1_entry,
)
from stillframe.block.qcow2.marks import Mark
from stillframe.block.qcow2.metadata import ACTIVE_L2, Metadata, refuse_shared_blocks
from stillframe.block.qcow2.reading import RunReader
from stillframe.block.qcow2.snapshot_table import SnapshotEntry, parse_table
from stillframe.block.qcow2.wholly import wholly
from stillframe.errors import ImageCorrupt, InvalidRequest, IOFailed, Refused, StillframeError

if TYPE_CHECKING:
    from stillframe.block.qcow2.pending import Pending
    from stillframe.block.qcow2.refcounts import Refcounts
    from stillframe.block.qcow2.replay import Recovery
    from stillframe.block.qcow2.widths import Clusters


@dataclass(frozen=True, slots=True)
class World:
    """One whole set of tables. `l1` and `refcount_table` are what the file holds, changed in place with it.

    :param snapshot_table_length: bytes.
    """

    header: Header
    l1: bytearray
    refcount_table: bytearray
    snapshots: tuple[SnapshotEntry, ...]
    snapshot_table_length: int


class Image:
    """What the parts of the driver share. See `Gate` for who may call what when.

    :param file: the child with the image's bytes. :param backing: what lies below, None for zeroes.
    :param data: the child with the guest's bytes, where the header says that it has one; None to look at tables alone.
    :param is_repair: opened to be repaired: marks of damage neither refuse it nor are acted on.
    :raise InvalidRequest: not qcow2. :raise Unsupported: a feature, by name. :raise ImageCorrupt: out of bounds.
    """

    def __init__(
        self,
        file: Node,
        backing: Node | None,
        *,
        data: Node | None = None,
        read_only: bool,
        is_repair: bool = False,
    ) -> None:
        self.file = ImageFile(file)
        self.backing = backing
        self.read_only = read_only
        self.gate = Gate()
        self._size_at_open = file.size
        header = self._read_header()
        self.sector = FirstSector(self.file, header)
        # The bit is the mark's and not this header's: whoever switches worlds need not know of it.
        self.world = self.tables_of(replace(header, incompatible=header.incompatible & ~LOADING))
        self.found_mark = self.sector.mark
        self.mark_failure: str | None = None
        if data is not None and not header.has_data_file:
            raise InvalidRequest("'data-file' can only be set for images with an external data file")
        self._data = ImageFile(data) if data else None if header.has_data_file else self.file
        self.reader = RunReader(self.file, self._data, header)
        self.mapping = Mapping(self.file, self.world.header)
        self.l2 = self.mapping.l2
        self.pending: Pending | None = None
        self.shows: Pending | bytes | None = None
        """What the disk is known to be equal to: a frozen instant, or the snapshot of this id. Every change of it forgets."""
        self.broken: str | None = None
        self.is_in_doubt = False
        self.has_bitmaps = False
        self.has_current_bitmaps = False
        self._refcounts: Refcounts | None = None
        self._metadata: Metadata | None = None
        self.recovery: Recovery | None = None
        if header.extension(EXTENSION_BITMAPS) and header.autoclear & BITMAPS_CONSISTENT:
            self.has_bitmaps = self.has_current_bitmaps = True
        if not read_only:
            self._open_for_writing(is_repair)

    @property
    def header(self) -> Header:
        """The header in force."""
        return self.world.header

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.world.header.cluster_size

    @property
    def data(self) -> ImageFile:
        """Where guest data lies, at the host offsets of L2 entries; the same file as the tables' unless the header says no.

        :raise InvalidRequest: it was not opened.
        """
        return self.reader.data

    @property
    def is_data_file_raw(self) -> bool:
        """Whether the data file without the tables is the disk; not over a backing node, whatever the header says."""
        return self.header.is_data_file_raw and self.backing is None

    @property
    def refcounts(self) -> "Refcounts":
        """Loaded when first needed, since reading alone does without."""
        if self._refcounts is None:
            from stillframe.block.qcow2.refcounts import Refcounts

            refuse_shared_blocks(self.world)
            self._refcounts = Refcounts(self)
        return self._refcounts

    def _read_header(self) -> Header:
        start = self.file.read(0, min(self.file.size, 1 << MIN_CLUSTER_BITS))
        cluster_bits = int.from_bytes(start[20:24], "big")
        if MIN_CLUSTER_BITS < cluster_bits <= MAX_CLUSTER_BITS:
            start = self.file.read(0, min(self.file.size, 1 << cluster_bits))
        return parse_header(bytes(start))

    def tables_of(self, header: Header) -> World:
        """The world that a header leads to, as it is in the file. :raise ImageCorrupt: out of bounds."""
        snapshots, length = parse_table(header, lambda offset, size: bytes(self.file.read(offset, size)))
        table_bytes = header.refcount_table_clusters * header.cluster_size
        return World(
            header=header,
            l1=self.file.read(header.l1_offset, header.l1_size * 8),
            refcount_table=self.file.read(header.refcount_table_offset, table_bytes),
            snapshots=snapshots,
            snapshot_table_length=length,
        )

    def _open_for_writing(self, is_repair: bool) -> None:
        if not is_repair:
            self.reader.refuse_without_data()
        header = self.world.header
        if header.incompatible & CORRUPT and not is_repair:
            raise ImageCorrupt(
                "qcow2: Image is corrupt; cannot be opened read/write",
                remedy="Run `stillframe image check --repair all` on the image, or open it read-only.",
            )
        from stillframe.block.qcow2.replay import recover
        from stillframe.block.qcow2.unflushed import Record

        self.recovery = recover(self)
        if is_repair:
            return
        if header.version >= 3:
            self.mapping.record = Record(self.file.node, header.l2_entry_words * 8, self._announce_record)
            self.mapping.flush = self.flush_files
            for file in (self.file, self.data):
                file.on_failed_flush = self.mapping.void_record
        if header.incompatible & DIRTY:
            # Refcounts were put off by another program that did not come to catch up on them.
            from stillframe.block.qcow2.repair import repair_open

            repair_open(self, "all")
            self.set_features(incompatible=self.header.incompatible & ~DIRTY)
        kept = BITMAPS_CONSISTENT if self.has_bitmaps else 0
        kept |= RAW_DATA_FILE if self.is_data_file_raw else 0
        if self.header.autoclear & ~kept:
            # What these bits promise would no longer be true after the first write of a program that does not know it.
            self.set_features(autoclear=self.header.autoclear & kept)

    def begin_record(self) -> None:
        """Have the header carry the number of our record from now on, until the image is closed; see `Record.begin`.

        :raise IOFailed: it could not be written.
        """
        if self.mapping.record is not None:
            with self.gate.lock:
                self.mapping.record.begin()

    def _announce_record(self, number: int) -> bytes:
        """Make the header carry the number of our record, until the image is closed; the world in force. Lock held."""
        header = self.world.header
        autoclear = header.autoclear & OTHER_AUTOCLEAR | number << RECORD_NUMBER_SHIFT
        if header.autoclear != autoclear:
            header = replace(header, autoclear=autoclear)
            # Not durable, since a power cut takes the record with it.
            self.sector.write_features(header, flush=False)
            self.world = replace(self.world, header=header)
        return header.pack_world()

    # Header.

    def set_features(self, *, incompatible: int | None = None, autoclear: int | None = None) -> None:
        """Write feature words, durably; None keeps one as it is."""
        header = self.world.header
        header = replace(
            header,
            incompatible=header.incompatible if incompatible is None else incompatible,
            autoclear=header.autoclear if autoclear is None else autoclear,
        )
        self.sector.write_features(header)
        self.world = replace(self.world, header=header)

    @property
    def is_withheld(self) -> bool:
        """Whether it was found in the middle of a load of several images, which is not resolved yet."""
        return self.found_mark is not None and self.sector.is_barred

    def switch_world(self, new: World, mark: Mark | None = None, *, barred: bool = False) -> None:
        """Put another world into force, durably, by one write of the header.

        :param mark: goes into the header with it; None leaves what is there. :param barred: see `FirstSector`.
        What the new one points to is durable already. On an error the old one is in force again; if even that cannot be
        known, the image takes no more writes: both worlds are whole, and the next open finds one of them.
        """
        old, new = self.world, self._with_features(new)
        before, was_barred = (self.sector.mark, self.sector.is_barred) if mark else (None, False)
        try:
            self._write_world(new, mark, barred)
            self.world, self._metadata = new, None
        except BaseException:
            self.restore_world(old, before, barred=was_barred)
            raise

    def _with_features(self, world: World) -> World:
        """A world of this image as it would be now: the image may have been marked corrupt since it was built."""
        now = self.header
        header = replace(world.header, incompatible=now.incompatible, autoclear=now.autoclear)
        return replace(world, header=header)

    def _write_world(self, world: World, mark: Mark | None, barred: bool) -> None:
        if self.mapping.record is not None:
            self.mapping.record.note_world(world.header.pack_world())
        packed = world.header.pack_world()
        if mark is None:
            self.sector.write_world(packed)
        else:
            self.sector.write_mark(mark, barred=barred, world=packed)

    def restore_world(self, old: World, mark: Mark | None = None, *, barred: bool = False) -> None:
        """Put the old world into force again after a switch that failed or is to be undone.

        :param mark: as in `switch_world`.

        :raise IOFailed: it is not known which is in force; the image takes no more writes.
        """
        old = self._with_features(old)
        try:
            try:
                self._write_world(old, mark, barred)
            except IOFailed:
                # Once more: an error that passes must not leave the image unwritable.
                self._write_world(old, mark, barred)
        except BaseException as error:
            # Not storage alone: whoever interrupts twice leaves as much doubt.
            self.is_in_doubt = True
            self.broken = (
                f"The header of the image could not be written ({said(error)}); it is whole, in its state before or "
                "after the last operation"
            )
            raise
        if self.is_in_doubt:
            self.is_in_doubt, self.broken = False, None
        self.world = old

    def leave_in_doubt(self, old: World) -> None:
        """Show an old world again without a write: which one the file has in force is for the next open to say."""
        self.world = self._with_features(old)
        self.is_in_doubt = True
        self.broken = "The image is part of an operation over several images whose outcome is not known"

    def forget_tables(self) -> None:
        """The world was switched: whatever was derived from the old one is void. Lock held."""
        self.mapping.forget_all()
        self._metadata = None
        if self._refcounts is not None:
            self._refcounts.forget_all()

    def refuse_if_broken(self) -> None:
        """:raise IOFailed: after a header's write of which the outcome is not known.
        :raise Refused: opened read-only."""
        if self.broken:
            import errno

            raise IOFailed(f"{self.broken}", errno=errno.EIO, remedy="Close the image and open it again.")
        if self.read_only:
            raise Refused("The image is open read-only")

    # Where metadata lies.

    def metadata_at(self, cluster: int) -> str | None:
        """What metadata lies in a cluster, as "active L2 table"; None for data and for nothing. Lock held."""
        return self.metadata.what(cluster)

    def refuse_overlap(self, first: int, count: int) -> None:
        """Before clusters are overwritten with anything but the metadata that they hold. Lock held.

        :raise ImageCorrupt: there is metadata; the image is marked, and takes no more writes.
        """
        what = self.metadata.overlap(first, count)
        if what is not None:
            self._mark_corrupt(f"Preventing invalid write on metadata (overlaps with {what})")

    def refuse_foreign_table(self, offset: int) -> None:
        """Before an active L2 table is written in place. Lock held. :raise ImageCorrupt: it is none, or two."""
        what = self.metadata.what(offset >> self.header.cluster_bits)
        if what != ACTIVE_L2:
            self._mark_corrupt(f"Preventing invalid write on metadata (overlaps with {what})")

    def refuse_uncounted(self, cluster: int) -> None:
        """Before a cluster past the file's end is written in place. Lock held. :raise ImageCorrupt: it is nobody's."""
        if not self.refcounts.count(cluster):
            self._mark_corrupt(f"Data cluster {cluster} lies past the end of the image and has no refcount")

    def note_metadata(self, cluster: int, what: str) -> None:
        """A cluster became metadata. Lock held."""
        if self._metadata is not None:
            self._metadata.note(cluster, what)

    def note_table(self, offset: int) -> None:
        """A cluster became an active L2 table. Lock held."""
        self.note_metadata(offset >> self.header.cluster_bits, ACTIVE_L2)

    def forget_cluster(self, cluster: int) -> None:
        """A cluster became free. Lock held."""
        self.mapping.forget(cluster << self.header.cluster_bits)
        if self._metadata is not None:
            self._metadata.forget(cluster)

    @property
    def metadata(self) -> Metadata:
        """Where the metadata of the world in force lies. Lock held."""
        if self._metadata is None:
            self._metadata = Metadata(self.world)
        return self._metadata

    def _mark_corrupt(self, why: str) -> None:
        self.broken = why
        if self.header.version >= 3:
            with contextlib.suppress(IOFailed):
                # The mark is for the next open; this one takes no more writes either way.
                self.set_features(incompatible=self.header.incompatible | CORRUPT)
        raise ImageCorrupt(why, remedy="Run `stillframe image check` on the image.")

    # The active tree.

    @wholly
    def set_l1_entry(self, index: int, entry: int) -> None:
        """Point an active L1 entry elsewhere, in the file and here. Lock held; the table it points to is durable."""
        if self.pending is not None:
            self.pending.keep_frozen_l1()
        self.file.write(self.header.l1_offset + index * 8, struct.pack(">Q", entry))
        struct.pack_into(">Q", self.world.l1, index * 8, entry)

    @wholly
    def own_table(self, index: int) -> int:
        """The host offset of the L2 table of an L1 entry, made writable: the image's own and not frozen.

        Lock held; given up while a new table is flushed.
        """
        with self.gate.table(index):
            entry = l1_entry(self.world.l1, index)
            offset = entry & OFFSET_MASK
            frozen = self.pending is not None and not self.pending.is_fresh_table(index)
            if offset and entry & COPIED and not frozen:
                self.refuse_foreign_table(offset)
                return offset
            cluster, _ = self.refcounts.allocate(1)
            new = cluster << self.header.cluster_bits
            table = bytearray(self.mapping.table(offset)) if offset else bytearray(self.cluster_size)
            with self.gate.released():
                if offset:
                    # Its entries may lead to data that is not durable yet.
                    self.file.write(new, table)
                    self.flush_files()
                else:
                    self.file.write_durable(new, table)
            self.set_l1_entry(index, new | COPIED)
            self.note_table(new)
            self.mapping.remember(new, table)
            if self.pending is not None:
                self.pending.note_fresh_table(index)
            if offset and not frozen:
                self.drop([offset >> self.header.cluster_bits])
            return new

    def drop(self, clusters: Iterable[int]) -> None:
        """References to host clusters were taken out of the active tree. Lock held."""
        clusters = list(clusters)
        if self._metadata is not None:
            for cluster in clusters:
                self._metadata.forget(cluster, ACTIVE_L2)
        self.refcounts.drop(clusters)

    # Reading.

    def read_tree(
        self, l1: bytes | bytearray | None, offset: int, buffer: memoryview, *, below: Node | None = None
    ) -> None:
        """Fill the buffer from a tree of tables with `below` under it; None for the active one, with what is under that."""
        gate = self.gate
        with gate.lock:
            active = l1 is None
            runs = self.mapping.runs(self.world.l1 if l1 is None else l1, offset, len(buffer))
            ticket = gate.start_read()
        try:
            self.reader.read(runs, offset, buffer, self.backing if active else below)
        finally:
            gate.end_read(ticket)

    # Durability.

    def flush(self) -> None:
        """All that was written before is durable; dropped references are counted down.

        :raise IOFailed: it is not. What waited for the flush waits for the next.
        """
        with self.gate.lock:
            self.refuse_if_broken()
            deferred = self.mapping.deferred()
            dropped = None
            if self._refcounts is not None and not self.gate.is_switching:
                dropped = self._refcounts.take_dropped()
            if dropped is not None:
                self.gate.claim_refcounts()
        try:
            self._flush(deferred, dropped)
        finally:
            if dropped is not None:
                with self.gate.lock:
                    self.gate.unclaim_refcounts()

    def _flush(self, deferred: Deferred, dropped: "Clusters | None") -> None:
        """Data first, then the entries that waited for it, then the refcounts; on an error what has not come about waits on."""
        try:
            self.flush_files()
            if deferred:
                with self.gate.lock:
                    self.mapping.write_deferred(deferred)
                self.file.flush()
        except BaseException:
            if dropped is not None:
                with self.gate.lock:
                    self.refcounts.put_back_dropped(dropped)
            raise
        if dropped is not None:
            with self.gate.lock:
                self.refcounts.settle(dropped)

    def flush_files(self) -> None:
        """All that was written to the file, and to the guest data's own if there is one, is durable; data first."""
        if self._data is not None and self._data is not self.file:
            self._data.flush()
        self.file.flush()

    def settle_all(self) -> None:
        """Inside a switch: wait for all requests in flight, and count every dropped reference down."""
        with self.gate.lock:
            self.gate.wait_until_quiet()
            deferred = self.mapping.deferred()
            dropped = self.refcounts.take_dropped()
        self._flush(deferred, dropped)

    def close(self) -> None:
        """Give back what is pending, dropped or leased, and flush. Requests have ended.

        Where that fails, it is a leak, and the record of unflushed entries stays for the next open.
        """
        is_whole = False
        try:
            if self.pending is not None:
                self.pending.abandon()
            if self.broken:
                self.file.flush()
                return
            self.flush()
            if self.header.version >= 3 and self.header.autoclear & ~OTHER_AUTOCLEAR:
                self._announce_record(0)
            if self._refcounts is not None:
                with self.gate.lock:
                    self._refcounts.return_lease()
                    end = self._refcounts.end_of_used()
                # Never below what it was: a refcount that is wrong must not cost data.
                self.file.shrink(max(end, self._size_at_open))
            self.file.flush()
            is_whole = True
        finally:
            if self.mapping.record is not None:
                self.mapping.record.close(is_whole=is_whole)


def said(error: BaseException) -> str:
    """An error as a part of a sentence."""
    return error.message if isinstance(error, StillframeError) else type(error).__name__
