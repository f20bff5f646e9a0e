"""Requests of one client made into calls of the node, and what these return into replies.

Every call here is admitted to the export and ends before anything is sent. Errors of the node become the protocol's; they
are the client's to report, so nothing but defects of ours is logged.
"""

import logging
import threading
from collections.abc import Iterator
from typing import Final, Protocol

from stillframe.block.export import nbd
from stillframe.block.export.handshake import Agreed
from stillframe.block.export.incoming import Ended
from stillframe.block.node import ExtentKind
from stillframe.block.status import statuses
from stillframe.errors import StillframeError

_log = logging.getLogger(__name__)

_MAXIMUM_EXTENTS: Final = 8192
_CHANGED_AT_ONCE: Final = 64 << 20
_HOLES_FROM: Final = 64 << 10
_MAPPED_AT_ONCE: Final = 1 << 20
_LENGTHLESS: Final = frozenset({nbd.FLUSH})


class Line(Protocol):
    """Where replies go."""

    def send(self, data: bytes | memoryview) -> None:
        """Something whole."""
        ...

    def send_part(self, data: bytes | memoryview) -> None:
        """A part, by who holds `sending`."""
        ...

    @property
    def sending(self) -> threading.Lock:
        """Held while one reply is sent in parts."""
        ...


class Requests:
    """What a client may ask of what was agreed on. Any number of threads may call anything."""

    def __init__(self, agreed: Agreed) -> None:
        self._export = agreed.export
        self._node = agreed.export.node
        self._structured = agreed.structured
        self._allocation = agreed.allocation
        self._size = self._node.size

    def is_slow(self, kind: int) -> bool:
        """Whether a request of this kind would wait for more than the storage."""
        return kind == nbd.WRITE and self._node.is_switching

    def refusal(self, kind: int, flags: int, offset: int, length: int) -> int:
        """The error that a request deserves before anything is done; 0 for none."""
        allowed = nbd.ALLOWED_FLAGS.get(kind)
        if allowed is None or flags & ~allowed:
            return nbd.EINVAL
        is_change = kind in (nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES)
        if is_change and not self._export.writable:
            return nbd.EPERM
        if offset + length > self._size and kind not in _LENGTHLESS:
            return nbd.ENOSPC if kind in (nbd.WRITE, nbd.WRITE_ZEROES) else nbd.EINVAL
        if kind == nbd.BLOCK_STATUS and not (self._allocation and length):
            return nbd.EINVAL
        if kind == nbd.READ and length > nbd.MAXIMUM_DATA:
            return nbd.EINVAL
        return 0

    def answer(
        self, kind: int, cookie: int, offset: int, length: int, data: memoryview | None, reply: memoryview
    ) -> int:
        """A short read, write or cache request without flags.

        :param data: what is to be written. :param reply: where the reply is put. :return: its length.
        """
        error = self.refusal(kind, 0, offset, length)
        if kind == nbd.READ and not error:
            return self._answer_read(cookie, offset, length, reply)
        if kind == nbd.WRITE and data is not None:
            error = error or self.write(offset, data, 0)
        if kind == nbd.READ and self._structured:
            said = nbd.error_chunk(cookie, error, "the request cannot be done")
            reply[: len(said)] = said
            return len(said)
        nbd.SIMPLE_REPLY.pack_into(reply, 0, nbd.SIMPLE_REPLY_MAGIC, error, cookie)
        return nbd.SIMPLE_REPLY.size

    def _answer_read(self, cookie: int, offset: int, length: int, reply: memoryview) -> int:
        header = nbd.DATA_CHUNK.size if self._structured and length else nbd.SIMPLE_REPLY.size
        error = self._read_into(offset, reply[header : header + length])
        if self._structured:
            if error or not length:
                said = (
                    nbd.error_chunk(cookie, error, "the node could not be read")
                    if error
                    else _no_data(cookie)
                )
                reply[: len(said)] = said
                return len(said)
            nbd.DATA_CHUNK.pack_into(
                reply, 0, nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, nbd.OFFSET_DATA, cookie, 8 + length, offset
            )
            return header + length
        nbd.SIMPLE_REPLY.pack_into(reply, 0, nbd.SIMPLE_REPLY_MAGIC, error, cookie)
        return header if error else header + length

    def write(self, offset: int, data: memoryview, flags: int) -> int:
        """Write what has arrived. :return: the protocol's error, or 0."""
        try:
            self._export.enter()
            try:
                self._node.write(offset, data)
                if flags & nbd.FLAG_FUA:
                    self._node.flush()
            finally:
                self._export.leave()
        except StillframeError as error:
            return nbd.error_number(error)
        except Exception:
            return self._defect()
        return 0

    def read(self, flags: int, cookie: int, offset: int, length: int, room: memoryview, line: Line) -> None:
        """A read of any length, sent piece by piece.

        :param room: bytes for a piece, and for what stands before it.
        """
        error = self.refusal(nbd.READ, flags, offset, length)
        piece = len(room) - nbd.DATA_CHUNK.size
        if self._structured and flags & nbd.FLAG_DF and length > piece:
            error = error or nbd.EOVERFLOW
        if error:
            said = nbd.error_chunk(cookie, error, "the request cannot be done")
            line.send(said if self._structured else nbd.simple_reply(cookie, error))
        elif self._structured:
            self._read_chunks(cookie, offset, length, room, line, may_have_holes=not flags & nbd.FLAG_DF)
        else:
            self._read_simply(cookie, offset, length, room, line)

    def _read_simply(self, cookie: int, offset: int, length: int, room: memoryview, line: Line) -> None:
        """Once a simple reply has begun, an error can only be told by ending the connection."""
        header = nbd.SIMPLE_REPLY.size
        part = min(length, len(room) - header)
        error = self._read_into(offset, room[header : header + part])
        if error:
            line.send(nbd.simple_reply(cookie, error))
            return
        room[:header] = nbd.simple_reply(cookie)
        with line.sending:
            line.send_part(room[: header + part])
            while length > part:
                offset, length = offset + part, length - part
                part = min(length, len(room))
                if self._read_into(offset, room[:part]):
                    raise Ended("a read failed after its reply had begun")
                line.send_part(room[:part])

    def _read_chunks(
        self, cookie: int, offset: int, length: int, room: memoryview, line: Line, *, may_have_holes: bool
    ) -> None:
        header = nbd.DATA_CHUNK.size
        end = offset + length
        if not length:
            line.send(_no_data(cookie))
        for start, stop, is_hole in self._runs(offset, length) if may_have_holes else [(offset, end, False)]:
            if is_hole:
                done = nbd.CHUNK_DONE if stop == end else 0
                line.send(
                    nbd.HOLE_CHUNK.pack(
                        nbd.CHUNK_MAGIC, done, nbd.OFFSET_HOLE, cookie, 12, start, stop - start
                    )
                )
                continue
            while start < stop:
                part = min(stop - start, len(room) - header)
                error = self._read_into(start, room[header : header + part])
                if error:
                    line.send(nbd.error_chunk(cookie, error, "the node could not be read"))
                    return
                done = nbd.CHUNK_DONE if start + part == end else 0
                nbd.DATA_CHUNK.pack_into(
                    room, 0, nbd.CHUNK_MAGIC, done, nbd.OFFSET_DATA, cookie, 8 + part, start
                )
                line.send(room[: header + part])
                start += part

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Start, end, and whether it is known to read as zeroes; a short read is not worth the question."""
        end = offset + length
        if length < _HOLES_FROM:
            yield offset, end, False
            return
        while offset < end:
            part = min(end - offset, _MAPPED_AT_ONCE)
            yield from self._mapped(offset, part)
            offset += part

    def _mapped(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        runs: list[tuple[int, int, bool]] = []
        try:
            self._export.enter()
            try:
                for extent in self._node.extents(offset, length):
                    is_hole = extent.kind is not ExtentKind.DATA
                    start = runs.pop()[0] if runs and runs[-1][2] == is_hole else extent.offset
                    runs.append((start, extent.offset + extent.length, is_hole))
            finally:
                self._export.leave()
        except Exception:
            # Whatever it is, the read of it will say so.
            return [(offset, offset + length, False)]
        return runs

    def _read_into(self, offset: int, room: memoryview) -> int:
        try:
            self._export.enter()
            try:
                self._node.readinto(offset, room)
            finally:
                self._export.leave()
        except StillframeError as error:
            return nbd.error_number(error)
        except Exception:
            return self._defect()
        return 0

    def do(self, kind: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
        """Whatever else there is. :return: the reply."""
        error = self.refusal(kind, flags, offset, length)
        if not error:
            try:
                if kind == nbd.BLOCK_STATUS:
                    return nbd.status_chunk(cookie, self._status(flags, offset, length))
                self._change(kind, flags, offset, length)
            except StillframeError as failure:
                error = nbd.error_number(failure)
            except Exception:
                error = self._defect()
        if kind == nbd.BLOCK_STATUS and self._structured:
            return nbd.error_chunk(cookie, error, "the request cannot be done")
        return nbd.simple_reply(cookie, error)

    def _change(self, kind: int, flags: int, offset: int, length: int) -> None:
        """Long ones part by part, so that a hold of the export waits for one part alone."""
        for start, part in _parts(offset, length) if kind in (nbd.TRIM, nbd.WRITE_ZEROES) else ():
            self._export.enter()
            try:
                if kind == nbd.TRIM:
                    self._node.discard(start, part)
                else:
                    self._node.write_zeroes(start, part, unmap=not flags & nbd.FLAG_NO_HOLE)
            finally:
                self._export.leave()
        if kind == nbd.FLUSH or (flags & nbd.FLAG_FUA and self._export.writable):
            self._export.enter()
            try:
                self._node.flush()
            finally:
                self._export.leave()

    def _status(self, flags: int, offset: int, length: int) -> list[tuple[int, int]]:
        """Length and state of runs from the offset on; it may end early where they are many."""
        runs: list[tuple[int, int]] = []
        self._export.enter()
        try:
            for each in statuses(self._node, offset, length):
                state = (0 if each.data else nbd.STATE_HOLE) | (nbd.STATE_ZERO if each.zero else 0)
                if runs and runs[-1][1] == state:
                    runs[-1] = (runs[-1][0] + each.length, state)
                    continue
                if len(runs) == (1 if flags & nbd.FLAG_REQ_ONE else _MAXIMUM_EXTENTS):
                    break
                runs.append((each.length, state))
        finally:
            self._export.leave()
        return runs

    def _defect(self) -> int:
        _log.exception("Export '%s' failed by a defect of stillframe", self._export.id)
        return nbd.EIO


def _no_data(cookie: int) -> bytes:
    return nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, nbd.NONE_CHUNK, cookie, 0)


def _parts(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """A range cut where no cluster is."""
    end = offset + length
    while offset < end:
        part = min(end - offset, _CHANGED_AT_ONCE - offset % _CHANGED_AT_ONCE)
        yield offset, part
        offset += part
