"""Work for the vCPU's thread, put there by other threads: it runs between two instructions."""

import threading
from collections import deque
from collections.abc import Callable

Work = Callable[[], None]


class Mailbox:
    """A queue of functions with a doorbell.

    :param ring: called after every post, from the posting thread; it makes a running engine come to a boundary early.
    """

    def __init__(self) -> None:
        self._bell = threading.Condition()
        self._work: deque[Work] = deque()
        self._rung = False
        self.ring: Callable[[], None] = lambda: None

    def post(self, work: Work) -> None:
        """Have `work` run at a boundary, in order of arrival. Any thread."""
        with self._bell:
            self._work.append(work)
            self._bell.notify_all()
        self.ring()

    def wake(self) -> None:
        """End a `wait` early, the present or the next one, without work."""
        with self._bell:
            self._rung = True
            self._bell.notify_all()

    @property
    def waiting(self) -> bool:
        """Whether there is work."""
        return bool(self._work)

    def run(self) -> None:
        """Run what has been posted so far, and what it posts. Only whoever owns the machine calls this."""
        while self._work:
            self._work.popleft()()

    def wait(self, timeout: float | None) -> None:
        """Sleep until there is work, until `wake`, or for `timeout` seconds."""
        with self._bell:
            if not self._work and not self._rung:
                self._bell.wait(timeout)
            self._rung = False
