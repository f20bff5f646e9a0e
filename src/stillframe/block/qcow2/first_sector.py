"""The first 512 bytes of an image, and every write of ours to them.

What is written here is in force or not as a whole: storage keeps a sector's write together. So everything that the mark
needs (marks.py) is brought into this sector:

    before   header │ extensions, perhaps beyond the sector │ END │ backing name
    marked   header │ extensions, mark │ END │ ...          backing name where it was, behind END, or behind the sector

The table of feature names, 392 bytes in images of QEMU's, makes room where there is none for both. A backing name that must
leave the sector is written first to a place that nobody reads, and flushed. What the sector held before the mark is
remembered, and comes back with the mark's end; what lay behind the sector was never touched.
"""

import struct
import threading
from collections.abc import Iterator

from stillframe.block.qcow2.image_file import ImageFile
from stillframe.block.qcow2.layout import (
    EXTENSION_FEATURE_NAMES,
    FEATURES_OFFSET,
    LOADING,
    VERSION_2_LOADING,
    WORLD_OFFSET,
    Header,
    feature_names,
    loading_name,
    pack_extensions,
)
from stillframe.block.qcow2.marks import EXTENSION_MARK, Mark, pack_mark, unpack_mark
from stillframe.errors import LimitReached, Unsupported

SECTOR = 512
FEATURES_END = FEATURES_OFFSET + 24

_NAME_PLACE = struct.Struct(">QI")
_NAME_AT, _VERSION_AT = 8, 4

Extensions = tuple[tuple[int, bytes], ...]


