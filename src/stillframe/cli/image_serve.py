"""`stillframe image serve`: an image as a disk for other programs, over NBD, until it is interrupted."""

from typing import TYPE_CHECKING

import click

from stillframe.cli.image_open import force_share_option, format_option, probed
from stillframe.errors import InvalidRequest
from stillframe.text import printable

if TYPE_CHECKING:
    import socket

    from stillframe.sockets import SocketFile

_NODE = "image"


@click.command(
    "serve",
    epilog="""\b
EXAMPLES
  stillframe image serve --socket disk.sock disk.qcow2
  stillframe image serve --socket old.sock --snapshot before-upgrade disk.qcow2
  qemu-img map nbd+unix:///?socket=disk.sock
  qemu-system-x86_64 -drive file=nbd+unix:///?socket=disk.sock,format=raw

Machines and commands that would write to the image meanwhile are refused: its lock says so. Ctrl-C,
SIGTERM and SIGHUP finish the requests in flight, disconnect the clients, and leave a clean image.""",
)
@format_option
@force_share_option
@click.option(
    "--socket",
    "path",
    type=click.Path(),
    metavar="PATH",
    help="A unix socket to listen at, of mode 0600.",
)
@click.option("--tcp", metavar="HOST:PORT", help="A TCP port instead: whoever reaches it can use the image.")
@click.option(
    "--export-name", default="", metavar="NAME", help="What clients must ask for; empty if left out."
)
@click.option("--snapshot", metavar="TAG", help="The disk as it was at a snapshot, by tag or id; read-only.")
@click.option("--read-only", is_flag=True, help="Let nobody write.")
@click.argument("file")
def serve(
    kind: str | None,
    force_share: bool,
    path: str | None,
    tcp: str | None,
    export_name: str,
    snapshot: str | None,
    read_only: bool,
    file: str,
) -> None:
    """Serve an image over NBD to qemu, qemu-img, nbd-client and others."""
    import signal
    import threading

    from stillframe.block.export.exports import ExportRequest, NodeExports
    from stillframe.block.graph import BlockGraph
    from stillframe.block.options import NodeOptions
    from stillframe.events import EventBus

    if (path is None) == (tcp is None):
        raise click.UsageError("Say where to listen: --socket PATH, or --tcp HOST:PORT")
    writable = not (read_only or force_share or snapshot is not None)
    over = threading.Event()
    graph = BlockGraph()
    try:
        graph.blockdev_add(
            NodeOptions(
                kind or probed(file),
                node_name=_NODE,
                read_only=not writable,
                force_share=force_share,
                children={"file": NodeOptions("file", settings={"filename": file})},
            )
        )
        exports = NodeExports(graph, EventBus())
        server = exports.start(lambda: _listener(path, tcp))
        try:
            exports.add(ExportRequest(_NODE, _NODE, export_name, writable=writable, snapshot=snapshot))
            ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            before = {number: signal.signal(number, lambda *_: over.set()) for number in ends}
            try:
                address = server.address
                where = address if isinstance(address, str) else "{}:{}".format(*address)
                click.echo(f"serving '{printable(file)}' at {printable(where)}; Ctrl-C ends it", err=True)
                over.wait()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        finally:
            exports.close()
    finally:
        graph.close()


def _listener(path: str | None, tcp: str | None) -> "tuple[socket.socket, SocketFile | None]":
    from pathlib import Path

    from stillframe.block.export.server import listen_tcp
    from stillframe.sockets import listening_unix_socket

    if path is not None:
        return listening_unix_socket(Path(path))
    host, colon, port = (tcp or "").rpartition(":")
    if not colon:
        raise InvalidRequest(f"'{tcp}' is not an address", remedy="Use HOST:PORT.")
    return listen_tcp(host.strip("[]"), port), None
