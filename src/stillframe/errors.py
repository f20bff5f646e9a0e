"""Every error of stillframe, in one tree named by what the caller decides next.

    StillframeError
    ├── Refused                nothing was touched: ask for something else
    │   ├── InvalidRequest       the words are wrong: arguments, options, names
    │   │   └── CommandNotFound    no such command, or not now
    │   ├── NotFound             a node, snapshot, job, file or device is not there
    │   │   ├── DeviceNotFound     (QMP class of that name)
    │   │   └── DeviceNotActive    (QMP class of that name)
    │   ├── AlreadyExists        a tag, node-name, job id or path is taken
    │   ├── InUse                a lock, a permission, a parent: wait for the other user, or end it
    │   ├── Unsupported          a feature that we name and do not do
    │   ├── LimitReached         a refcount width, a table's size: make room or use another image
    │   └── StateMismatch        the machine state does not fit this machine: device, section, field
    ├── Failed                 begun and undone: find the cause, then try again
    │   ├── IOFailed             the host's storage answered with an errno
    │   │   └── NoSpace            ... with ENOSPC, EDQUOT or EFBIG
    │   └── Cancelled            the caller asked for it
    ├── Corrupt                bytes contradict their format: check, repair, or use another copy
    │   ├── ImageCorrupt         a disk image
    │   └── StreamCorrupt        a machine-state stream
    └── PeerError              the other end of a monitor: unreachable, gone, or it said no

`str(error)` is one sentence; where QEMU has words for the case, it is those words. What was left behind and what to do
about it are attributes, printed by the command line and never part of a QMP reply.
"""

import errno as _errno
import os
from typing import ClassVar


class StillframeError(Exception):
    """The root; never raised itself.

    :param message: one sentence: what was asked and why not. QEMU's words where it has them.
    :param remedy: what the reader can do about it, one sentence; None where the message says it all.
    :param left: in what state things were left, where that is not the class's own promise.
    """

    qmp_class: ClassVar[str] = "GenericError"

    def __init__(self, message: str, *, remedy: str | None = None, left: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.left = left


class Refused(StillframeError):
    """Nothing was touched."""


class InvalidRequest(Refused):
    """The request's words are wrong: an argument, an option, a name."""


class CommandNotFound(InvalidRequest):
    """There is no such command, or not in this state of the session."""

    qmp_class = "CommandNotFound"


class NotFound(Refused):
    """A node, snapshot, job, file or device is not there."""


class DeviceNotFound(NotFound):
    """As QMP's class of that name."""

    qmp_class = "DeviceNotFound"


class DeviceNotActive(NotFound):
    """As QMP's class of that name."""

    qmp_class = "DeviceNotActive"


class AlreadyExists(Refused):
    """A tag, node-name, job id or path is taken."""


class InUse(Refused):
    """A lock is held, a permission is taken, a node has parents."""


class Unsupported(Refused):
    """A feature that is recognised by name and not done."""


class LimitReached(Refused):
    """A bound of a format would be passed: refcount width, table size, offset."""


class StateMismatch(Refused):
    """The machine state was made by, or for, another machine.

    :param section: the section's idstr, as "virtio-blk/root".
    :param field: the field that differs, where one does.
    """

    def __init__(
        self,
        message: str,
        *,
        section: str | None = None,
        field: str | None = None,
        remedy: str | None = None,
        left: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy, left=left)
        self.section = section
        self.field = field


class Failed(StillframeError):
    """Begun, and undone: everything is as before."""


class IOFailed(Failed):
    """The host's storage answered with an errno.

    :param errno: the number, as in the module `errno`.
    """

    def __init__(
        self, message: str, *, errno: int, remedy: str | None = None, left: str | None = None
    ) -> None:
        super().__init__(message, remedy=remedy, left=left)
        self.errno = errno

    @property
    def strerror(self) -> str:
        """The errno in the C library's words, as "Input/output error"."""
        return os.strerror(self.errno)


class NoSpace(IOFailed):
    """No room: ENOSPC, EDQUOT or EFBIG."""


class Cancelled(Failed):
    """The caller asked for it. QEMU's words: "Operation canceled"."""

    def __init__(self, message: str = "Operation canceled", *, left: str | None = None) -> None:
        super().__init__(message, left=left)


class Corrupt(StillframeError):
    """Bytes contradict their format."""


class ImageCorrupt(Corrupt):
    """A disk image's tables contradict each other or their bounds."""


class StreamCorrupt(Corrupt):
    """A machine-state stream ends early or holds what it must not."""


class PeerError(StillframeError):
    """The other end of a monitor is unreachable, went away, or answered with an error.

    :param error_class: the QMP class of its answer; "GenericError" where there was none.
    """

    def __init__(
        self,
        message: str,
        *,
        error_class: str = "GenericError",
        remedy: str | None = None,
        left: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy, left=left)
        self.error_class = error_class


_NO_SPACE = frozenset({_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG})


def io_failed(doing: str, cause: OSError) -> IOFailed:
    """The tree's word for an OSError that storage answered with; raise it `from cause`.

    :param doing: what was being done to what, as "Could not write to '/x.qcow2'".
    """
    number = cause.errno or _errno.EIO
    text = f"{doing}: {os.strerror(number)}"
    if number in _NO_SPACE:
        return NoSpace(text, errno=number, remedy="Make room on the file system, or raise its quota.")
    return IOFailed(text, errno=number)