class FirstSector:
    """:param header: as it was read from the file, the mark's feature bit in it.

    :ivar mark: what the file holds now; None for none. :ivar is_barred: whether other programs refuse the image for it.
    :ivar has_foreign_mark: a mark is there that this version cannot read.
    :raise Unsupported: the image is barred, and the mark is of a later version.
    """

    def __init__(self, file: ImageFile, header: Header) -> None:
        self._file = file
        self._header = header
        self._lock = threading.Lock()
        self._bytes = bytes(file.read(0, SECTOR)).ljust(SECTOR, b"\0")
        self._extensions = header.extensions
        self._plain: tuple[bytes, Extensions] | None = None
        self._is_in_doubt = False
        data = header.extension(EXTENSION_MARK)
        self.mark = unpack_mark(data) if data is not None else None
        self.has_foreign_mark = data is not None and self.mark is None
        self.is_barred = bool(header.incompatible & LOADING)
        if self.is_barred and self.mark is None:
            raise Unsupported(
                "Unsupported qcow2 feature(s): an unfinished load of several images that this version cannot resolve",
                remedy="Use the version of stillframe that began it, or a later one.",
            )

    def write_world(self, world: bytes) -> None:
        """Bytes 24..71, and nothing else unless an earlier write failed; durable."""
        with self._lock:
            if self._is_in_doubt:
                self._write_all(world, self.mark, self.is_barred)
                return
            self._write(WORLD_OFFSET, world)

    def write_features(self, header: Header, *, flush: bool = True) -> None:
        """The feature words; version 3 only. :param flush: durable at the return."""
        with self._lock:
            features = header.pack_features(LOADING if self.is_barred else 0)
            self._write(FEATURES_OFFSET, features, flush=flush)

    def write_mark(
        self, mark: Mark | None, *, barred: bool, world: bytes | None = None, flush: bool = True
    ) -> None:
        """The mark, or none, and with it a world, in one write.

        What is not given stays as it is in the file, not as anybody remembers it: guests may grow tables meanwhile.

        :param barred: other programs are to refuse the image. :param flush: durable at the return.
        :param world: bytes 24..71; None for those in force.
        :raise LimitReached: there is no room for the mark; nothing was written.
        :raise IOFailed: either is in the file.
        """
        with self._lock:
            self._write_all(world, mark, barred, flush=flush)

    def refuse_without_room(self, mark: Mark) -> None:
        """:raise LimitReached: the sector has no room for such a mark."""
        with self._lock:
            self._compose(None, mark, False)

    # Within: the lock is held.

    def _write(self, offset: int, data: bytes, *, flush: bool = True) -> None:
        try:
            self._file.write(offset, data)
            if flush:
                self._file.flush()
        except BaseException:
            self._is_in_doubt = True
            raise
        known = bytearray(self._bytes)
        known[offset : offset + len(data)] = data
        self._bytes = bytes(known)

    def _write_all(self, world: bytes | None, mark: Mark | None, barred: bool, *, flush: bool = True) -> None:
        sector, extensions, moved = self._compose(world, mark, barred)
        if moved is not None:
            self._file.write(*moved)
            self._file.flush()
        if self._plain is None and self.mark is None:
            self._plain = (self._bytes, self._extensions)
        self._write(0, sector, flush=flush)
        self._is_in_doubt = False
        self._extensions = extensions
        self.mark = unpack_mark(dict(extensions)[EXTENSION_MARK]) if mark else None
        self.is_barred = barred
        if mark is None:
            self._plain = None

    def _compose(
        self, world: bytes | None, mark: Mark | None, barred: bool
    ) -> tuple[bytes, Extensions, tuple[int, bytes] | None]:
        """The sector as it is to be, its extensions, and where the backing name must be written before it."""
        moved = None
        if mark == self.mark and barred == self.is_barred:
            sector, extensions = bytearray(self._bytes), self._extensions
        elif mark is None and self._plain is not None:
            sector, extensions = bytearray(self._plain[0]), self._plain[1]
        else:
            sector, extensions, moved = self._laid_out(mark, barred)
        sector[WORLD_OFFSET:FEATURES_OFFSET] = world or self._bytes[WORLD_OFFSET:FEATURES_OFFSET]
        if self._header.version >= 3:
            incompatible = int.from_bytes(self._bytes[FEATURES_OFFSET : FEATURES_OFFSET + 8], "big")
            incompatible = incompatible & ~LOADING | (LOADING if barred else 0)
            sector[FEATURES_OFFSET:FEATURES_END] = self._bytes[FEATURES_OFFSET:FEATURES_END]
            struct.pack_into(">Q", sector, FEATURES_OFFSET, incompatible)
        else:
            struct.pack_into(">I", sector, _VERSION_AT, VERSION_2_LOADING if barred else 2)
        return bytes(sector), extensions, moved

    def _laid_out(
        self, mark: Mark | None, barred: bool
    ) -> tuple[bytearray, Extensions, tuple[int, bytes] | None]:
        header = self._header
        length = header.extensions_offset
        name_offset, name_length = _NAME_PLACE.unpack_from(self._bytes, _NAME_AT)
        in_sector = name_length if name_offset and name_offset < SECTOR else 0
        may_move = header.cluster_size > SECTOR
        for extensions in self._candidates(mark, barred):
            area = pack_extensions(extensions)
            end = length + len(area)
            sector = bytearray(self._bytes)
            if end > SECTOR:
                continue
            sector[length:end] = area
            if not in_sector or end <= name_offset:
                return sector, extensions, None
            name = bytes(self._file.read(name_offset, name_length))
            if end + name_length <= SECTOR:
                sector[end : end + name_length] = name
                _NAME_PLACE.pack_into(sector, _NAME_AT, end, name_length)
                return sector, extensions, None
            if may_move:
                # Behind all that the header in force leads to.
                in_force = length + len(pack_extensions(self._extensions))
                place = -(-max(SECTOR, in_force, name_offset + name_length) // 8) * 8
                if place + name_length <= header.cluster_size:
                    _NAME_PLACE.pack_into(sector, _NAME_AT, place, name_length)
                    return sector, extensions, (place, name)
        raise LimitReached(
            "The header of the image has no room for the mark of an operation over several images",
            remedy="Convert the image to one with clusters of 4096 bytes or more, or do it for this image alone.",
        )

    def _candidates(self, mark: Mark | None, barred: bool) -> Iterator[Extensions]:
        """Lists of extensions, the most desirable first."""
        kept = tuple(
            each for each in self._extensions if each[0] not in (EXTENSION_MARK, EXTENSION_FEATURE_NAMES)
        )
        names = tuple(each for each in self._extensions if each[0] == EXTENSION_FEATURE_NAMES)
        ours = (EXTENSION_FEATURE_NAMES, loading_name())
        dropped = self.mark is not None and self.mark.names_dropped
        if mark is None:
            if dropped:
                yield (*kept, (EXTENSION_FEATURE_NAMES, feature_names()))
            elif names != (ours,):
                yield (*kept, *names)
            yield kept
            return
        had = dropped or (bool(names) and names != (ours,))
        data = (EXTENSION_MARK, pack_mark(_with_names_dropped(mark, had)))
        if barred:
            yield (*kept, ours, data)
        yield (*kept, data)


def _with_names_dropped(mark: Mark, dropped: bool) -> Mark:
    from dataclasses import replace

    return replace(mark, names_dropped=dropped)
