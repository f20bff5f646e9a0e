"""The part of a postcopy source that goes on beside the guest: it sends QEMU the pages that it asks for, and all others meanwhile.

    QEMU ──REQ_PAGES──▶ server ──PARTs──▶ QEMU            `u16 type, u16 n, bytes[n]` comes back from it
                         ▲ │
         a message: step │ ▼ news, as JSON
                       the source (postcopy.py)

It runs in a forked child where it can, else in a thread: whoever waits for a page may hold the interpreter's lock of our process,
directly or through a disk of ours. It holds no lock and shares nothing but the connection. Between two pieces of the background it
looks for what is asked for. It ends with us, however we die.

The background goes by the blocks' order in windows, and in the file's order within them. Memory: a byte a page of the guest, and
a section of half a mebibyte with what is read for it, two and a half at most.
"""

import json
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.errors import Failed, ImageCorrupt, IOFailed, StillframeError, StreamCorrupt
from stillframe.machine.engines.qemu.stored_pages import DATA_PAGES, StoredPages
from stillframe.vmstate import layout
from stillframe.vmstate.ram import EOS, PAGE_SIZE, Addresses, RamBlock

STEP = 2048
"""Pages of the background that one message of the source allows; zero pages count as others do."""

_SHUT, _PONG, _REQ_PAGES_ID, _REQ_PAGES = range(1, 5)
_AROUND = 64
"""Pages that come with one that is waited for: those of its aligned neighbourhood."""
_HEAD_START = 0.3
"""Seconds from its beginning in which the background gives way to a guest that asks for one page after the other."""
_QUIET_MS = 2
"""So long after a request it does, in these seconds: the next one would wait for what QEMU has been sent meanwhile."""
_WINDOW = 8192
"""Pages of the background that are put in the file's order."""


class QemuGone(Failed):
    """QEMU closed the connection, or said that it gives up; what that means depends on how far it was."""


_ERRORS = {kind.__name__: kind for kind in (Failed, QemuGone, StreamCorrupt, ImageCorrupt)}
"""By name; any other is told of as `Failed`."""


@dataclass(frozen=True, slots=True)
class News:
    """What the server has to tell.

    :param pong: the number of a PING that QEMU answered. :param stored: bytes sent since the last news, zero pages not counted.
    :param requested: pages so far that somebody waited for. :param ended: QEMU has all memory. :param error: the server's end.
    """

    pong: int | None = None
    stored: int = 0
    requested: int = 0
    ended: bool = False
    error: StillframeError | None = None

    def pack(self) -> bytes:
        """One message."""
        error = self.error
        said: dict[str, Any] = {"pong": self.pong, "stored": self.stored}
        said |= {"requested": self.requested, "ended": self.ended}
        if error is not None:
            number = error.errno if isinstance(error, IOFailed) else None
            said["error"] = [type(error).__name__, number, error.message, error.left]
        return json.dumps(said).encode()

    @classmethod
    def unpack(cls, message: bytes) -> "News":
        """The opposite of `pack`."""
        said = json.loads(message)
        if "error" in said:
            kind, number, text, left = said["error"]
            if number is not None:
                said["error"] = IOFailed(text, errno=number, left=left)
            else:
                said["error"] = _ERRORS.get(kind, Failed)(text, left=left)
        return cls(**said)


@dataclass(frozen=True, slots=True)
class _Lazy:
    """A block whose pages come while the guest runs. :param sent: by page number."""

    block: RamBlock
    sent: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Request:
    """Pages that somebody in QEMU waits for. :param first: the number of the first. :param count: of pages."""

    lazy: _Lazy
    first: int
    count: int


