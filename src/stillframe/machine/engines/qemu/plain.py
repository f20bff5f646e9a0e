"""All of a stored stream into a fresh QEMU, which runs the guest when it has everything."""

import socket
from collections.abc import Callable

from stillframe.errors import Failed

_CHUNK = 2 << 20


def feed(
    connection: socket.socket,
    size: int,
    read: Callable[[int, int], bytes],
    progress: Callable[[int], None],
    checkpoint: Callable[[], None],
) -> None:
    """Send a stream, and say that it has ended. Whether QEMU took it, its `query-migrate` tells.

    QEMU's end of the connection ends the wait for it to read, and so does `shutdown` of ours by another thread.

    :param connection: a stream socket on which QEMU listens; it stays the caller's.
    :param size: bytes of the stream. :param read: so many of them, from an offset.
    :param progress: told of bytes that were sent since its last call. :param checkpoint: called every 2 MiB; raises to end it.
    :raise Failed: QEMU closed the connection, which is how it refuses a state: its standard error says why. What `read` raises is
        passed on.
    """
    for start in range(0, size, _CHUNK):
        checkpoint()
        data = read(start, min(_CHUNK, size - start))
        try:
            connection.sendall(data)
        except OSError as error:
            raise Failed(
                f"QEMU closed the connection after {start >> 20} of {size >> 20} MiB of the machine state"
            ) from error
        progress(len(data))
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError as error:
        raise Failed("QEMU closed the connection at the end of the machine state") from error
