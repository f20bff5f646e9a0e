"""One disk copied onto another: what reads as zeroes is not written, what both see in a common backing file is not copied.

source   runs (status.py), cut at the borders of the target's clusters; a cluster of two kinds counts as data
read     one piece ahead of what is being written, by a thread of its own
target   data where there is some; zeroes are left out where the target reads so anyway
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stillframe.block.node import Node
from stillframe.block.status import Status, statuses
from stillframe.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from stillframe.block.qcow2 import Qcow2Node

COPIED_AT_ONCE = 2 << 20
"""Bytes of a piece; two are held at a time."""

LARGEST_SPARSE_SIZE = 16 << 20
_SMALLEST_HOLE = 4096
_SECTOR = 512
_ZEROES = bytes(COPIED_AT_ONCE)

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; what it raises ends the copy."""


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy.

    :param sparse_size: zeroes are left out in runs of at least so many bytes, a multiple of 512; 0 writes all of them.
    :param is_blank: the target is new: it reads as zeroes everywhere, or as the node below it.
    :param common_depth: the depth in the source's chain of the image that is below the target, too; None where there is
        none, and where the node below has to be read to find out what differs.
    :param compress: store clusters compressed, where that makes them smaller; for qcow2 targets.
    """

    sparse_size: int = _SMALLEST_HOLE
    is_blank: bool = False
    common_depth: int | None = None
    compress: bool = False


def copy(source: Node, target: Node, options: CopyOptions, *, progress: Progress | None = None) -> None:
    """Make the target read as the source does, for the source's size; durable at the return.

    On an error a part is copied.

    :raise InvalidRequest: the target is smaller. :raise Unsupported: it cannot store compressed clusters.
    """
    if target.size < source.size:
        raise InvalidRequest("output file is smaller than input file")
    if not 0 <= options.sparse_size <= LARGEST_SPARSE_SIZE or options.sparse_size % _SECTOR:
        raise InvalidRequest(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
            f"{_SECTOR} up to {LARGEST_SPARSE_SIZE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    copying = _Copying(source, target, options)
    for done in copying.steps():
        if progress is not None:
            progress(done, source.size)
    target.flush()


class _Copying:
    def __init__(self, source: Node, target: Node, options: CopyOptions) -> None:
        self._source = source
        self._target = target
        self._options = options
        self._below = target.children.get("backing")
        self._packing = _compressing(target) if options.compress else None
        cluster = target.info().cluster_size
        if cluster is None:
            small = 0 < options.sparse_size < _SMALLEST_HOLE
            self._granule = _SECTOR if small else _SMALLEST_HOLE
        else:
            self._granule = cluster if options.compress else max(cluster, _SMALLEST_HOLE)

    def steps(self) -> Iterator[int]:
        """Copy piece by piece; after each, how far it has come."""
        with ThreadPoolExecutor(1, "read-ahead") as reader:
            coming: tuple[int, int, Future[bytearray]] | None = None
            for offset, length, kind in self._pieces():
                if coming is not None and kind == _DATA:
                    # What is being read goes first, so that one buffer at a time waits.
                    following = reader.submit(self._read, offset, length)
                    yield self._write_read(*coming)
                    coming = offset, length, following
                    continue
                if coming is not None:
                    yield self._write_read(*coming)
                    coming = None
                if kind == _DATA:
                    coming = offset, length, reader.submit(self._read, offset, length)
                    continue
                if kind == _ZERO:
                    self._put_zeroes(offset, length)
                yield offset + length
            if coming is not None:
                yield self._write_read(*coming)

    def _read(self, offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        self._source.readinto(offset, memoryview(buffer))
        return buffer

    def _write_read(self, offset: int, length: int, coming: "Future[bytearray]") -> int:
        self._put(offset, coming.result())
        return offset + length

    # What is to be done.

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        for start, end, kind in self._runs():
            step = end - start if kind != _DATA else COPIED_AT_ONCE
            for offset in range(start, end, step):
                yield offset, min(step, end - offset), kind

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Start, end and kind, cut where clusters of the target begin."""
        granule, size = self._granule, self._source.size
        start, is_mixed = 0, False
        for status in statuses(self._source, 0, size):
            end = status.end
            if is_mixed:
                stop = min(start + granule, size)
                if end < stop:
                    continue
                yield start, stop, _DATA
                start = stop
            stop = size if end == size else end // granule * granule
            if stop > start:
                yield start, stop, self._kind(status)
                start = stop
            is_mixed = end > start

    def _kind(self, status: Status) -> int:
        common = self._options.common_depth
        if common is not None and status.depth >= common:
            return _COMMON
        return _ZERO if status.zero else _DATA

    # What is done.

    def _put(self, offset: int, data: bytearray) -> None:
        view = memoryview(data)
        for start, end, is_zero in self._parts(offset, data):
            if is_zero:
                self._put_zeroes(offset + start, end - start)
            else:
                self._put_data(offset + start, view[start:end])

    def _parts(self, offset: int, data: bytearray) -> Iterator[tuple[int, int, bool]]:
        """The data cut into what is to be written and what are zeroes; what the node below shows already is left out."""
        import numpy as np

        granule, length = self._granule, len(data)
        whole = length // granule
        zero = np.zeros(0, np.bool_)
        if whole:
            words = np.frombuffer(data, np.uint64, whole * granule // 8)
            zero = words.reshape(whole, -1).max(axis=1) == 0
        if whole * granule < length:
            zero = np.append(zero, not any(data[whole * granule :]))
        if self._options.sparse_size == 0:
            zero[:] = False
        breaks = np.flatnonzero(np.diff(zero)) + 1
        for first, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(zero)], strict=True):
            start, stop = first * granule, min(end * granule, length)
            # A disk may end inside a granule: that counts as a whole one.
            is_zero = bool(zero[first]) and (end - first) * granule >= min(self._options.sparse_size, length)
            if self._below is None or self._options.common_depth is not None:
                yield start, stop, is_zero
            else:
                yield from self._differing(offset, data, start, stop, is_zero)

    def _differing(
        self, offset: int, data: bytearray, start: int, stop: int, is_zero: bool
    ) -> Iterator[tuple[int, int, bool]]:
        below = self._shown_below(offset + start, stop - start)
        for at in range(start, stop, self._granule):
            end = min(at + self._granule, stop)
            if data[at:end] != below[at - start : end - start]:
                yield at, end, is_zero

    def _shown_below(self, offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        there = 0 if self._below is None else max(0, min(length, self._below.size - offset))
        if self._below is not None and there:
            self._below.readinto(offset, memoryview(buffer)[:there])
        return buffer

    def _put_data(self, offset: int, data: memoryview) -> None:
        if self._packing is not None:
            self._packing.write_compressed(offset, data)
        else:
            self._target.write(offset, data)

    def _put_zeroes(self, offset: int, length: int) -> None:
        if self._options.sparse_size == 0:
            for at in range(offset, offset + length, len(_ZEROES)):
                self._put_data(at, memoryview(_ZEROES)[: offset + length - at])
        elif self._below is not None or not self._options.is_blank:
            self._target.write_zeroes(offset, length)


_DATA, _ZERO, _COMMON = range(3)


def _compressing(target: Node) -> "Qcow2Node":
    from stillframe.block.qcow2 import Qcow2Node

    if not isinstance(target, Qcow2Node):
        raise Unsupported(
            "Compression not supported for this file format", remedy="Make a qcow2 image: -O qcow2."
        )
    return target
