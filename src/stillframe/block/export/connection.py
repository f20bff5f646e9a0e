"""One client, from its first byte to its last: whose turn it is to receive, and how each request is answered.

Threads of a connection take turns. The one whose turn it is receives requests and answers the quick ones itself, several
with one system call where they came together. Before it does something slow (a flush, a long transfer, whatever took long
the last time) it passes the turn on, so that others are received and answered meanwhile: replies overtake each other. There
are at most `MAXIMUM_IN_FLIGHT` threads; when all are busy nobody receives, and the client waits.

What a client can make us hold is a piece of data for each of these threads. Long transfers are made piece by piece, each of
them admitted to the export by itself once its data is here, so a client that stops in the middle holds nobody up.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from stillframe.block.export import nbd
from stillframe.block.export.handshake import Agreed, Exports, negotiate
from stillframe.block.export.incoming import Ended, Incoming
from stillframe.block.export.requests import Requests
from stillframe.errors import PeerError

_log = logging.getLogger(__name__)

MAXIMUM_IN_FLIGHT: Final = 16
PIECE: Final = 256 << 10
"""Bytes of a long transfer that are moved at once."""
_QUICK_LENGTH: Final = 64 << 10
_SLOW_SECONDS: Final = 0.001
_GATHERED_AT_MOST: Final = 128 << 10
_SOCKET_BUFFER: Final = 1 << 20
_REPLY_ROOM: Final = 64
_QUICK_TYPES: Final = frozenset({nbd.READ, nbd.WRITE, nbd.CACHE})


class Connection:
    """A client; `start` it, and `end` it if it does not end by itself.

    :param sock: connected, and this object's from now on.
    :param ended: called once, when no thread of it is left.
    :param handshake_seconds: how long the negotiation may take.
    """

    def __init__(
        self,
        sock: socket.socket,
        exports: Exports,
        ended: Callable[["Connection"], None],
        *,
        handshake_seconds: float,
    ) -> None:
        self._sock = sock
        self._exports = exports
        self._ended = ended
        self._handshake_seconds = handshake_seconds
        self._incoming = Incoming(sock)
        self._agreed: Agreed | None = None
        self._turn = threading.Lock()
        self._sending = threading.Lock()
        self._counts = threading.Lock()
        self._threads = 0
        self._waiting = 0
        self._is_over = False
        self._is_slow = dict.fromkeys(range(nbd.BLOCK_STATUS + 1), False)

    @property
    def agreed(self) -> Agreed | None:
        """What was negotiated; None before."""
        return self._agreed

    def start(self) -> None:
        """Serve the client from now on, on threads of the connection's own."""
        self._add_thread(self._begin)

    def end(self) -> None:
        """Have it end soon: nothing more is received or sent. Any thread may call it, and again."""
        self._is_over = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    # Threads.

    def _add_thread(self, target: Callable[[], None]) -> None:
        """:raise RuntimeError: the host has none left."""
        with self._counts:
            self._threads += 1
        try:
            threading.Thread(target=self._run, args=(target,), name="nbd", daemon=True).start()
        except RuntimeError:
            with self._counts:
                self._threads -= 1
            raise

    def _run(self, target: Callable[[], None]) -> None:
        try:
            target()
        except (Ended, PeerError) as error:
            _log.debug("A client of the NBD server: %s", error)
        except Exception:
            _log.exception("A connection of the NBD server failed by a defect of stillframe")
        self.end()
        with self._counts:
            self._threads -= 1
            is_last = not self._threads
        if is_last:
            self._sock.close()
            self._ended(self)

    def _begin(self) -> None:
        agreed = negotiate(self._sock, self._exports, self._handshake_seconds)
        if agreed is None:
            return
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        self._agreed = agreed
        if agreed.export.is_closed:
            # It was removed after it had been found, and whoever removed it has not seen us.
            return
        self._serve(Requests(agreed))

    def _serve(self, requests: Requests) -> None:
        room = _Room()
        while True:
            with self._counts:
                self._waiting += 1
            with self._turn:
                with self._counts:
                    self._waiting -= 1
                if self._is_over:
                    return
                slow = self._receive(requests, room)
                if slow is None:
                    self._is_over = True
                    return
                with self._counts:
                    is_needed = not self._waiting and self._threads < MAXIMUM_IN_FLIGHT
                if is_needed:
                    # Without one the client waits until this thread is done.
                    with contextlib.suppress(RuntimeError):
                        self._add_thread(lambda: self._serve(requests))
            slow()

    # Its turn.

    def _receive(self, requests: Requests, room: "_Room") -> Callable[[], None] | None:
        """Answer what is quick; what is slow, to be done by this thread without the turn, or None for the end."""
        incoming = self._incoming
        gathered = 0
        while True:
            if gathered and (gathered > _GATHERED_AT_MOST or not incoming.holds(nbd.REQUEST.size)):
                self.send(room.view[:gathered])
                gathered = 0
            magic, flags, kind, cookie, offset, length = incoming.request()
            if magic != nbd.REQUEST_MAGIC or (kind == nbd.WRITE and length > nbd.MAXIMUM_DATA):
                raise PeerError("A request is not of the protocol")
            if kind == nbd.DISC:
                return None
            may_be_quick = kind in _QUICK_TYPES and length <= _QUICK_LENGTH and not flags
            if may_be_quick and not self._is_slow[kind] and not requests.is_slow(kind):
                if kind == nbd.WRITE and gathered and not incoming.holds(length):
                    self.send(room.view[:gathered])
                    gathered = 0
                data = incoming.small_payload(length) if kind == nbd.WRITE else None
                view = room.at_least(gathered + length + _REPLY_ROOM, keep=gathered)
                started = time.monotonic()
                gathered += requests.answer(kind, cookie, offset, length, data, view[gathered:])
                if time.monotonic() - started > _SLOW_SECONDS:
                    self._is_slow[kind] = True
                continue
            if gathered:
                self.send(room.view[:gathered])
            return self._slow(requests, room, flags, kind, cookie, offset, length)

    def _slow(
        self, requests: Requests, room: "_Room", flags: int, kind: int, cookie: int, offset: int, length: int
    ) -> Callable[[], None]:
        """Receive what belongs to a request; the rest of it."""
        if kind != nbd.WRITE:
            return lambda: self._finish(requests, room, flags, kind, cookie, offset, length)
        error = requests.refusal(kind, flags, offset, length)
        while length > PIECE:
            data = room.at_least(PIECE)[:PIECE]
            self._incoming.payload(data)
            error = error or requests.write(offset, data, 0)
            offset, length = offset + PIECE, length - PIECE
        data = room.at_least(length)[:length]
        self._incoming.payload(data)
        return lambda: self._finish_write(requests, flags, cookie, offset, data, error)

    # Without it.

    def _finish_write(
        self, requests: Requests, flags: int, cookie: int, offset: int, data: memoryview, error: int
    ) -> None:
        started = time.monotonic()
        error = error or requests.write(offset, data, flags)
        if not flags:
            self._is_slow[nbd.WRITE] = time.monotonic() - started > _SLOW_SECONDS
        self.send(nbd.simple_reply(cookie, error))

    def _finish(
        self, requests: Requests, room: "_Room", flags: int, kind: int, cookie: int, offset: int, length: int
    ) -> None:
        if kind == nbd.READ:
            started = time.monotonic()
            requests.read(
                flags, cookie, offset, length, room.at_least(min(length, PIECE) + _REPLY_ROOM), self
            )
            self._is_slow[kind] = time.monotonic() - started > _SLOW_SECONDS
            return
        self.send(requests.do(kind, flags, cookie, offset, length))

    def send(self, data: bytes | memoryview) -> None:
        """Send something whole. Waits for the client to read; `end` ends that. :raise Ended: it is gone."""
        with self._sending:
            self.send_part(data)

    def send_part(self, data: bytes | memoryview) -> None:
        """`send` for who holds `sending`."""
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise Ended(str(error)) from error

    @property
    def sending(self) -> threading.Lock:
        """To be held while one reply is sent in several parts."""
        return self._sending


class _Room:
    """A thread's bytes: what is being written, or a reply; it grows to what was needed."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_QUICK_LENGTH))

    def at_least(self, length: int, *, keep: int = 0) -> memoryview:
        """:param keep: how many bytes at the beginning must stay."""
        if len(self.view) < length:
            grown = memoryview(bytearray(length * 2 if keep else length))
            grown[:keep] = self.view[:keep]
            self.view = grown
        return self.view
