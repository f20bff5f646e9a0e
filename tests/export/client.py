"""An NBD client for tests: it says what it is told to, in the protocol or not."""

import socket
import struct
from pathlib import Path
from typing import Any, Self

from stillframe.block.export import nbd

PATIENCE = 20.0
"""Seconds after which a test gives up on the server; nothing is measured with it."""


class Client:
    """Connected, greeted; `go` begins transmission."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        assert self.read(18) == nbd.GREETING + b"\0\3"
        self.send(struct.pack(">I", 3))
        self.structured = False
        self._cookie = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            assert part, f"the connection ended after {data!r}"
            data += part
        return data

    @property
    def is_ended(self) -> bool:
        """Waits for the server to send something or to end the connection: whether it is the end."""
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """All replies: type and data."""
        self.send(nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, option, len(data)) + data)
        replies = []
        while True:
            magic, about, kind, length = nbd.OPTION_REPLY.unpack(self.read(nbd.OPTION_REPLY.size))
            assert (magic, about) == (nbd.OPTION_REPLY_MAGIC, option)
            replies.append((kind, self.read(length)))
            if kind == nbd.OptionReply.ACK or kind >> 31:
                return replies

    def go(self, name: str = "", *, structured: bool = True, allocation: bool = True) -> Self:
        if structured:
            assert self.option(nbd.Option.STRUCTURED_REPLY) == [(nbd.OptionReply.ACK, b"")]
            if allocation:
                self.option(
                    nbd.Option.SET_META_CONTEXT, text(name) + struct.pack(">I", 1) + text(nbd.ALLOCATION)
                )
        self.structured = structured
        assert self.option(nbd.Option.GO, text(name) + b"\0\0")[-1][0] == nbd.OptionReply.ACK
        return self

    def ask(self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> int:
        """Send a request. :return: its cookie."""
        self._cookie += 1
        self.send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, self._cookie, offset, length) + data)
        return self._cookie

    def reply(self, length: int = 0) -> tuple[int, int, Any]:
        """Cookie, error, and what came: bytes read with their places, or runs.

        :param length: of the data behind a simple reply without an error.
        """
        found: list[Any] = []
        while True:
            (magic,) = struct.unpack(">I", self.read(4))
            if magic == nbd.SIMPLE_REPLY_MAGIC:
                error, cookie = struct.unpack(">IQ", self.read(12))
                return cookie, error, b"" if error else self.read(length)
            assert magic == nbd.CHUNK_MAGIC
            flags, kind, cookie, size = struct.unpack(">HHQI", self.read(16))
            payload = self.read(size)
            if kind == nbd.ERROR_CHUNK:
                return cookie, struct.unpack_from(">I", payload)[0], found
            if kind == nbd.OFFSET_DATA:
                found.append((struct.unpack_from(">Q", payload)[0], payload[8:]))
            elif kind == nbd.OFFSET_HOLE:
                offset, size = struct.unpack(">QI", payload)
                found.append((offset, size))
            elif kind == nbd.BLOCK_STATUS_CHUNK:
                numbers = struct.unpack(f">{size // 4}I", payload)
                found = list(zip(numbers[1::2], numbers[2::2], strict=True))
            if flags & nbd.CHUNK_DONE:
                return cookie, 0, found

    def do(self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> Any:
        """A request and its reply: the error, or what came."""
        cookie = self.ask(kind, offset, length, flags=flags, data=data)
        simple = kind == nbd.READ and not self.structured
        about, error, found = self.reply(length if simple else 0)
        assert about == cookie
        return error or found


def text(value: str | bytes) -> bytes:
    """With its length before it."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(data)) + data
