"""The exports of one process, and its NBD server, as monitors know them; refusals are in QEMU's words.

An export is a user of its node in the graph: it lets others write, as QEMU's does, so two exports of one node go together,
and a guest's device on the node keeps writable exports away.
"""

import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from stillframe.block.export import nbd
from stillframe.block.export.export import Export
from stillframe.block.export.server import DEFAULT_CONNECTIONS, HANDSHAKE_SECONDS, NbdServer
from stillframe.block.graph import BlockGraph, NodeUse
from stillframe.block.node import Node
from stillframe.errors import AlreadyExists, InUse, InvalidRequest, NotFound, Refused, Unsupported
from stillframe.events import EventBus
from stillframe.sockets import SocketFile

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What an export is to be.

    :param id: unique. :param name: what clients ask for; None for the node's name.
    :param bitmap: a dirty bitmap to be shown, too: refused.
    :param snapshot: the tag, or id, of the snapshot to show, which then cannot be deleted; None for what the node holds.
    """

    id: str
    node_name: str
    name: str | None = None
    description: str = ""
    writable: bool = False
    snapshot: str | None = None
    bitmap: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    export: Export
    use: NodeUse


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An export as it is listed."""

    id: str
    node_name: str
    is_shutting_down: bool


class NodeExports:
    """Any thread may call anything.

    :param graph: where the nodes are. :param events: told of exports that are gone.
    """

    def __init__(self, graph: BlockGraph, events: EventBus) -> None:
        self._graph = graph
        self._events = events
        self._change = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._server: NbdServer | None = None

    # What clients see.

    def find(self, name: str) -> Export | None:
        """The export that clients call so."""
        found = (each for each in tuple(self._entries.values()) if each.export.name == name)
        entry = next(found, None)
        return None if entry is None or entry.export.is_closed else entry.export

    def listed(self) -> Sequence[Export]:
        """The newest first, as QEMU lists them."""
        return [each.export for each in reversed(tuple(self._entries.values()))]

    def infos(self) -> Sequence[ExportInfo]:
        """The newest first."""
        return [
            ExportInfo(each.export.id, each.use.node.node_name, each.export.is_closed)
            for each in reversed(tuple(self._entries.values()))
        ]

    # Changes.

    def start(
        self,
        listen: Callable[[], tuple[socket.socket, SocketFile | None]],
        *,
        maximum: int = DEFAULT_CONNECTIONS,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> NbdServer:
        """Listen for clients.

        :param listen: makes the socket. :param maximum: clients at a time; 0 for as many as there can be.
        :raise InUse: there is a server. :raise StillframeError: whatever `listen` raised.
        """
        with self._change:
            if self._server is not None:
                raise InUse("NBD server already running")
            sock, file = listen()
            self._server = NbdServer(
                sock, self, file=file, maximum=maximum, handshake_seconds=handshake_seconds
            )
            return self._server

    def stop(self) -> None:
        """End the server and all exports. :raise Refused: there is no server."""
        with self._change:
            if self._server is None:
                raise Refused("NBD server not running")
            for each in self._entries.values():
                # Before the clients go: what waits while an export is held would not end otherwise.
                each.export.close()
            self._server.close()
            self._server = None
            for id in reversed(tuple(self._entries)):
                self._end(id)

    def add(self, asked: ExportRequest) -> Export:
        """Export a node of the graph.

        :raise Refused: in QEMU's words.
        """
        with self._change:
            self._refuse_id(asked.id)
            node = self._graph.get(asked.node_name)
            if node is None:
                raise NotFound(f"Cannot find device='' nor node-name='{asked.node_name}'")
            if asked.writable and (node.read_only or asked.snapshot is not None):
                raise Refused("Cannot export read-only node as writable")
            return self._add(asked, node)

    def _refuse_id(self, id: str) -> None:
        if not _ID.fullmatch(id):
            raise InvalidRequest("Invalid block export id")
        if id in self._entries:
            raise AlreadyExists(f"Block export id '{id}' is already in use")

    def _add(self, asked: ExportRequest, node: Node) -> Export:
        use = self._graph.export(node, asked.id, writable=asked.writable)
        try:
            if self._server is None:
                raise Refused("NBD server not running")
            name = asked.node_name if asked.name is None else asked.name
            if len(name.encode("utf-8", "replace")) > nbd.MAXIMUM_TEXT:
                raise InvalidRequest(f"export name '{name}' too long")
            if len(asked.description.encode("utf-8", "replace")) > nbd.MAXIMUM_TEXT:
                raise InvalidRequest(f"description '{asked.description}' too long")
            if self.find(name) is not None:
                raise AlreadyExists(f"NBD server already has export named '{name}'")
            if asked.bitmap is not None:
                raise NotFound(f"Bitmap '{asked.bitmap}' is not found", remedy="Bitmaps are not exported.")
            shown = node if asked.snapshot is None else _at_snapshot(node, asked.snapshot)
        except BaseException:
            use.release()
            raise
        export = Export(asked.id, shown, name=name, description=asked.description, writable=asked.writable)
        self._entries = {**self._entries, asked.id: _Entry(export, use)}
        return export

    def remove(self, id: str, *, hard: bool = False) -> None:
        """End an export.

        :param hard: also while it has clients, which are disconnected; requests in flight end with their I/O.
        :raise NotFound: there is none. :raise InUse: it has clients.
        """
        with self._change:
            entry = self._entries.get(id)
            if entry is None:
                raise NotFound(f"Export '{id}' is not found")
            is_used = self._server is not None and bool(self._server.connected(entry.export))
            if is_used and not hard:
                raise InUse(
                    f"export '{id}' still in use", remedy="Use mode='hard' to force client disconnect"
                )
            self._end(id)

    @contextmanager
    def drained(self) -> Iterator[None]:
        """No request of any client is in flight inside the block; new ones wait for its end.

        What several nodes hold is of one instant then: without it a client's later write may be in the snapshot of one disk,
        and its earlier one not in that of another. Requests in flight are waited for, flushes too: begin before the guest is
        paused.
        """
        with ExitStack() as stack:
            for each in tuple(self._entries.values()):
                stack.enter_context(each.export.held())
            yield

    def close(self) -> None:
        """The process ends: without a server, nothing."""
        with self._change:
            if self._server is not None:
                self.stop()

    def _end(self, id: str) -> None:
        entry = self._entries[id]
        entry.export.close()
        if self._server is not None:
            self._server.disconnect(entry.export)
        self._entries = {key: each for key, each in self._entries.items() if key != id}
        if entry.export.node is not entry.use.node:
            entry.export.node.close()
        entry.use.release()
        self._events.emit("BLOCK_EXPORT_DELETED", id=id)


def _at_snapshot(node: Node, words: str) -> Node:
    from stillframe.block.qcow2 import Qcow2Node

    if not isinstance(node, Qcow2Node) or node.snapshot_store is None:
        raise Unsupported(f"Node '{node.node_name}' cannot keep snapshots")
    found = [each for each in node.snapshot_store.snapshots() if words in (each.name, each.id)]
    named = [each for each in found if each.name == words] or found
    if not named:
        raise NotFound(f"Node '{node.node_name}' has no snapshot '{words}'")
    if len(named) > 1:
        raise InvalidRequest(
            f"Node '{node.node_name}' has several snapshots '{words}'", remedy="Name one by its id."
        )
    return node.at_snapshot(named[0])
