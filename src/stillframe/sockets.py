"""Unix sockets that are their user's alone: long paths, modes, and what processes that are gone left behind.

A socket is made with mode 0600, in a directory where nobody else can put one in its place. Of two processes that find the same
stale socket, one replaces it and the other is told that somebody listens.
"""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillframe.errors import AlreadyExists, InUse, InvalidRequest, NotFound, PeerError, Refused

_SUN_PATH_BYTES = 107
_SECONDS = 10


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A socket's file as we made it: its path, device and inode."""

    path: Path
    device: int
    inode: int

    def remove(self) -> None:
        """Take it away, unless it is gone or another's by now."""
        with contextlib.suppress(OSError, NotFound, Refused), _locked_directory(self.path):
            about = os.lstat(self.path)
            if (about.st_dev, about.st_ino) == (self.device, self.inode):
                os.unlink(self.path)


def connected_unix_socket(path: Path) -> socket.socket:
    """A stream socket connected to `path`; it connects at once or not at all.

    :raise PeerError: nobody listens there, or this user may not connect. :raise NotFound: no such directory.
    """
    with _short_name(path) as name:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(_SECONDS)
            sock.connect(name)
        except OSError as error:
            sock.close()
            raise PeerError(
                f"Could not connect to 'unix:{path}': {error.strerror or error}",
                remedy="Is the machine running?",
            ) from error
    sock.settimeout(None)
    return sock


def listening_unix_socket(path: Path) -> tuple[socket.socket, SocketFile]:
    """Listen at a path, with mode 0600; a socket left by a process that is gone is replaced.

    :raise InUse: somebody listens there. :raise AlreadyExists: the path is something else.
    :raise NotFound: no directory. :raise Refused: not permitted, or others could put a socket of theirs in its place.
    """
    with _locked_directory(path), _short_name(path) as name:
        _clear_stale(path, name)
        sock = socket.socket(socket.AF_UNIX)
        try:
            # bind() takes the file's mode from the socket's, so that it is right from the first moment on.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(name)
            os.chmod(name, 0o600)
            sock.listen(64)
            about = os.lstat(name)
        except OSError as error:
            sock.close()
            raise Refused(
                f"Could not listen at 'unix:{path}': {error.strerror}",
                remedy="Choose a path in a directory that you may write to.",
            ) from error
    return sock, SocketFile(path, about.st_dev, about.st_ino)


def local_name(sock: socket.socket) -> str:
    """Where a socket is bound, in QEMU's words; "fd:N" of one that is neither a unix socket nor TCP's."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        abstract = isinstance(name, bytes)
        return f"unix:{os.fsdecode(name[1:])},abstract=on,tight=on" if abstract else f"unix:{name}"
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return tcp_name(*name[:2])
    return f"fd:{sock.fileno()}"


def tcp_name(host: str, port: int) -> str:
    """A TCP port, in QEMU's words. :param host: without the brackets of IPv6."""
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


@contextlib.contextmanager
def _short_name(path: Path) -> Iterator[str]:
    """A name for `path` that fits a socket address, good inside the block."""
    if len(os.fsencode(path)) <= _SUN_PATH_BYTES:
        yield str(path)
        return
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"Could not open '{path.parent}': {error.strerror}") from error
    try:
        short = f"/proc/self/fd/{directory}/{path.name}"
        if len(os.fsencode(short)) > _SUN_PATH_BYTES:
            raise InvalidRequest(
                f"'{path.name}' is too long a name for a socket", remedy="Use a shorter one."
            )
        yield short
    finally:
        os.close(directory)


@contextlib.contextmanager
def _locked_directory(path: Path) -> Iterator[None]:
    """Check a socket's directory, and keep other processes of ours from replacing a stale socket at the same time.

    The lock is waited for; its owner holds it for the time of a `bind`.
    """
    directory = path.parent
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(
            f"Could not listen at 'unix:{path}': {error.strerror}",
            remedy="Choose a directory that exists and that you may read and write.",
        ) from error
    try:
        about = os.fstat(descriptor)
        if about.st_uid not in (0, os.getuid()):
            raise Refused(f"'{directory}' belongs to another user", remedy="Use a directory of your own.")
        if about.st_mode & 0o022 and not about.st_mode & stat.S_ISVTX:
            raise Refused(
                f"Others may put files of theirs into '{directory}'", remedy=f"chmod go-w {directory}"
            )
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clear_stale(path: Path, name: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise AlreadyExists(f"'{path}' exists and is not a socket", remedy="Choose another path.")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_SECONDS)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise Refused(f"Could not look at 'unix:{path}': {error.strerror}") from error
    raise InUse(
        f"A process listens at 'unix:{path}' already",
        remedy="Choose another path or name, or end that machine.",
    )
