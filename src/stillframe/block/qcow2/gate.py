"""Who is using an image: its one lock, the requests in flight, the ranges being mapped, the switch of its tables.

The lock guards mapping and refcount decisions; data I/O and flushes run outside it. Three things order them:

    in flight   a request that has looked up host clusters holds a ticket until its I/O is done: a cluster that it may be
                using is not handed out again before (`quiet_since`)
    mapping     who changes the mapping of guest clusters claims their range first; claims do not overlap, readers
                do not wait for them
    switch      while a change of the snapshots stands between prepare and finish, no mapping changes; writes into
                clusters that are the image's own go on, but from commit to finish: what is the image's own in the new
                world may be a snapshot's once the change is rolled back
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stillframe.errors import InUse

_NO_CLUSTERS = (-1, -1)


class Gate:
    """One for each open image."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self._waiting = 0
        self._readers: dict[int, None] = {}
        self._writers: dict[int, None] = {}
        self._next_ticket = 0
        self._claims: list[tuple[int, int]] = []
        self._tables: set[int] = set()
        self._draining = False
        self._switching: int | None = None
        self._is_revocable = False

    def wait(self) -> None:
        """Until something has changed; the caller looks again whether it is what it waits for. Lock held."""
        self._waiting += 1
        try:
            self.changed.wait()
        finally:
            self._waiting -= 1

    def tell(self) -> None:
        """Something has changed. Lock held."""
        if self._waiting:
            self.changed.notify_all()

    # Requests in flight. `start_*` are called with the lock held.

    def start_read(self) -> int:
        """A ticket for `end_read`. Lock held."""
        self._next_ticket = ticket = self._next_ticket + 1
        self._readers[ticket] = None
        return ticket

    def end_read(self, ticket: int) -> None:
        """The request's I/O is done."""
        with self.lock:
            del self._readers[ticket]
            self.tell()

    def admit_write(self) -> None:
        """Wait while the writers are drained or held back; what was looked up before is void. Lock held.

        :raise InUse: this very thread holds them back: it must finish the change first.
        """
        while self._draining or self._is_revocable:
            if self._is_revocable and self._switching == threading.get_ident():
                raise InUse("A change of the image's snapshots is committed and not finished")
            self.wait()

    def start_write(self) -> int:
        """A ticket for `end_write`, in the same hold of the lock as `admit_write`. Lock held."""
        self._next_ticket = ticket = self._next_ticket + 1
        self._writers[ticket] = None
        return ticket

    def end_write(self, ticket: int) -> None:
        """The request's I/O is done."""
        with self.lock:
            del self._writers[ticket]
            self.tell()

    def stamp(self) -> int:
        """For `quiet_since`: later requests have higher tickets. Lock held."""
        return self._next_ticket

    def quiet_since(self, stamp: int) -> bool:
        """Whether every request that began before the stamp has ended. Lock held."""
        return all(ticket > stamp for ticket in self._readers) and all(t > stamp for t in self._writers)

    def wait_until_quiet(self) -> None:
        """Wait for every request that has begun; each ends with its I/O. Lock held."""
        stamp = self._next_ticket
        while not self.quiet_since(stamp):
            self.wait()

    # Changes of the mapping.

    @contextmanager
    def mapping(self, first: int, last: int) -> Iterator[None]:
        """Claim guest clusters `first` to `last`, both included, to change where they lie.

        Waits for overlapping claims and for a switch under way.

        :raise InUse: the switch is this very thread's: it must finish it first.
        """
        claim = (first, last)
        with self.lock:
            while self._draining or self._switching is not None or self._is_claimed(first, last):
                if self._switching == threading.get_ident():
                    raise InUse("A change of the image's snapshots is prepared and not finished")
                self.wait()
            self._claims.append(claim)
        try:
            yield
        finally:
            with self.lock:
                self._claims.remove(claim)
                self.tell()

    def claim_refcounts(self) -> None:
        """Hold a switch back while refcounts are counted down; until `unclaim_refcounts`. Lock held, no switch."""
        self._claims.append(_NO_CLUSTERS)

    def unclaim_refcounts(self) -> None:
        """The opposite of `claim_refcounts`. Lock held."""
        self._claims.remove(_NO_CLUSTERS)
        self.tell()

    def _is_claimed(self, first: int, last: int) -> bool:
        return any(first <= b and a <= last for a, b in self._claims)

    @contextmanager
    def table(self, index: int) -> Iterator[None]:
        """Claim the L2 table of an L1 entry, to replace it. Lock held, before and after."""
        while index in self._tables:
            self.wait()
        self._tables.add(index)
        try:
            yield
        finally:
            self._tables.remove(index)
            self.tell()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Give the lock up for I/O in the middle of a decision. Lock held, before and after."""
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()

    # Everybody out.

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Hold the lock with no write in flight and no mapping under change.

        Requests end with their I/O, so this ends; new ones wait.
        """
        with self.lock:
            while self._draining:
                self.wait()
            self._draining = True
            try:
                while self._writers or self._claims:
                    self.wait()
                yield
            finally:
                self._draining = False
                self.tell()

    @property
    def is_switching(self) -> bool:
        """Whether a change stands between prepare and finish. Lock held."""
        return self._switching is not None

    def begin_switch(self) -> None:
        """No mapping changes from here to `end_switch`, and none is under way.

        :raise InUse: another change is not finished.
        """
        with self.lock:
            if self._switching is not None:
                raise InUse("Another change of the image's snapshots is not finished")
            self._switching = threading.get_ident()
            try:
                while self._claims:
                    self.wait()
            except BaseException:
                # Whoever is interrupted while it waits must not hold all others back for ever.
                self._switching = None
                self.tell()
                raise

    def hold_writes(self) -> None:
        """The switch may be undone from here on: no write is admitted, until `let_writes_go` or `end_switch`."""
        with self.lock:
            self._is_revocable = True

    def let_writes_go(self) -> None:
        """The switch is final."""
        with self.lock:
            self._is_revocable = False
            self.tell()

    def end_switch(self) -> None:
        """Let writes and changes of the mapping go on; without a switch, nothing."""
        with self.lock:
            self._switching = None
            self._is_revocable = False
            self.tell()
