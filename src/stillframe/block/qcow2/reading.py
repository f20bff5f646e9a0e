"""Runs of a tree (mapping.py) made into bytes: data, compressed data, what lies below, zeroes."""

import threading

from stillframe.block.node import Node
from stillframe.block.qcow2.compression import decompress
from stillframe.block.qcow2.image_file import ImageFile
from stillframe.block.qcow2.l2_entry import packed_place
from stillframe.block.qcow2.layout import Header
from stillframe.block.qcow2.mapping import DATA, PACKED, UNALLOCATED, Run
from stillframe.errors import ImageCorrupt, InvalidRequest


class RunReader:
    """Reads outside the image's lock; whoever calls holds a ticket of the gate.

    :param file: where compressed data lies. :param data: where guest data lies; None if it has a file of its own that was not
        opened.
    """

    def __init__(self, file: ImageFile, data: ImageFile | None, header: Header) -> None:
        self._file = file
        self._data = data
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._compression = header.compression_name
        self._unpacked: tuple[int, bytes] | None = None
        self._unpacking = threading.Lock()

    @property
    def data(self) -> ImageFile:
        """Where guest data lies. :raise InvalidRequest: in a file of its own, which was not opened."""
        if self._data is None:
            raise _without_data()
        return self._data

    def refuse_without_data(self) -> None:
        """:raise InvalidRequest: as `data`."""
        if self._data is None:
            raise _without_data()

    def read(self, runs: list[Run], offset: int, buffer: memoryview, backing: Node | None) -> None:
        """Fill the buffer, which the runs cover exactly.

        :param offset: the guest's, of the first run. :param backing: what unallocated runs show; None for zeroes.
        """
        if len(runs) == 1 and runs[0][0] == DATA:
            self.data.readinto(runs[0][2], buffer)
            return
        at = 0
        for kind, length, where in runs:
            part = buffer[at : at + length]
            if kind == DATA:
                self.data.readinto(where, part)
            elif kind == PACKED:
                within = (offset + at) & (self._cluster_size - 1)
                part[:] = self._unpack(where)[within : within + length]
            elif kind == UNALLOCATED and backing is not None:
                there = max(0, min(length, backing.size - offset - at))
                if there:
                    backing.readinto(offset + at, part[:there])
                _zero(part[there:])
            else:
                _zero(part)
            at += length

    def forget_unpacked(self) -> None:
        """Compressed data was written: what stood at its place before may be remembered under the same entry."""
        with self._unpacking:
            self._unpacked = None

    def _unpack(self, entry: int) -> bytes:
        """The cluster that a compressed entry stands for; the last one is remembered."""
        with self._unpacking:
            if self._unpacked is not None and self._unpacked[0] == entry:
                return self._unpacked[1]
            offset, length = packed_place(entry, self._cluster_bits)
            if offset >= self._file.size:
                raise ImageCorrupt(f"Compressed data at {offset:#x} lies outside the image file")
            data = decompress(bytes(self._file.read(offset, length)), self._compression, self._cluster_size)
            self._unpacked = (entry, data)
            return data


def _without_data() -> InvalidRequest:
    return InvalidRequest("'data-file' is required for this image", remedy="Name it by the option data-file.")


def _zero(buffer: memoryview) -> None:
    if buffer:
        # Not before there is something to read: commands that only describe an image are to begin at once.
        import ctypes

        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), 0, len(buffer))
