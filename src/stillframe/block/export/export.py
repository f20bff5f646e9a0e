"""A node, or one of its snapshots, as it is served: what may be done with it, and when.

Every request is admitted and ends; between `hold` and `release` none is in flight and new ones wait. A request's data has
arrived before it is admitted and is sent after it has ended, so nobody waits for a client here.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stillframe.block.export.nbd import ShuttingDown
from stillframe.block.node import Node


class Export:
    """Any number of connections use it, on threads of their own.

    :param id: unique among the exports of a process. :param name: what clients ask for.
    :param node: whoever makes the export keeps it open until the export is closed.
    :param writable: False refuses every change.
    """

    def __init__(
        self, id: str, node: Node, *, name: str | None = None, description: str = "", writable: bool = False
    ) -> None:
        self.id = id
        self.name = id if name is None else name
        self.description = description
        self.node = node
        self.writable = writable
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._in_flight = 0
        self._holds = 0
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def enter(self) -> None:
        """Begin a request, to be ended by `leave`; waits while the export is held.

        :raise ShuttingDown: the export was closed, also while this waited.
        """
        with self._lock:
            while self._holds and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                raise ShuttingDown(f"Export '{self.id}' is shutting down")
            self._in_flight += 1

    def leave(self) -> None:
        """The request has ended."""
        with self._lock:
            self._in_flight -= 1
            if not self._in_flight:
                self._changed.notify_all()

    def hold(self) -> None:
        """Let no request begin until `release`, and wait for those in flight: each ends with its I/O.

        Holds are counted; the last release lets requests go on.
        """
        with self._lock:
            self._holds += 1
            try:
                while self._in_flight:
                    self._changed.wait()
            except BaseException:
                self._end_hold()
                raise

    def release(self) -> None:
        """The opposite of one `hold`."""
        with self._lock:
            self._end_hold()

    @contextmanager
    def held(self) -> Iterator[None]:
        """`hold` for the length of a block."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def close(self) -> None:
        """No request begins any more, and none is in flight at the return; those that waited are refused."""
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()
            while self._in_flight:
                self._changed.wait()

    def _end_hold(self) -> None:
        self._holds -= 1
        self._changed.notify_all()
