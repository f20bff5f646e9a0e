"""Where a stream is written to, and where it is read from: bytes in order, gathered into large aligned
transfers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stillframe.errors import StreamCorrupt

CHUNK = 2 << 20
"""Bytes of one transfer, and its alignment: the largest cluster that qcow2 has."""

ROOM = 2 << 20
"""Bytes; the most that `StateSink.room` hands out at once."""


class StateSink:
    """Appends to a state area; made by `state_sink`."""

    def __init__(self, write_at: Callable[[int, memoryview], None], start: int) -> None:
        self._write_at = write_at
        self._buffer = memoryview(bytearray(CHUNK + ROOM))
        self._filled = 0
        self._written = start

    @property
    def offset(self) -> int:
        """Where in the stream the next byte will stand."""
        return self._written + self._filled

    def room(self, length: int) -> memoryview:
        """Append `length` bytes, `ROOM` at most, that the caller fills in before anything else is
        appended."""
        if length > ROOM:
            raise ValueError(f"{length} bytes do not fit into the room of a sink")
        while self._filled >= (chunk := CHUNK - self._written % CHUNK):
            self._transfer(chunk)
        start = self._filled
        self._filled += length
        return self._buffer[start : self._filled]

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        rest = memoryview(data).cast("B")
        while rest:
            part = rest[:ROOM]
            self.room(len(part))[:] = part
            rest = rest[len(part) :]

    def _transfer(self, length: int) -> None:
        self._write_at(self._written, self._buffer[:length])
        self._written += length
        self._filled -= length
        self._buffer[: self._filled] = bytes(self._buffer[length : length + self._filled])

    def _drain(self) -> None:
        while self._filled:
            self._transfer(min(CHUNK - self._written % CHUNK, self._filled))


@contextmanager
def state_sink(write_at: Callable[[int, memoryview], None], start: int = 0) -> Iterator[StateSink]:
    """A sink over `write_at(offset, data)`; at the end of the block everything has been handed to it, in
    order.

    :param start: the offset of the first byte.

    A block that raises leaves what was not yet handed over unwritten. `write_at` must not keep the view that
    it gets.
    """
    sink = StateSink(write_at, start)
    yield sink
    sink._drain()


class StateSource:
    """A stream to be read in order, from `read(offset, length)`. Nothing in it is trusted.

    :param size: bytes that the stream may have; what lies behind is never read.
    :param transfer: bytes of one, and its alignment.
    :param on_read: called with the offset before each transfer, some 500 times a GiB; raises to end the
        reading.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        size: int,
        *,
        transfer: int = CHUNK,
        on_read: Callable[[int], None] = lambda offset: None,
    ) -> None:
        self._read = read
        self._size = size
        self._transfer = transfer
        self._on_read = on_read
        self._data = memoryview(b"")
        self._start = 0
        self._at = 0
        self.section = "its header"
        """What is being read, for the words of an error."""

    @property
    def offset(self) -> int:
        """Where in the stream the next byte stands."""
        return self._start + self._at

    @property
    def remaining(self) -> int:
        """Bytes to the end."""
        return self._size - self.offset

    def corrupt(self, why: str) -> StreamCorrupt:
        """The error for damage at the present place."""
        return StreamCorrupt(f"{why} (in {self.section}, byte {self.offset} of the machine state)")

    def _fill(self, length: int) -> None:
        if length > self.remaining:
            raise self.corrupt("The machine state ends too early")
        start = self.offset
        self._on_read(start)
        data = self._read(start, min(max(length, self._transfer - start % self._transfer), self.remaining))
        self._data, self._start, self._at = memoryview(data), start, 0
        if len(data) < length:
            raise self.corrupt("The machine state ends too early")

    def seek(self, offset: int) -> None:
        """Go on from another place."""
        self._data, self._start, self._at = memoryview(b""), offset, 0

    def take(self, length: int) -> bytes:
        """The next `length` bytes. :raise StreamCorrupt: there are fewer."""
        if length > len(self._data) - self._at:
            self._fill(length)
        taken = bytes(self._data[self._at : self._at + length])
        self._at += length
        return taken

    def window(self, minimum: int) -> memoryview:
        """What lies ahead and is at hand without a further transfer, at least `minimum` bytes or all that are
        left."""
        if len(self._data) - self._at < minimum:
            ahead = min(minimum, self.remaining)
            if ahead > len(self._data) - self._at:
                self._fill(ahead)
        return self._data[self._at :]

    def skip(self, length: int) -> None:
        """Pass over bytes that `window` showed."""
        self._at += length

    def u8(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def u32(self) -> int:
        """The next four bytes."""
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        """The next eight bytes."""
        return int.from_bytes(self.take(8), "big")

    def text(self, length: int, what: str) -> str:
        """A name. :raise StreamCorrupt: it is not UTF-8."""
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.corrupt(f"The name of {what} is not text") from None
