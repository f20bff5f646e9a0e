"""Commands on exports of nodes, and on the one NBD server that serves them."""

import socket
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import UNSET, UnsetType

from stillframe.block.export.exports import ExportRequest
from stillframe.block.export.server import DEFAULT_CONNECTIONS, HANDSHAKE_SECONDS, listen_tcp
from stillframe.errors import NotFound, Unsupported
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, UInt16, UInt32, command, event
from stillframe.sockets import SocketFile, listening_unix_socket


class InetSocketAddress(Structure, kw_only=True):
    """A TCP port.

    :param host: to listen at; not empty. Whoever reaches it can use the exports.
    :param port: its number or name; 0 for any that is free.
    """

    host: str
    port: str
    numeric: bool | UnsetType = UNSET
    to: UInt16 | UnsetType = UNSET
    ipv4: bool | UnsetType = UNSET
    ipv6: bool | UnsetType = UNSET
    keep_alive: bool | UnsetType = UNSET
    mptcp: bool | UnsetType = UNSET


class UnixSocketAddress(Structure):
    """A socket of the file system, for this user alone.

    :param path: in a directory where nobody else can put one in its place.
    """

    path: str
    abstract: bool | UnsetType = UNSET
    tight: bool | UnsetType = UNSET


class VsockSocketAddress(Structure):
    """Refused."""

    cid: str
    port: str


class FdSocketAddress(Structure):
    """Refused."""

    str: str


class SocketAddressLegacy(Structure, tag_field="type"):
    """Where to listen."""


class SocketAddressLegacyInet(SocketAddressLegacy, tag="inet"):
    """A TCP port."""

    data: InetSocketAddress


class SocketAddressLegacyUnix(SocketAddressLegacy, tag="unix"):
    """A socket of the file system."""

    data: UnixSocketAddress


class SocketAddressLegacyVsock(SocketAddressLegacy, tag="vsock"):
    """Refused."""

    data: VsockSocketAddress


class SocketAddressLegacyFd(SocketAddressLegacy, tag="fd"):
    """Refused."""

    data: FdSocketAddress


class NbdServerOptionsLegacy(Structure, kw_only=True):
    """How the server is reached.

    :param handshake_max_seconds: how long a client may take to say what it wants; 0 for as long as it likes.
    :param tls_creds: refused: there is no TLS.
    :param tls_authz: refused, too.
    :param max_connections: clients at a time, 100 if left out, 0 for as many as there can be: 1000.
    :param addr: where it listens.
    """

    handshake_max_seconds: UInt32 | UnsetType = UNSET
    tls_creds: str | UnsetType = UNSET
    tls_authz: str | UnsetType = UNSET
    max_connections: UInt32 | UnsetType = UNSET
    addr: SocketAddressLegacyInet | SocketAddressLegacyUnix | SocketAddressLegacyVsock | SocketAddressLegacyFd


class NbdServerAddOptions(Structure, kw_only=True):
    """A node to be exported.

    :param name: what clients ask for, and the export's id; the node's name if left out.
    :param description: for people.
    :param device: the node.
    :param writable: clients may write; no matter what, where the node is read-only.
    :param bitmap: refused: bitmaps are not exported.
    """

    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    device: str
    writable: bool | UnsetType = UNSET
    bitmap: str | UnsetType = UNSET


class BlockExportRemoveMode(Enum):
    """What becomes of clients. SAFE: they keep the export. HARD: they are disconnected."""

    SAFE = "safe"
    HARD = "hard"


class NbdExportName(Structure):
    """:param name: the export's. :param mode: what to do about clients; `safe` if left out."""

    name: str
    mode: BlockExportRemoveMode | UnsetType = UNSET


class ExportId(Structure):
    """:param id: the export's. :param mode: what to do about clients; `safe` if left out."""

    id: str
    mode: BlockExportRemoveMode | UnsetType = UNSET


class BlockExportType(Enum):
    """How a node is exported."""

    NBD = "nbd"


class BlockExportOptions(Structure, tag_field="type", kw_only=True):
    """What every kind of export takes.

    :param id: unique among exports.
    :param fixed_iothread: has no effect without `iothread`.
    :param iothread: refused: there are none.
    :param node_name: the node.
    :param writable: clients may write.
    :param writethrough: refused where it is true; clients flush.
    :param allow_inactive: has no effect: nodes are active.
    """

    id: str
    fixed_iothread: bool | UnsetType = UNSET
    iothread: str | UnsetType = UNSET
    node_name: str
    writable: bool | UnsetType = UNSET
    writethrough: bool | UnsetType = UNSET
    allow_inactive: bool | UnsetType = UNSET


class BlockExportOptionsNbd(BlockExportOptions, tag="nbd", kw_only=True):
    """An export over NBD.

    :param name: what clients ask for; the node's name if left out.
    :param description: for people.
    :param bitmaps: refused: bitmaps are not exported.
    :param allocation_depth: refused where it is true.
    """

    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    bitmaps: list[Any] | UnsetType = UNSET
    allocation_depth: bool | UnsetType = UNSET