class PageServer:
    """See the module's text.

    :param connection: to QEMU, which has got the package. :param source: a SOCK_SEQPACKET socket to the source.
    :param blocks: of which no page has been sent. :param pages: of the stream.
    """

    def __init__(
        self,
        connection: socket.socket,
        source: socket.socket,
        section_id: int,
        blocks: Sequence[RamBlock],
        pages: StoredPages,
    ) -> None:
        self._connection, self._source = connection, source
        self._section_id = section_id
        self._pages = pages
        self._lazy = {
            block.name: _Lazy(block, np.zeros(block.length // PAGE_SIZE, np.bool_)) for block in blocks
        }
        self._left = sum(len(lazy.sent) for lazy in self._lazy.values())
        self._allowed = self._untold = self._stored = self._requested = 0
        self._began = self._asked = 0.0
        self._background = self._portions()
        self._heard = b""
        self._asked_block: _Lazy | None = None
        self._wanted: deque[_Request] = deque()

    def serve(self) -> None:
        """Until QEMU has all memory, the source ends it, or something is wrong, which the source is told."""
        try:
            if self._serve():
                self._tell(ended=True)
        except StillframeError as error:
            self._tell(error=error)
        except OSError as error:
            number = error.errno or 0
            self._tell(
                error=IOFailed(f"Could not read the guest's memory: {os.strerror(number)}", errno=number)
            )
        except Exception as error:
            self._tell(error=Failed(f"The sender of the guest's memory has failed: {error!r}"))
        finally:
            self._source.close()

    def _tell(
        self, *, pong: int | None = None, ended: bool = False, error: StillframeError | None = None
    ) -> None:
        news = News(pong, self._stored, self._requested, ended, error)
        self._stored = 0
        try:
            self._source.sendall(news.pack())
        except OSError:
            # It is gone; the next look at its socket ends us, too.
            pass

    def _serve(self) -> bool:
        """:return: whether QEMU has all memory; else the source is gone."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._source, select.POLLIN)
        ended = False
        while True:
            busy = self._allowed > 0 and not ended
            patience = 0 if self._wanted else self._hold() if busy else None
            heard = poll.poll(patience)
            for descriptor, _ in heard:
                if descriptor == self._source.fileno():
                    if not self._source.recv(16):
                        return False
                    self._allowed += STEP
                    self._began = self._began or time.monotonic()
                elif self._hear():
                    return True
            if self._wanted:
                self._answer(self._wanted.popleft())
            elif busy and not (patience and heard):
                ended = not self._portion()

    def _portion(self) -> bool:
        """A piece of the background. :return: whether there was one; else QEMU has been told that this was all."""
        portion = next(self._background, None)
        if portion is None:
            end = layout.mark(layout.END, self._section_id) + struct.pack(">Q", EOS)
            end += layout.mark(layout.FOOTER, self._section_id)
            self._send(end + bytes((layout.EOF,)))
            return False
        lazy, pages = portion
        self._send_pages(lazy, pages[~lazy.sent[pages]])
        self._allowed -= len(pages)
        self._untold += len(pages)
        if self._untold >= STEP:
            self._untold -= STEP
            self._tell()
        return True

    def _hold(self) -> int:
        """Milliseconds for which the background gives way to what may be asked for."""
        now = time.monotonic()
        gives_way = now < min(self._began + _HEAD_START, self._asked + _QUIET_MS / 1000)
        return _QUIET_MS if gives_way else 0

    def _portions(self) -> Iterator[tuple[_Lazy, Addresses]]:
        for lazy in self._lazy.values():
            for start in range(0, len(lazy.sent), _WINDOW):
                window = np.arange(start, min(start + _WINDOW, len(lazy.sent)))
                for pages in self._pages.pieces(lazy.block, window):
                    yield lazy, pages

    def _answer(self, request: _Request) -> None:
        """What somebody waits for comes first, and its neighbourhood with it."""
        lazy, first, end = request.lazy, request.first, request.first + request.count
        asked = np.arange(first, end)
        asked = asked[~lazy.sent[asked]]
        if not len(asked):
            return
        self._requested += len(asked)
        self._asked = time.monotonic()
        for at in range(0, len(asked), DATA_PAGES):
            self._send_pages(lazy, asked[at : at + DATA_PAGES])
        start = first - first % _AROUND
        around = np.arange(start, min(start + _AROUND, len(lazy.sent)))
        self._send_pages(lazy, around[~lazy.sent[around]])

    def _send_pages(self, lazy: _Lazy, pages: Addresses) -> None:
        """:param pages: none of which has been sent."""
        if not len(pages):
            return
        self._send(self._pages.section(lazy.block, pages))
        lazy.sent[pages] = True
        self._left -= len(pages)
        self._stored += self._pages.stored(lazy.block, pages) * PAGE_SIZE

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise QemuGone("QEMU closed the connection") from error

    def _hear(self) -> bool:
        """Take in what QEMU says. :return: whether that is the end. :raise Failed: it is gone, or says what it must not."""
        try:
            data = self._connection.recv(1 << 16)
        except OSError as error:
            raise QemuGone("QEMU closed the connection") from error
        if not data:
            raise QemuGone("QEMU closed the connection")
        self._heard += data
        while len(self._heard) >= 4:
            kind, length = struct.unpack_from(">HH", self._heard)
            if len(self._heard) < 4 + length:
                break
            body, self._heard = self._heard[4 : 4 + length], self._heard[4 + length :]
            if self._message(kind, body):
                return True
        return False

    def _message(self, kind: int, body: bytes) -> bool:
        if kind == _SHUT and len(body) == 4:
            if any(body) or self._left:
                raise QemuGone("QEMU gave up")
            return True
        if kind == _PONG and len(body) == 4:
            self._tell(pong=int.from_bytes(body, "big"))
        elif kind == _REQ_PAGES and len(body) == 12:
            self._request(*struct.unpack(">QI", body))
        elif kind == _REQ_PAGES_ID and len(body) > 13 and body[12] == len(body) - 13:
            self._asked_block = self._lazy.get(body[13:].decode("utf-8", "replace"))
            self._request(*struct.unpack_from(">QI", body))
        else:
            raise Failed(f"QEMU answered with a message that is not known (type {kind}, {len(body)} bytes)")
        return False

    def _request(self, start: int, length: int) -> None:
        lazy = self._asked_block
        if lazy is None or start % PAGE_SIZE or length % PAGE_SIZE or start + length > lazy.block.length:
            where = f"'{lazy.block.name}'" if lazy else "a block that has none missing"
            raise Failed(f"QEMU asked for memory that is not there: {length} bytes at {start:#x} of {where}")
        self._wanted.append(_Request(lazy, start // PAGE_SIZE, length // PAGE_SIZE))
