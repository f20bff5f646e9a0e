"""A guest that runs in a fresh QEMU before its memory is there: we are the source of a postcopy migration that never was.

    we                                                                        QEMU, with -incoming defer and postcopy-ram
    header, CONFIGURATION                          verbatim                ─▶
    OPEN_RETURN_PATH, PING, ADVISE                                         ─▶
    START of RAM                                   verbatim                ─▶
    PARTs                                          small blocks, as a whole ─▶
    RAM_DISCARD                                    of every other block    ─▶
    PACKAGED { LISTEN, devices, PING, RUN }        devices verbatim        ─▶  loads the devices, answers PONG, runs the guest
                                                                           ◀─  REQ_PAGES: a page that somebody waits for
    PARTs                                          those, then all others  ─▶
    END of RAM, EOF                                                        ─▶
                                                                           ◀─  SHUT: all is there

A command is `08 u16 command, u16 n, bytes[n]`; what comes back is `u16 type, u16 n, bytes[n]`. Without a RAM_DISCARD QEMU waits for
ever; a page that comes twice is an error there. ADVISE names the size of all pages: a QEMU whose memory is in huge pages refuses.

What follows the package is the work of page_server.py.
"""

import mmap
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection

import numpy as np

from stillframe.errors import Failed, StillframeError, StreamCorrupt, Unsupported
from stillframe.machine.child import fork_child, wait_for_child
from stillframe.machine.engines.qemu.page_server import News, PageServer, QemuGone
from stillframe.machine.engines.qemu.stored_pages import StoredPages
from stillframe.vmstate import layout
from stillframe.vmstate.page_index import PageIndex
from stillframe.vmstate.ram import PAGE_SIZE
from stillframe.vmstate.relayed import RelayedHead

_OPEN_RETURN_PATH, _PING, _ADVISE, _LISTEN, _RUN, _RAM_DISCARD, _PACKAGED = range(1, 8)
_CONNECTED_PING, _LOADED_PING = 1, 3

_SMALL = 1 << 20
"""Bytes; smaller blocks, ROMs and tables, are sent before the guest runs."""
_SEND_BUFFER = 64 << 10
"""Bytes that wait in the socket, before a page that somebody waits for."""
_STEPS_AHEAD = 2
_MESSAGE = 1 << 16


