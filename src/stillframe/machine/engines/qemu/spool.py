"""A stream that must be taken as fast as it comes, kept until it is wanted.

A QEMU whose background snapshot is not read stands still, guest and monitor alike. So a thread takes the stream from the socket
into a file that has no name, whatever the reader does, and the reader follows at its own pace. What the reader has passed is
given back to the file system. Beyond a buffer of a mebibyte it takes no memory; of disk as much as the reader is behind, at
most the stream.
"""

import contextlib
import ctypes
import errno
import logging
import os
import socket
import tempfile
import threading
from typing import Final

from stillframe.errors import io_failed
from stillframe.machine.engines.qemu.keeper import Keeper
from stillframe.machine.libc import LIBC, last_error

_log = logging.getLogger(__name__)

_TAKEN_AT_ONCE: Final = 1 << 20
_TAKEN_AS_IT_COMES: Final = 64 << 10
"""Bytes at the beginning: what stands before the memory has a few hundred."""
_GIVEN_BACK_AT_ONCE: Final = 64 << 20
_PUNCH_HOLE: Final = 0x02 | 0x01


class Spool:
    """One stream, from the first byte to the last.

    :param listener: where QEMU will connect, once; closed with this. :param keeper: reads on when we are killed; closed with this.
    :raise IOFailed: there is no place for temporary files.
    """

    def __init__(self, listener: socket.socket, keeper: Keeper | None = None) -> None:
        self._keeper = keeper
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise io_failed("Could not make a temporary file for the machine state", error) from error
        self._listener = listener
        self._changed = threading.Condition()
        self._length = 0
        self._given_back = 0
        self._ended = False
        self._kept = True
        self._trouble: OSError | None = None
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._take, name="qemu-state", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        buffer = memoryview(bytearray(_TAKEN_AT_ONCE))
        # QEMU wakes this thread at every page, which would take the processor from the guest each time.
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        try:
            self._connection, _ = self._listener.accept()
            if self._keeper is not None:
                self._keeper.give(self._connection)
            # The reader waits for the beginning byte by byte. Behind it the kernel fills the buffer: QEMU sends a few pages at
            # a time, and to ask for the interpreter's lock after each would make it wait.
            while count := self._connection.recv_into(
                buffer, 0, 0 if self._length < _TAKEN_AS_IT_COMES else socket.MSG_WAITALL
            ):
                self._keep(buffer[:count])
        except OSError as error:
            # The socket was closed under us, by `close`; or QEMU died, which is told as the stream's early end.
            _log.debug("the machine state's socket: %s", error)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _keep(self, data: memoryview) -> None:
        """A stream that cannot be kept is still taken: QEMU must not wait."""
        if self._kept:
            try:
                at = self._length
                while data:
                    count = os.pwrite(self._file.fileno(), data, at)
                    data, at = data[count:], at + count
            except OSError as error:
                self._trouble, self._kept = error, False
                with self._changed:
                    self._changed.notify_all()
                return
            with self._changed:
                self._length = at
                self._changed.notify_all()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the stream; waits for them. Shorter than `length` only at the stream's end, or of a spool that is closed.

        :raise IOFailed: it could not be kept.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._length >= offset + length or self._ended or self._trouble is not None
            )
            if self._trouble is not None:
                raise io_failed("Could not keep the machine state that QEMU sends", self._trouble)
            available = min(length, self._length - offset)
        self._give_back(offset)
        return os.pread(self._file.fileno(), available, offset) if available > 0 else b""

    def has(self, length: int, seconds: float) -> bool:
        """Whether so many bytes have come, waited for that long at most; true as well once no more will come."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._length >= length or self._ended or self._trouble is not None, seconds
            )

    @property
    def ended(self) -> bool:
        """Whether no more will come."""
        return self._ended

    def _give_back(self, until: int) -> None:
        """What lies before `until` will not be read again."""
        until -= until % _TAKEN_AT_ONCE
        if until - self._given_back >= _GIVEN_BACK_AT_ONCE:
            _punch(self._file.fileno(), self._given_back, until - self._given_back)
            self._given_back = until

    def throw_away(self) -> None:
        """Nobody will read on; what still comes is taken and forgotten."""
        self._kept = False
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), 0)

    def give_up(self) -> None:
        """Nobody will connect any more, or nothing more is to be taken: the stream ends here."""
        for end in (self._connection, self._listener):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give everything back; a second time, nothing."""
        self.give_up()
        self._thread.join()
        if self._keeper is not None:
            self._keeper.close()
        for end in (self._connection, self._listener):
            if end is not None:
                end.close()
        self._file.close()


def _punch(fd: int, offset: int, length: int) -> None:
    """Give a range of a temporary file back; where the file system cannot, it stays until the file is closed."""
    if LIBC.fallocate(fd, _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length)):
        error = last_error()
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise io_failed("Could not give back temporary space", error) from error
