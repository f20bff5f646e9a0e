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
import ipaddress
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillframe.errors import InvalidRequest, NotFound, PeerError, Refused
from stillframe.sockets import connected_unix_socket, local_name, tcp_name

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


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
        return tcp_name(self.host, self.port)


@dataclass(frozen=True, slots=True)
class StdioAddress:
    """Standard input and output of this process."""

    def __str__(self) -> str:
        return "stdio"


@dataclass(frozen=True, slots=True)
class FdAddress:
    """A listening socket that this process was started with. :param fd: its descriptor."""

    fd: int

    def __str__(self) -> str:
        return f"fd:{self.fd}"


Address = UnixAddress | TcpAddress | StdioAddress | FdAddress


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


def listening_filename(address: Address) -> str:
    """What listens there, as QEMU names character devices."""
    if isinstance(address, StdioAddress):
        return str(address)
    if isinstance(address, FdAddress):
        with _borrowed(address) as sock:
            return f"{local_name(sock)},server=on"
    return f"{address},server=on"


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


@contextlib.contextmanager
def _borrowed(address: FdAddress) -> Iterator[socket.socket]:
    """The socket, which stays open. :raise OSError: it is none."""
    sock = socket.socket(fileno=address.fd)
    try:
        yield sock
    finally:
        sock.detach()


def refuse_open_socket(address: FdAddress, *, allow_local_users: bool) -> None:
    """As `refuse_open_address`. Who may connect to a unix socket was decided where it was bound.

    :raise Refused: TCP at another address than a loopback one, or at none yet, which would be all; or what is neither.
    :raise OSError: no socket.
    """
    with _borrowed(address) as sock:
        if sock.family == socket.AF_UNIX:
            return
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise Refused(f"'{address}' is neither a unix socket nor one of TCP")
        host, port = sock.getsockname()[:2]
    refuse_open_address(TcpAddress(host, port), allow_local_users=allow_local_users)


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


def machine_home(name: str, *, create: bool) -> Path:
    """The path of the directory of a machine that has processes of its own: RUNTIME/NAME.qemu.

    :param create: :raise InvalidRequest: as of `machine_socket`.
    """
    return machine_socket(name, create=create).with_suffix(".qemu")


def machine_names() -> list[str]:
    """The names under which there are sockets; a machine that was killed may have left one."""
    try:
        directory = runtime_directory(create=False)
    except NotFound:
        return []
    return sorted(path.stem for path in directory.glob("*.sock"))


def connected_socket(address: Address) -> socket.socket:
    """A non-blocking stream socket, connected. Local sockets connect at once or not at all.

    :raise PeerError: nobody listens there, or this user may not connect.
    """
    if isinstance(address, StdioAddress):
        raise InvalidRequest("A monitor on stdio can be reached by its parent process only")
    if isinstance(address, FdAddress):
        raise InvalidRequest(f"'{address}' is a place to listen at, none to connect to")
    if isinstance(address, UnixAddress):
        sock = connected_unix_socket(address.path)
    else:
        try:
            sock = socket.create_connection((address.host, address.port), timeout=10)
        except OSError as error:
            raise PeerError(
                f"Could not connect to '{address}': {error.strerror or error}",
                remedy="Is the machine running?",
            ) from error
    sock.setblocking(False)
    return sock
