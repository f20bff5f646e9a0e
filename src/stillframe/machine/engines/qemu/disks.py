"""The disks of a QEMU guest: our nodes, exported on a socket of its directory, each under its node-name.

Two QEMUs can use them at once, as they do while a load hands the machine from one to the other; the guest runs in one of them at a
time, so nobody writes beside the other.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stillframe.block.export.export import Export
from stillframe.block.export.server import NbdServer
from stillframe.block.node import Node
from stillframe.machine.engines.qemu.command_line import QemuConfig, drive_of
from stillframe.machine.machine import Disk
from stillframe.sockets import listening_unix_socket


class DiskExports:
    """Served from now on, until `close`.

    :param path: of the socket. :param nodes: all that the guest uses; whoever makes this keeps them open.
    :raise Refused: there cannot be a socket.
    """

    def __init__(self, path: Path, nodes: Sequence[Node]) -> None:
        self.path = path
        self._exports = {
            node.node_name: Export(node.node_name, node, writable=not node.read_only) for node in nodes
        }
        listener, file = listening_unix_socket(path)
        self._server = NbdServer(listener, self, file=file)

    def find(self, name: str) -> Export | None:
        """The export of a node."""
        return self._exports.get(name)

    def listed(self) -> Sequence[Export]:
        """All of them."""
        return tuple(self._exports.values())

    @contextmanager
    def held(self) -> Iterator[None]:
        """No request is in flight inside the block, and new ones wait for its end."""
        with ExitStack() as stack:
            for export in self._exports.values():
                stack.enter_context(export.held())
            yield

    def close(self) -> None:
        """End every connection; requests in flight end with their I/O."""
        for export in self._exports.values():
            export.close()
        self._server.close()


def disks_of(config: QemuConfig) -> tuple[Disk, ...]:
    """The guest's devices with a node of ours behind them, as QEMU names them; flash first."""
    nodes = {node.node_name: node for node in config.nodes}
    found = [
        Disk(f"pflash{number}", name, True, not nodes[name].read_only)
        for number, name in enumerate(config.flash)
    ]
    for number, device in enumerate(config.devices):
        name = drive_of(device)
        if name in nodes:
            words = dict(pair.partition("=")[::2] for pair in device.split(",")[1:])
            device_id = words.get("id", f"/machine/peripheral-anon/device[{number}]")
            found.append(Disk(device_id, nodes[name].node_name, False, not nodes[name].read_only))
    return tuple(found)
