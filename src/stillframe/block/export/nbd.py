"""The NBD protocol as bytes: fixed newstyle negotiation, requests, simple and structured replies. All numbers are big-endian.

    negotiation    server   "NBDMAGIC" "IHAVEOPT" u16 flags
                   client   u32 flags
                   client   "IHAVEOPT" u32 option, u32 length | data
                   server   u64 magic, u32 option, u32 type, u32 length | data           any number, the last an ACK or an error
    EXPORT_NAME    client   ... data: the export's name
                   server   u64 size, u16 flags [124 zeroes]                             and transmission begins, as after GO
    GO, INFO       data     u32 length, name | u16 count, count x u16 information
                   server   INFO   u16 EXPORT, u64 size, u16 flags
                            INFO   u16 BLOCK_SIZE, u32 minimum, u32 preferred, u32 maximum
                            INFO   u16 NAME or DESCRIPTION, text
    LIST           server   SERVER u32 length, name | description
    META_CONTEXT   data     u32 length, name | u32 count, count x (u32 length, text)
                   server   META_CONTEXT u32 id, text

    request        u32 magic, u16 flags, u16 type, u64 cookie, u64 offset, u32 length | what a write writes
    simple reply   u32 magic, u32 error, u64 cookie | what a read read, without an error
    chunk          u32 magic, u16 flags, u16 type, u64 cookie, u32 length | payload; the last one of a reply has DONE
      OFFSET_DATA    u64 offset | data
      OFFSET_HOLE    u64 offset, u32 length
      BLOCK_STATUS   u32 context id | u32 length, u32 status, ...
      ERROR          u32 error, u16 length | text

A reply is found by its request's cookie, not by its place: requests may be answered in any order. Source: the NBD project's
doc/proto.md.
"""

import errno
import struct
from enum import IntEnum, IntFlag
from typing import Final

from stillframe.errors import InvalidRequest, IOFailed, NoSpace, Refused, StillframeError, Unsupported

GREETING: Final = b"NBDMAGICIHAVEOPT"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_HEADER: Final = struct.Struct(">8sII")
OPTION_REPLY: Final = struct.Struct(">QIII")
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST: Final = struct.Struct(">IHHQQI")
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK: Final = struct.Struct(">IHHQI")
CHUNK_MAGIC: Final = 0x668E33EF
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")
"""A chunk's header and the offset that an OFFSET_DATA begins with."""
HOLE_CHUNK: Final = struct.Struct(">IHHQIQI")
CHUNK_DONE: Final = 1

FIXED_NEWSTYLE: Final = 1
NO_ZEROES: Final = 2

ALLOCATION: Final = b"base:allocation"
ALLOCATION_ID: Final = 0
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

MINIMUM_BLOCK: Final = 1
PREFERRED_BLOCK: Final = 4096
MAXIMUM_DATA: Final = 32 << 20
"""Bytes of one read or write; what every client may expect to be able to ask for."""
MAXIMUM_TEXT: Final = 4096
"""Bytes of a name or a description."""


class Option(IntEnum):
    """What a client asks for while it negotiates."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """What a server says to that."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_UNKNOWN = 0x80000006


class Info(IntEnum):
    """Kinds of information on an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class ExportFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10


# Plain numbers: they are compared at every request.
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FLAG_FUA, FLAG_NO_HOLE, FLAG_DF, FLAG_REQ_ONE = 1, 2, 4, 8
ALLOWED_FLAGS: Final = {
    READ: FLAG_DF | FLAG_FUA,
    WRITE: FLAG_FUA,
    FLUSH: FLAG_FUA,
    TRIM: FLAG_FUA,
    CACHE: FLAG_FUA,
    WRITE_ZEROES: FLAG_FUA | FLAG_NO_HOLE,
    BLOCK_STATUS: FLAG_REQ_ONE | FLAG_FUA,
}
"""By command. FUA is allowed on all, also where it means nothing."""

NONE_CHUNK, OFFSET_DATA, OFFSET_HOLE, BLOCK_STATUS_CHUNK, ERROR_CHUNK = 0, 1, 2, 5, 0x8001

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
_ERRNOS: Final = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.ENOMEM: ENOMEM,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
}


class ShuttingDown(Refused):
    """The export is being removed: the request was not begun."""


def error_number(error: StillframeError) -> int:
    """What the protocol calls an error of a node."""
    if isinstance(error, ShuttingDown):
        return ESHUTDOWN
    if isinstance(error, NoSpace):
        return ENOSPC
    if isinstance(error, IOFailed):
        return _ERRNOS.get(error.errno, EIO)
    if isinstance(error, InvalidRequest):
        return EINVAL
    if isinstance(error, Unsupported):
        return ENOTSUP
    return EIO


def option_reply(option: int, kind: OptionReply, data: bytes = b"") -> bytes:
    """One reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def export_info(size: int, flags: ExportFlag) -> bytes:
    """The information EXPORT. :param size: bytes."""
    return struct.pack(">HQH", Info.EXPORT, size, flags)


def block_size_info() -> bytes:
    """The information BLOCK_SIZE: a request may begin and end anywhere."""
    return struct.pack(">HIII", Info.BLOCK_SIZE, MINIMUM_BLOCK, PREFERRED_BLOCK, MAXIMUM_DATA)


def text_info(kind: Info, text: str) -> bytes:
    """The informations NAME and DESCRIPTION."""
    return struct.pack(">H", kind) + text.encode("utf-8", "replace")


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A reply without data."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def error_chunk(cookie: int, error: int, text: str) -> bytes:
    """The end of a structured reply that failed. :param text: for people; cut off where it is too long."""
    said = text.encode("utf-8", "replace")[:MAXIMUM_TEXT]
    return CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, ERROR_CHUNK, cookie, 6 + len(said)) + (
        struct.pack(">IH", error, len(said)) + said
    )


def status_chunk(cookie: int, runs: "list[tuple[int, int]]") -> bytes:
    """The reply to BLOCK_STATUS. :param runs: length in bytes and STATE_ flags of each."""
    numbers = [number for run in runs for number in run]
    payload = struct.pack(f">I{len(numbers)}I", ALLOCATION_ID, *numbers)
    return CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, BLOCK_STATUS_CHUNK, cookie, len(payload)) + payload
