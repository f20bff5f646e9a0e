"""The two directions of a monitor's connection, whatever carries them: sockets, or standard input and output."""

import asyncio
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import deque

_log = logging.getLogger(__name__)

# Small enough that the loop is free again within milliseconds, whatever is in it.
_PIECE = 4 << 10


class Stream(ABC):
    """A connection. `read` and `drain` wait; `close`, and the other end's going, end the wait."""

    @abstractmethod
    async def read(self) -> bytes:
        """Some bytes; none at the end of the connection."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Send, in the order of the calls; does not wait, and says nothing if the other end is gone."""

    @property
    @abstractmethod
    def unsent(self) -> int:
        """Bytes that `write` took and the other end has not."""

    @property
    @abstractmethod
    def taken(self) -> int:
        """Bytes that the other end has taken since the beginning."""

    @abstractmethod
    async def drain(self) -> None:
        """Wait until little is unsent."""

    @abstractmethod
    async def flush(self) -> None:
        """Wait until nothing is unsent."""

    @abstractmethod
    def close(self) -> None:
        """Give up what is unsent."""

    async def drain_or_close(self, seconds: float, who: str) -> None:
        """Wait until little is unsent; close if the other end takes nothing at all for `seconds`. :param who: for the log."""
        taken = -1
        while self.taken != taken:
            taken = self.taken
            try:
                async with asyncio.timeout(seconds):
                    await self.drain()
                return
            except TimeoutError:
                continue
        _log.warning("%s does not read: connection closed", who)
        self.close()

    async def finish(self, seconds: float, who: str) -> None:
        """Close once everything was taken, or `seconds` have passed. :param who: for the log."""
        try:
            async with asyncio.timeout(seconds):
                await self.flush()
        except TimeoutError:
            _log.warning("%s did not take its last messages", who)
        self.close()


class SocketStream(Stream):
    """A socket, as asyncio's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._written = 0

    async def read(self) -> bytes:
        try:
            return await self._reader.read(_PIECE)
        except OSError:
            return b""

    def write(self, data: bytes) -> None:
        if not self._writer.transport.is_closing():
            self._written += len(data)
            self._writer.write(data)

    @property
    def unsent(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    @property
    def taken(self) -> int:
        return self._written - self.unsent

    async def drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError:
            pass

    async def flush(self) -> None:
        self._writer.transport.set_write_buffer_limits(high=0)
        await self.drain()

    def close(self) -> None:
        self._writer.transport.abort()


class StdioStream(Stream):
    """A pair of descriptors that may be files, pipes or a terminal, each served by a thread.

    The descriptors are left as they are: others may share them, and would not expect them to stop blocking. A
    thread that waits in a read at the end of the process is no hindrance to it.
    """

    def __init__(self, read_from: int, write_to: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._read_from = read_from
        self._write_to = write_to
        self._incoming: asyncio.Queue[bytes] = asyncio.Queue()
        self._wanted = threading.Semaphore(0)
        self._outgoing: deque[bytes] = deque()
        self._unsent = 0
        self._taken = 0
        self._closed = False
        self._changed = threading.Condition()
        self._sent = asyncio.Event()
        for body, name in ((self._reading, "stdin"), (self._writing, "stdout")):
            threading.Thread(target=body, name=f"monitor-{name}", daemon=True).start()

    async def read(self) -> bytes:
        if self._closed:
            return b""
        self._wanted.release()
        return await self._incoming.get()

    def _reading(self) -> None:
        data = b"-"
        while data:
            self._wanted.acquire()
            try:
                data = b"" if self._closed else os.read(self._read_from, _PIECE)
            except OSError:
                data = b""
            try:
                self._loop.call_soon_threadsafe(self._incoming.put_nowait, data)
            except RuntimeError:
                return

    def write(self, data: bytes) -> None:
        with self._changed:
            if not self._closed:
                self._outgoing.append(data)
                self._unsent += len(data)
                self._sent.clear()
                self._changed.notify()

    def _writing(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outgoing or self._closed)
                if self._closed:
                    return
                data = self._outgoing.popleft()
            try:
                view = memoryview(data)
                while view:
                    # Not all at once: a blocking descriptor would say nothing of what is taken before its end.
                    count = os.write(self._write_to, view[:_PIECE])
                    self._taken += count
                    view = view[count:]
            except OSError:
                self._stop()
                return
            with self._changed:
                self._unsent -= len(data)
                done = not self._unsent
            if done:
                self._tell()

    def _tell(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._check)
        except RuntimeError:
            pass

    def _check(self) -> None:
        if not self._unsent or self._closed:
            self._sent.set()

    @property
    def unsent(self) -> int:
        return self._unsent

    @property
    def taken(self) -> int:
        return self._taken

    async def drain(self) -> None:
        if self._unsent > 16 * _PIECE:
            await self.flush()

    async def flush(self) -> None:
        if self._unsent and not self._closed:
            await self._sent.wait()

    def _stop(self) -> None:
        with self._changed:
            self._closed = True
            self._outgoing.clear()
            self._unsent = 0
            self._changed.notify()
        self._tell()

    def close(self) -> None:
        self._stop()
        self._incoming.put_nowait(b"")
        self._wanted.release()
