"""Somebody who reads a stream to its end when we are killed.

A QEMU before 8 whose background snapshot loses its reader stands still for good. So a forked child of ours holds the other end of
the stream's socket, too, and sleeps. When we die it reads the rest and throws it away: the guest goes on, and can be taken over.
"""

import contextlib
import socket
from functools import partial
from typing import Final

from stillframe.machine.child import fork_child, wait_for_child

_CONNECT_SECONDS: Final = 10.0
"""For which a QEMU that was told to send its state may take to connect."""
_CHUNK: Final = 1 << 20


class Keeper:
    """One child, until `close`.

    :param listener: where QEMU will connect. :raise OSError: the host does not fork.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                kept = (theirs.fileno(), listener.fileno())
                self._pid = fork_child(partial(_keep, theirs, listener), kept)
            except BaseException:
                self._ours.close()
                raise

    def give(self, connection: socket.socket) -> None:
        """QEMU has connected: this is the stream."""
        # A child that was killed keeps nothing, and we go on without.
        with contextlib.suppress(OSError):
            socket.send_fds(self._ours, [b"stream"], [connection.fileno()])

    def close(self) -> None:
        """We have read it, or do not need it any more."""
        with contextlib.suppress(OSError):
            self._ours.sendall(b"end")
        self._ours.close()
        wait_for_child(self._pid)


def _keep(parent: socket.socket, listener: socket.socket) -> None:
    """The child's work. A parent that is gone says nothing."""
    stream: socket.socket | None = None
    while True:
        message, descriptors, _, _ = socket.recv_fds(parent, 16, 1)
        if message == b"end":
            return
        if not message:
            break
        stream = socket.socket(fileno=descriptors[0])
    if stream is None:
        listener.settimeout(_CONNECT_SECONDS)
        stream, _ = listener.accept()
    stream.settimeout(None)
    while stream.recv(_CHUNK):
        pass
