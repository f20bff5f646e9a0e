"""Where monitors are found: addresses as they are typed, and the sockets behind machines' names.

    unix:PATH        a socket of the file system, mode 0600; PATH may be longer than a socket address can say
    (107 bytes) tcp:HOST:PORT    a loopback address only: there is no authentication, so every local user may
    connect stdio            this process's own standard input and output NAME             the socket of
    `stillframe run --name NAME`: RUNTIME/NAME.sock

RUNTIME is $XDG_RUNTIME_DIR/stillframe, or stillframe-UID in the temporary directory. It is made with mode
0700; one that belongs to somebody else, or that others may enter, is refused, since whoever owns it could put
a monitor of theirs there.
"""

import contextlib
import fcntl
import ipaddress
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillframe.errors import AlreadyExists, InUse, InvalidRequest, NotFound, PeerError, Refused

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUN_PATH_BYTES = 107


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket of the file system."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP port; `host` without the brackets of IPv6."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class StdioAddress:
    """Standard input and output of this process."""

    def __str__(self) -> str:
        return "stdio"


Address = UnixAddress | TcpAddress | StdioAddress


def parse_address(text: str) -> Address:
    """The address that `text` says; see the module's text.

    :raise InvalidRequest: it is none.
    """
    kind, _, rest = text.partition(":")
    if text == "stdio":
        return StdioAddress()
    if kind == "unix" and rest:
        return UnixAddress(Path(rest.partition(",")[0]))
    if kind == "tcp" and rest:
        host, _, port = rest.partition(",")[0].rpartition(":")
        if port.isascii() and port.isdigit() and int(port) <= 65535:
            return TcpAddress(host.strip("[]") or "127.0.0.1", int(port))
    raise InvalidRequest(f"'{text}' is not an address", remedy="Use unix:PATH, tcp:HOST:PORT or stdio.")


def refuse_open_address(address: TcpAddress, *, allow_local_users: bool) -> None:
    """Refuse to listen where others than this user could connect.

    :raise Refused: not a loopback address, or one without `allow_local_users`.
    """
    try:
        loopback = address.host == "localhost" or ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise Refused(
            f"'{address}' is not a loopback address, and a monitor has no authentication",
            remedy="Use unix:PATH, or 127.0.0.1 and a tunnel that authenticates.",
        )
    if not allow_local_users:
        raise Refused(
            f"Every user of this host could connect to '{address}'",
            remedy="Use unix:PATH, or say --allow-local-users if all of them may control the machine.",
        )


def runtime_directory(*, create: bool) -> Path:
    """The directory of named machines' sockets.

    :param create: make it if it is missing.
    :raise NotFound: it is missing. :raise Refused: somebody else could get at it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "stillframe" if base else Path(tempfile.gettempdir()) / f"stillframe-{os.getuid()}"
    if create:
        with contextlib.suppress(FileExistsError):
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                raise
            except OSError as error:
                raise Refused(
                    f"Could not create '{path}': {error.strerror}", remedy="Give --qmp unix:PATH."
                ) from error
    try:
        about = os.lstat(path)
    except FileNotFoundError as error:
        raise NotFound(f"'{path}' does not exist: no machine with a name was started") from error
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        raise Refused(f"'{path}' is not a directory of this user's", remedy="Give --qmp unix:PATH.")
    if stat.S_IMODE(about.st_mode) & 0o077:
        raise Refused(f"'{path}' is open to other users", remedy=f"chmod 700 {path}")
    return path


def machine_socket(name: str, *, create: bool) -> Path:
    """The path of the monitor's socket of the machine called `name`.

    :param create: make the directory that it is to be in.
    :raise InvalidRequest: not a name that can be a file's.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"'{name}' cannot be a machine's name",
            remedy="Use letters, digits, '.', '_' and '-', at most 64.",
        )
    return runtime_directory(create=create) / f"{name}.sock"


def machine_names() -> list[str]:
    """The names under which there are sockets; a machine that was killed may have left one."""
    try:
        directory = runtime_directory(create=False)
    except NotFound:
        return []
    return sorted(path.stem for path in directory.glob("*.sock"))


@contextlib.contextmanager
def socket_path(path: Path) -> Iterator[str]:
    """A name for `path` that fits a socket address, good inside the block.

    :raise NotFound: its directory is missing.
    """
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


def connected_socket(address: Address) -> socket.socket:
    """A non-blocking stream socket, connected. Local sockets connect at once or not at all.

    :raise PeerError: nobody listens there, or this user may not connect.
    """
    if isinstance(address, StdioAddress):
        raise InvalidRequest("A monitor on stdio can be reached by its parent process only")
    try:
        if isinstance(address, TcpAddress):
            sock = socket.create_connection((address.host, address.port), timeout=10)
        else:
            with socket_path(address.path) as name:
                sock = socket.socket(socket.AF_UNIX)
                try:
                    sock.settimeout(10)
                    sock.connect(name)
                except BaseException:
                    sock.close()
                    raise
    except OSError as error:
        raise PeerError(
            f"Could not connect to '{address}': {error.strerror or error}", remedy="Is the machine running?"
        ) from error
    sock.setblocking(False)
    return sock


def listening_socket(address: UnixAddress) -> socket.socket:
    """Listen at a path with mode 0600; a socket left by a process that is gone is replaced.

    :raise InUse: somebody listens there. :raise AlreadyExists: the path is something else.
    :raise NotFound: no directory. :raise Refused: not permitted, or others could put a socket of theirs in
        its place.
    """
    with _locked_directory(address), socket_path(address.path) as name:
        _clear_stale(address, name)
        sock = socket.socket(socket.AF_UNIX)
        try:
            # bind() takes the file's mode from the socket's, so that it is right from the first moment on.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(name)
            os.chmod(name, 0o600)
            sock.listen(64)
        except OSError as error:
            sock.close()
            raise Refused(
                f"Could not listen at '{address}': {error.strerror}",
                remedy="Choose a path in a directory that you may write to.",
            ) from error
    sock.setblocking(False)
    return sock


@contextlib.contextmanager
def _locked_directory(address: UnixAddress) -> Iterator[None]:
    """Check the directory of a socket, and keep other processes of ours from replacing a stale one at the
    same time.

    The lock is waited for; its owner holds it for the time of a `bind`.
    """
    directory = address.path.parent
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(
            f"Could not listen at '{address}': {error.strerror}", remedy="Make its directory first."
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


def file_identity(address: UnixAddress) -> tuple[int, int]:
    """Device and inode of a socket's file, for `remove_socket`. :raise OSError: it is gone."""
    about = os.lstat(address.path)
    return about.st_dev, about.st_ino


def remove_socket(address: UnixAddress, identity: tuple[int, int]) -> None:
    """Take a socket's file away, unless it is gone or another's by now."""
    with contextlib.suppress(OSError, NotFound, Refused), _locked_directory(address):
        if file_identity(address) == identity:
            os.unlink(address.path)


def _clear_stale(address: UnixAddress, name: str) -> None:
    try:
        mode = os.lstat(address.path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise AlreadyExists(f"'{address.path}' exists and is not a socket", remedy="Choose another path.")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            os.unlink(address.path)
            return
        except OSError as error:
            raise Refused(f"Could not look at '{address}': {error.strerror}") from error
    raise InUse(
        f"A process listens at '{address}' already",
        remedy="Choose another path or name, or end that machine.",
    )
