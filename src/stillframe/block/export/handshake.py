"""A new client's negotiation: which export, and which extensions of the protocol.

Options that are unknown are answered as unsupported, so a client of any age finds what both sides know. Whatever does not
follow the protocol ends the connection.
"""

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from stillframe.block.export import nbd
from stillframe.block.export.export import Export
from stillframe.block.export.nbd import ExportFlag, Info, Option, OptionReply
from stillframe.errors import PeerError

_MAXIMUM_OPTION = 64 << 10
_MAXIMUM_CLIENT_FLAGS = nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES


class Exports(Protocol):
    """Where a client's words are looked up."""

    def find(self, name: str) -> Export | None:
        """The export that clients call so."""
        ...

    def listed(self) -> Sequence[Export]:
        """All of them."""
        ...


@dataclass(frozen=True, slots=True)
class Agreed:
    """What a client and we have agreed on.

    :param structured: reads are answered in chunks. :param allocation: BLOCK_STATUS says what is allocated.
    """

    export: Export
    structured: bool
    allocation: bool


@dataclass(frozen=True, slots=True)
class _State:
    """:param context: the name of the export that base:allocation was chosen for."""

    no_zeroes: bool
    structured: bool = False
    context: bytes | None = None


class _Invalid(Exception):
    """An option's data is not what its kind prescribes."""


def negotiate(sock: socket.socket, exports: Exports, seconds: float) -> Agreed | None:
    """Come to terms with a client; None where it wants nothing more.

    :param sock: blocking; its timeout is set here and taken away at the end.
    :param seconds: how long all of it may take; infinite for as long as the client likes.
    :raise PeerError: the client does not speak the protocol, is gone, or took too long.
    """
    try:
        agreed = _negotiate(_Line(sock, time.monotonic() + seconds), exports)
    except OSError as error:
        raise PeerError(f"The client did not finish its negotiation: {error}") from error
    sock.settimeout(None)
    return agreed


