"""The snapshots of one machine: what QMP's jobs and the human commands both call.

Each operation refuses first, then does its work, as the module of its name says. Operations of a machine take
turns: their callers run them on `queue`, in order of arrival. While one is at work its nodes cannot be
removed from the graph.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime

from stillframe.block.graph import BlockGraph
from stillframe.block.node import Node, SnapshotInfo
from stillframe.errors import NotFound
from stillframe.jobs import JobQueue
from stillframe.machine.control import Quiesce, StreamedMachine
from stillframe.machine.machine import Machine
from stillframe.snapshots import all_nodes, internal, recovery, selection
from stillframe.snapshots.context import AtRest, Context, told
from stillframe.snapshots.delete import delete
from stillframe.snapshots.keeping import KeepingOptions, keeping
from stillframe.snapshots.selection import Found, LoadSelection, SaveSelection, SnapshotNode

_log = logging.getLogger(__name__)


class MachineSnapshots:
    """Every method may block and is called from a data-plane thread.

    :param options: how states are kept. :param at_rest: held for each instant.
    :ivar queue: the turns of the jobs that call these methods.
    :ivar keeping: how the machine's state is saved and loaded.
    """

    def __init__(
        self,
        machine: Machine | StreamedMachine,
        graph: BlockGraph,
        options: KeepingOptions,
        at_rest: AtRest = nullcontext,
    ) -> None:
        self._machine = machine
        self._graph = graph
        self.queue = JobQueue()
        self.keeping = keeping(machine, options, at_rest)
        self._at_rest = at_rest
        self._recovering = threading.Lock()
        self._told: set[str] = set()

    def recover(self) -> None:
        """Bring operations to an end that a crash has left unfinished on the nodes; done before each of the others.

        What cannot be resolved with the nodes that are here stays as it is, is not offered, and is logged once.
        """
        with self._recovering:
            for found in map(str, recovery.recover_graph(self._graph)):
                if found not in self._told:
                    self._told.add(found)
                    _log.warning("%s", found)

    # With a list of nodes: snapshot-save, snapshot-load, snapshot-delete.

    def save(
        self,
        context: Context,
        tag: str,
        vmstate: str,
        devices: Sequence[str],
        *,
        quiesce: Quiesce | None = None,
    ) -> None:
        """Snapshot the machine onto these nodes.

        :param vmstate: which of them gets the machine state. :param quiesce: the guest's file systems stand still for it.
        :raise Refused: nothing was touched.
        :raise Failed: nothing is left behind. :raise Cancelled: nothing is left behind.
        """
        self.recover()
        chosen = selection.for_save(selection.listed(self._graph, devices), tag, vmstate)
        self._save(context, chosen, quiesce=quiesce)

    def load(
        self,
        context: Context,
        tag: str,
        vmstate: str,
        devices: Sequence[str],
        *,
        eager: bool = False,
        replace: bool = False,
    ) -> None:
        """Bring the machine and these nodes back to a snapshot; after an error the guest is as it was.

        :param eager: the guest runs only when all of its memory is there.
        :param replace: a guest of another program is ended first; an error after that says so.
        :raise Refused: :raise Corrupt: :raise Failed: :raise Cancelled:
        """
        self.recover()
        chosen = selection.for_load(selection.listed(self._graph, devices), tag, vmstate)
        self._load(context, chosen, eager=eager, replace=replace)

    def delete(self, context: Context, tag: str, devices: Sequence[str]) -> None:
        """Delete the snapshot of that name wherever these nodes have it; nowhere is fine, too.

        :raise Refused: :raise Failed: :raise Cancelled: nothing has changed.
        """
        self.recover()
        self._delete(context, selection.for_delete(selection.listed(self._graph, devices), tag))

    # Without one: savevm, loadvm, delvm, info snapshots.

    def save_everything(self, context: Context, tag: str | None) -> str:
        """`savevm`: snapshot all nodes that the guest or the user uses. An older one of that name is
        replaced, once the new one is safe (savevm-replaces-last).

        :param tag: None for a name made of the local time. :return: the name.
        """
        self.recover()
        name = f"vm-{datetime.now():%Y%m%d%H%M%S}" if tag is None else tag
        nodes = all_nodes.included(self._graph)
        chosen = selection.for_save(nodes, name, None, replace=True)
        older = selection.for_delete(nodes, name)
        self._save(context, chosen)
        with told(f"Snapshot '{name}' was saved, and the older one of that name is still there"):
            self._delete(context, older)
        return name

    def load_everything(self, context: Context, tag: str) -> None:
        """`loadvm`: as `load`, on all nodes."""
        self.recover()
        nodes = all_nodes.included(self._graph)
        if not nodes:
            raise NotFound("no block device can store vmstate for snapshot")
        self._load(context, selection.for_load(nodes, tag, None))

    def delete_everywhere(self, context: Context, tag: str) -> None:
        """`delvm`: as `delete`, on all nodes."""
        self.recover()
        self._delete(context, selection.for_delete(all_nodes.included(self._graph), tag))

    def listing(self) -> all_nodes.Listing:
        """`info snapshots`."""
        self.recover()
        return all_nodes.listing(self._graph)

    # One disk alone.

    def create_internal(self, device: str, name: str) -> None:
        """`blockdev-snapshot-internal-sync`. :param device: of the guest, or a node-name."""
        with self.instant() as (instant, find):
            instant.add(find(device), device, name)
            instant.happen()

    @contextmanager
    def instant(self) -> Iterator[tuple[internal.Instant, Callable[[str], Node]]]:
        """Snapshots of single disks that are made together.

        :return: what gathers them, and what finds a node by the guest's device or by its own name, and keeps it open for
            the length of the block.
        """
        self.recover()
        with ExitStack() as held:

            def find(device: str) -> Node:
                node = self._graph.find(self.node_name(device))
                held.enter_context(self._graph.hold(node, "blockdev-snapshot-internal-sync"))
                return node

            yield internal.Instant(self._machine, self._graph, self._at_rest), find

    def delete_internal(self, device: str, *, id: str | None, name: str | None) -> SnapshotInfo:
        """`blockdev-snapshot-delete-internal-sync`. :return: what was deleted."""
        self.recover()
        node = self._graph.find(self.node_name(device))
        with self._graph.hold(node, "blockdev-snapshot-delete-internal-sync"):
            return internal.delete(self._graph, node, device, id=id, name=name)

    def node_name(self, device: str) -> str:
        """Of a device of the guest, or of the node itself."""
        names = {disk.device_id: disk.node_name for disk in self._machine.disks}
        return names.get(device, device)

    # Within.

    @contextmanager
    def _held(self, nodes: Sequence[SnapshotNode], doing: str) -> Iterator[None]:
        with ExitStack() as stack:
            for node in nodes:
                stack.enter_context(self._graph.hold(node.node, doing))
            yield

    def _save(self, context: Context, chosen: SaveSelection, *, quiesce: Quiesce | None = None) -> None:
        with self._held(chosen.nodes, "snapshot-save"):
            self.keeping.save(chosen, context, quiesce=quiesce)

    def _load(
        self, context: Context, chosen: LoadSelection, *, eager: bool = False, replace: bool = False
    ) -> None:
        with self._held([found.node for found in chosen.all], "snapshot-load"):
            self.keeping.load(chosen, context, eager=eager, replace=replace)

    def _delete(self, context: Context, found: Sequence[Found]) -> None:
        with self._held([each.node for each in found], "snapshot-delete"):
            delete(found, context)
