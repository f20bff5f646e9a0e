"""What a client sends, in pieces of the sizes that the protocol asks for, with as few system calls as the data allows."""

import socket
from typing import Final, cast

from stillframe.block.export.nbd import REQUEST

_ROOM: Final = 256 << 10
Request = tuple[int, int, int, int, int, int]
"""Magic, flags, type, cookie, offset, length."""


class Ended(Exception):
    """The client is gone, or the connection was shut down."""


class Incoming:
    """Of one connection; one thread at a time uses it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._room = memoryview(bytearray(_ROOM))
        self._start = self._end = 0

    def holds(self, length: int) -> bool:
        """Whether so many bytes are here already, so that nothing would be waited for."""
        return self._end - self._start >= length

    def request(self) -> Request:
        """The next request's header; waits for the client. :raise Ended: there is none."""
        if self._end - self._start < REQUEST.size:
            self._receive(REQUEST.size)
        start = self._start
        self._start = start + REQUEST.size
        return cast(Request, REQUEST.unpack_from(self._room, start))

    def payload(self, into: memoryview) -> None:
        """Fill `into`; waits for the client. :raise Ended: it does not send so much."""
        here = min(len(into), self._end - self._start)
        into[:here] = self._room[self._start : self._start + here]
        self._start += here
        while here < len(into):
            here += self._receive_into(into[here:])

    def small_payload(self, length: int) -> memoryview:
        """As many bytes, good until the next call of anything here. :param length: at most a quarter of the room."""
        if self._end - self._start < length:
            self._receive(length)
        start = self._start
        self._start = start + length
        return self._room[start : start + length]

    def _receive(self, length: int) -> None:
        """Until so many bytes are here, in one piece."""
        if self._start + length > _ROOM or self._start == self._end:
            rest = bytes(self._room[self._start : self._end])
            self._room[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        while self._end - self._start < length:
            self._end += self._receive_into(self._room[self._end :])

    def _receive_into(self, room: memoryview) -> int:
        try:
            count = self._sock.recv_into(room)
        except OSError as error:
            raise Ended(str(error)) from error
        if not count:
            raise Ended("the client closed the connection")
        return count