class _Line:
    """A socket with a deadline for everything."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._set_timeout()
            part = self._sock.recv(length - len(data))
            if not part:
                raise PeerError("The client is gone")
            data += part
        return bytes(data)

    def write(self, data: bytes) -> None:
        self._set_timeout()
        self._sock.sendall(data)

    def _set_timeout(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        self._sock.settimeout(None if left == float("inf") else left)


def _negotiate(line: _Line, exports: Exports) -> Agreed | None:
    line.write(nbd.GREETING + struct.pack(">H", nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES))
    (flags,) = struct.unpack(">I", line.read(4))
    if flags & ~_MAXIMUM_CLIENT_FLAGS:
        raise PeerError(f"The client has flags that nobody offered: {flags:#x}")
    state = _State(no_zeroes=bool(flags & nbd.NO_ZEROES))
    while True:
        magic, option, length = nbd.OPTION_HEADER.unpack(line.read(nbd.OPTION_HEADER.size))
        if magic != nbd.OPTION_MAGIC or length > _MAXIMUM_OPTION:
            raise PeerError("The client does not speak the protocol")
        data = line.read(length)
        if option == Option.EXPORT_NAME:
            return _by_name_alone(line, exports, state, data)
        if option == Option.ABORT:
            line.write(nbd.option_reply(option, OptionReply.ACK))
            return None
        try:
            state, export, replies = _answer(exports, state, option, data)
        except _Invalid as error:
            line.write(nbd.option_reply(option, OptionReply.ERR_INVALID, str(error).encode()))
            continue
        line.write(b"".join(replies))
        if export is not None:
            return _agreed(export, state)


def _agreed(export: Export, state: _State) -> Agreed:
    chosen = state.context == export.name.encode("utf-8", "replace")
    return Agreed(export, state.structured, allocation=chosen and state.structured)


def _flags(export: Export, state: _State) -> ExportFlag:
    flags = ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH | ExportFlag.CAN_MULTI_CONN | ExportFlag.SEND_CACHE
    if export.writable:
        flags |= ExportFlag.SEND_FUA | ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES
    else:
        flags |= ExportFlag.READ_ONLY
    return flags | ExportFlag.SEND_DF if state.structured else flags


def _by_name_alone(line: _Line, exports: Exports, state: _State, name: bytes) -> Agreed:
    """The oldest way: it knows no error but the end of the connection."""
    export = _found(exports, name)
    if export is None:
        raise PeerError("The client asks for an export that there is not")
    line.write(struct.pack(">QH", export.node.size, _flags(export, state)))
    if not state.no_zeroes:
        line.write(bytes(124))
    return _agreed(export, state)


def _answer(
    exports: Exports, state: _State, option: int, data: bytes
) -> tuple[_State, Export | None, list[bytes]]:
    """What is agreed on from now on, the export with which transmission begins, and what to say.

    :raise _Invalid: bad data.
    """
    ack = nbd.option_reply(option, OptionReply.ACK)
    if option == Option.LIST:
        _refuse_data(data)
        return state, None, [*(_listed(each) for each in exports.listed()), ack]
    if option == Option.STRUCTURED_REPLY:
        _refuse_data(data)
        if state.structured:
            raise _Invalid("structured replies are agreed on already")
        return replace(state, structured=True), None, [ack]
    if option in (Option.INFO, Option.GO):
        return _inform(exports, state, option, data)
    if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        return _contexts(exports, state, option, data)
    if option == Option.STARTTLS:
        return state, None, [nbd.option_reply(option, OptionReply.ERR_POLICY, b"there is no TLS here")]
    said = b"option %d is not known here" % option
    return state, None, [nbd.option_reply(option, OptionReply.ERR_UNSUP, said)]


def _inform(
    exports: Exports, state: _State, option: int, data: bytes
) -> tuple[_State, Export | None, list[bytes]]:
    name, rest = _text(data)
    wanted = _numbers(rest)
    export = _found(exports, name)
    if export is None:
        return state, None, [_unknown(option, name)]
    said = [nbd.export_info(export.node.size, _flags(export, state)), nbd.block_size_info()]
    if Info.NAME in wanted:
        said.append(nbd.text_info(Info.NAME, export.name))
    if Info.DESCRIPTION in wanted and export.description:
        said.append(nbd.text_info(Info.DESCRIPTION, export.description))
    replies = [nbd.option_reply(option, OptionReply.INFO, each) for each in said]
    replies.append(nbd.option_reply(option, OptionReply.ACK))
    return state, export if option == Option.GO else None, replies


def _contexts(
    exports: Exports, state: _State, option: int, data: bytes
) -> tuple[_State, Export | None, list[bytes]]:
    if not state.structured:
        raise _Invalid("structured replies come first")
    name, rest = _text(data)
    queries = list(_queries(rest))
    if _found(exports, name) is None:
        return state, None, [_unknown(option, name)]
    is_chosen = nbd.ALLOCATION in queries
    if option == Option.LIST_META_CONTEXT:
        is_chosen = is_chosen or not queries or b"base:" in queries
    else:
        state = replace(state, context=name if is_chosen else None)
    replies = [nbd.option_reply(option, OptionReply.ACK)]
    if is_chosen:
        said = struct.pack(">I", nbd.ALLOCATION_ID) + nbd.ALLOCATION
        replies.insert(0, nbd.option_reply(option, OptionReply.META_CONTEXT, said))
    return state, None, replies


def _found(exports: Exports, name: bytes) -> Export | None:
    return exports.find(name.decode("utf-8", "replace"))


def _unknown(option: int, name: bytes) -> bytes:
    return nbd.option_reply(option, OptionReply.ERR_UNKNOWN, b"export '%b' is not there" % name[:256])


def _listed(export: Export) -> bytes:
    name = export.name.encode("utf-8", "replace")
    return nbd.option_reply(
        Option.LIST,
        OptionReply.SERVER,
        struct.pack(">I", len(name)) + name + export.description.encode("utf-8", "replace"),
    )


def _refuse_data(data: bytes) -> None:
    if data:
        raise _Invalid("this option has no data")


def _text(data: bytes) -> tuple[bytes, bytes]:
    """A length and as many bytes, and what follows."""
    if len(data) < 4:
        raise _Invalid("the data ends early")
    (length,) = struct.unpack_from(">I", data)
    if length > nbd.MAXIMUM_TEXT:
        raise _Invalid("a name is too long")
    if len(data) < 4 + length:
        raise _Invalid("the data ends early")
    return data[4 : 4 + length], data[4 + length :]


def _numbers(data: bytes) -> tuple[int, ...]:
    """A count and as many numbers, and nothing else."""
    if len(data) < 2:
        raise _Invalid("the data ends early")
    (count,) = struct.unpack_from(">H", data)
    if len(data) != 2 + 2 * count:
        raise _Invalid("the count and the length disagree")
    return struct.unpack_from(f">{count}H", data, 2)


def _queries(data: bytes) -> Iterator[bytes]:
    if len(data) < 4:
        raise _Invalid("the data ends early")
    (count,) = struct.unpack_from(">I", data)
    rest = data[4:]
    for _ in range(count):
        query, rest = _text(rest)
        yield query
    if rest:
        raise _Invalid("the count and the length disagree")