class PostcopySource:
    """The other end of one incoming migration; `close` it whatever comes. One thread at a time, but for `close`.

    :param connection: a stream socket on which QEMU listens; it is ours from now on.
    :param devices: the sections, as `RelayedTail` has them.
    :param index: of the stream that `read` reads: from an offset, so many bytes.
    :param descriptors: those that `read` needs. Then the server of the pages is a forked child, in which `read` takes no lock that
        another thread may have held. None: it is a thread, which everybody who holds the interpreter's lock holds up.
    :raise StreamCorrupt: the index is of other blocks. :raise Unsupported: a host whose pages are not of 4096 bytes.
    """

    def __init__(
        self,
        connection: socket.socket,
        head: RelayedHead,
        devices: bytes,
        index: PageIndex,
        read: Callable[[int, int], bytes],
        descriptors: Collection[int] | None = None,
    ) -> None:
        if index.blocks != head.blocks:
            raise StreamCorrupt("The page index is of other memory than its stream")
        if mmap.PAGESIZE != PAGE_SIZE:
            raise Unsupported(
                f"Memory cannot come while the guest runs: this host has pages of {mmap.PAGESIZE} bytes"
            )
        connection.setblocking(True)
        self._connection = connection
        self._head, self._devices = head, devices
        self._pages = StoredPages(head.ram_section_id, index, read)
        self._descriptors = descriptors
        largest = max(head.blocks, key=lambda block: block.length, default=None)
        self._small = [block for block in head.blocks if block.length < _SMALL and block is not largest]
        self._lazy = [block for block in head.blocks if block not in self._small]
        self.bytes_to_come = sum(
            int((index.offsets[block.name] >= 0).sum()) * PAGE_SIZE for block in self._lazy
        )
        """Of pages that are not zero, in the blocks that come while the guest runs."""
        self.requested = 0
        """Pages that somebody in QEMU waited for, as far as `fill` has been told."""
        self._server, self._servers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = -1
        self._thread: threading.Thread | None = None
        self._pongs: set[int] = set()
        self._came = 0
        self._error: StillframeError | None = None
        self._closed = False

    def offer(self) -> None:
        """Send all that QEMU needs to run the guest; what it asks for is served from here on.

        Waits for QEMU to read it; its end of the connection, or `close` by another thread, ends the wait.

        :raise Failed: QEMU closed the connection, or no process can be started. :raise StreamCorrupt: the index is wrong. What
            `read` raises is passed on.
        """
        head = self._head
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        out = bytearray(head.head)
        out += _command(_OPEN_RETURN_PATH) + _command(_PING, struct.pack(">I", _CONNECTED_PING))
        out += _command(_ADVISE, struct.pack(">QQ", PAGE_SIZE, PAGE_SIZE)) + head.ram_start
        for block in self._small:
            for pages in self._pages.pieces(block, np.arange(block.length // PAGE_SIZE)):
                out += self._pages.section(block, pages)
        for block in self._lazy:
            named = block.name.encode()
            whole = struct.pack(">QQ", 0, block.length)
            out += _command(_RAM_DISCARD, bytes((0, len(named))) + named + b"\0" + whole)
        package = _command(_LISTEN) + self._devices
        package += _command(_PING, struct.pack(">I", _LOADED_PING)) + _command(_RUN)
        out += _command(_PACKAGED, struct.pack(">I", len(package))) + package
        # Before QEMU has anything; and it asks for nothing before it has all of this.
        self._start()
        try:
            self._connection.sendall(out)
        except OSError as error:
            raise self._gone() from error

    def _start(self) -> None:
        server = PageServer(
            self._connection, self._servers_end, self._head.ram_section_id, self._lazy, self._pages
        )
        if self._descriptors is None:
            self._thread = threading.Thread(target=server.serve, name="postcopy", daemon=True)
            self._thread.start()
            return
        kept = (self._connection.fileno(), self._servers_end.fileno(), *self._descriptors)
        try:
            self._pid = fork_child(server.serve, kept)
        except OSError as error:
            raise Failed(
                f"Could not start the process that sends the guest's memory: {error.strerror}"
            ) from error
        # The child alone has it now, so that its end is seen.
        self._servers_end.close()

    def wait_until_loaded(self, timeout: float) -> None:
        """Until QEMU has loaded the devices; next it runs the guest, unless it was started with -S.

        :param timeout: seconds. Besides, QEMU's end of the connection and `close` end the wait.
        :raise Failed: QEMU ended the load, which is how it refuses a state (its standard error says why), or the time is up.
            What `read` raised, when QEMU needed memory to load the devices, is raised here.
        """
        deadline = time.monotonic() + timeout
        while _LOADED_PING not in self._pongs:
            if self._hear(max(0.001, deadline - time.monotonic())) is None:
                what = "" if _CONNECTED_PING in self._pongs else ", and read nothing"
                raise Failed(f"QEMU has not loaded the devices within {timeout:g} s{what}")

    def fill(self, progress: Callable[[int], None], checkpoint: Callable[[], None]) -> None:
        """Have all memory sent that nobody asked for; return when QEMU has all. `close` and QEMU's end of the connection end it.

        :param progress: told of bytes that were sent since its last call, zero pages not counted: `bytes_to_come` in all.
        :param checkpoint: called every 8 MiB; while it does not return, at most 16 more come but for those that are asked for.
            Raises to end the fill: what is asked for is served until `close`.
        :raise Failed: QEMU went away, or does not take the memory. The guest stands still at the next page that is missing.
            What `read` raised is raised here.
        """
        checkpoint()
        told, steps = 0, _STEPS_AHEAD
        while True:
            for _ in range(steps):
                self._allow()
            news = self._hear(None)
            if self._came > told:
                progress(self._came - told)
                told = self._came
            if news is None or news.ended:
                return
            steps = int(news.pong is None)
            checkpoint()

    def _allow(self) -> None:
        try:
            self._server.sendall(b"\0")
        except OSError:
            # It has ended, and said why: the next news tells.
            pass

    def _hear(self, timeout: float | None) -> News | None:
        """The next news. :param timeout: seconds; None: the server's end alone ends the wait. :return: None when the time is up."""
        if self._error is not None:
            raise self._error
        try:
            self._server.settimeout(timeout)
            message = self._received()
        except TimeoutError:
            return None
        except OSError:
            message = b""
        if not message:
            raise self._ended(Failed("The process that sends the guest's memory is gone"))
        news = News.unpack(message)
        self._came += news.stored
        self.requested = news.requested
        if news.pong is not None:
            self._pongs.add(news.pong)
        if news.error is not None:
            error = self._gone() if isinstance(news.error, QemuGone) else news.error
            if _LOADED_PING in self._pongs:
                error.left = "The guest cannot go on: memory of it is missing"
            raise self._ended(error)
        return news

    def _received(self) -> bytes:
        try:
            return self._server.recv(_MESSAGE)
        except ConnectionResetError:
            # It ended before it had read what we allowed it: that is told once, and what it said last is still there.
            return self._server.recv(_MESSAGE)

    def _ended(self, error: StillframeError) -> StillframeError:
        self._error = error
        return error

    def _gone(self) -> Failed:
        """The error for a QEMU that ends the load before its time."""
        if _LOADED_PING in self._pongs:
            return Failed(
                f"QEMU ended the load before it had the guest's memory ({self._came >> 20} MiB of "
                f"{self.bytes_to_come >> 20} were sent)"
            )
        read = (
            "loaded the devices"
            if _CONNECTED_PING in self._pongs
            else "read the beginning of the machine state"
        )
        return Failed(f"QEMU ended the load before it had {read}")

    def close(self) -> None:
        """End the connection; a second time, nothing. A read that is under way is waited for.

        Where memory is missing the guest stands still for good, at the next page that it needs: end its QEMU.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._server.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()
        if self._pid > 0:
            wait_for_child(self._pid)
        for each in (self._server, self._servers_end, self._connection):
            each.close()


def _command(command: int, data: bytes = b"") -> bytes:
    return struct.pack(">BHH", layout.COMMAND, command, len(data)) + data