class BlockExportInfo(Structure):
    """An export.

    :param shutting_down: it is being removed.
    """

    id: str
    type: BlockExportType
    node_name: str
    shutting_down: bool


@event("BLOCK_EXPORT_DELETED")
class BlockExportDeleted(Structure):
    """An export is gone, and its id free again.

    :param id: the export's.
    """

    id: str


@command("nbd-server-start")
def nbd_server_start(host: Host, arguments: NbdServerOptionsLegacy) -> None:
    """Begin to serve exports over NBD. There is no authentication: a unix socket is open to this user alone, a TCP port to
    whoever reaches it.
    """
    if isinstance(arguments.tls_creds, str):
        raise NotFound(f"No TLS credentials with id '{arguments.tls_creds}'")
    if isinstance(arguments.tls_authz, str):
        raise Unsupported("Option 'tls-authz' is not supported: there is no TLS")
    seconds, maximum = arguments.handshake_max_seconds, arguments.max_connections
    if isinstance(seconds, UnsetType):
        seconds = int(HANDSHAKE_SECONDS)
    if isinstance(maximum, UnsetType):
        maximum = DEFAULT_CONNECTIONS
    host.exports.start(
        partial(_listen, arguments.addr), maximum=maximum, handshake_seconds=seconds or float("inf")
    )


def _listen(address: SocketAddressLegacy) -> tuple[socket.socket, SocketFile | None]:
    if isinstance(address, SocketAddressLegacyUnix):
        path = address.data.path
        if address.data.abstract is True:
            raise Unsupported("Option 'abstract' is not supported: every user could connect")
        try:
            return listening_unix_socket(Path(path))
        except NotFound as error:
            raise NotFound(f"Failed to bind socket to {path}: No such file or directory") from error
    if isinstance(address, SocketAddressLegacyInet):
        for name in ("to", "ipv4", "ipv6", "keep_alive", "mptcp"):
            if not isinstance(getattr(address.data, name), UnsetType):
                raise Unsupported(f"Option '{name.replace('_', '-')}' is not supported")
        return listen_tcp(address.data.host, address.data.port), None
    kind = "vsock" if isinstance(address, SocketAddressLegacyVsock) else "fd"
    raise Unsupported(f"An NBD server cannot listen at an address of type '{kind}'")


@command("nbd-server-add", features=("deprecated",))
def nbd_server_add(host: Host, arguments: NbdServerAddOptions) -> None:
    """Export a node; as `block-export-add`, with the name as the id."""
    node = host.graph.find(arguments.device)
    name = _text(arguments.name)
    host.exports.add(
        ExportRequest(
            id=arguments.device if name is None else name,
            node_name=arguments.device,
            name=name,
            description=_text(arguments.description) or "",
            writable=arguments.writable is True and not node.read_only,
            bitmap=_text(arguments.bitmap),
        ),
    )


@command("nbd-server-remove", features=("deprecated",))
def nbd_server_remove(host: Host, arguments: NbdExportName) -> None:
    """Remove an export; as `block-export-del`."""
    host.exports.remove(arguments.name, hard=arguments.mode is BlockExportRemoveMode.HARD)


@command("nbd-server-stop")
def nbd_server_stop(host: Host) -> None:
    """Disconnect all clients, remove all exports, and listen no longer. Requests in flight are finished."""
    host.exports.stop()


@command("block-export-add")
def block_export_add(host: Host, arguments: BlockExportOptionsNbd) -> None:
    """Export a node. It stays open meanwhile, and the guest's devices and other exports may use it, too, as far as one writer
    beside them is suffered.
    """
    if isinstance(arguments.iothread, str):
        raise NotFound(f'iothread "{arguments.iothread}" not found')
    for option in ("writethrough", "allocation_depth"):
        if getattr(arguments, option) is True:
            raise Unsupported(f"Option '{option.replace('_', '-')}' is not supported")
    bitmaps = [] if isinstance(arguments.bitmaps, UnsetType) else arguments.bitmaps
    host.exports.add(
        ExportRequest(
            id=arguments.id,
            node_name=arguments.node_name,
            name=_text(arguments.name),
            description=_text(arguments.description) or "",
            writable=arguments.writable is True,
            bitmap=str(bitmaps[0]) if bitmaps else None,
        )
    )


@command("block-export-del")
def block_export_del(host: Host, arguments: ExportId) -> None:
    """Remove an export; BLOCK_EXPORT_DELETED tells when its id is free again, which it is before the reply."""
    host.exports.remove(arguments.id, hard=arguments.mode is BlockExportRemoveMode.HARD)


@command("query-block-exports")
def query_block_exports(host: Host) -> list[BlockExportInfo]:
    """All exports, newest first."""
    return [
        BlockExportInfo(each.id, BlockExportType.NBD, each.node_name, each.is_shutting_down)
        for each in host.exports.infos()
    ]


def _text(value: str | UnsetType) -> str | None:
    return None if isinstance(value, UnsetType) else value
