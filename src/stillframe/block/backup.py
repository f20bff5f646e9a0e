"""One disk copied onto another node while the guest goes on: the content of one instant.

source   an image that can keep an instant (qcow2) is frozen for as long as the copy takes, and written all the while;
         any other stands still: nobody may write to it
target   nobody else may write to it; what it held is lost from the first piece on, whatever becomes of the copy
"""

from contextlib import ExitStack

from stillframe.block.copy import CopyOptions, Progress, copy
from stillframe.block.graph import BlockGraph
from stillframe.block.node import Node
from stillframe.errors import Refused, Unsupported


class Backup:
    """Refuses, then holds both nodes until `release`; any thread may call each method, one at a time.

    :param user: the job, in the words of a refusal to others.
    :param compress: store clusters compressed where that makes them smaller.
    :raise Refused: in QEMU's words; nothing is held.
    """

    def __init__(
        self, graph: BlockGraph, source: Node, target: Node, user: str, *, compress: bool = False
    ) -> None:
        from stillframe.block.qcow2 import Qcow2Node

        if source is target:
            raise Refused("Source and target cannot be the same")
        if compress and not isinstance(target, Qcow2Node):
            raise Unsupported("Compression is not supported for this drive ")
        if source.size != target.size:
            raise Refused("Source and target image have different sizes")
        if target.read_only:
            raise Refused("Could not create node: Block node is read-only")
        self.size = source.size
        self._source = source
        self._target = target
        self._options = CopyOptions(compress=compress)
        self._view: Node | None = None
        self._can_freeze = source.snapshot_store is not None and not source.read_only
        self._uses = ExitStack()
        try:
            if self._can_freeze:
                self._uses.enter_context(graph.hold(source, user))
            else:
                self._uses.enter_context(graph.use(source, user, writable=False))
            self._uses.enter_context(graph.use(target, user, writable=True))
        except BaseException:
            self._uses.close()
            raise

    def begin(self) -> None:
        """The instant has come: requests of the guest are held back. :raise InUse: another instant is kept already."""
        if self._can_freeze:
            view = self._source.freeze_view()
            if view is None:
                raise Unsupported(f"Node '{self._source.node_name}' cannot be kept as it is at an instant")
            self._view = view
            self._uses.callback(view.close)

    def run(self, progress: Progress) -> None:
        """Copy; durable at the return. :raise Failed: storage; the target is neither what it was nor a copy."""
        copy(self._view or self._source, self._target, self._options, progress=progress)

    def release(self) -> None:
        """Give both nodes back; a second time does nothing."""
        self._uses.close()
