"""Forked children that go on in our own program, and what they must not have of their parent.

A child holds the descriptors that it is given and no other: an image's locks, a socket, the parent's output end with the parent.
All signals stay blocked in it: a Ctrl-C in the terminal goes to the child, too, and is the parent's to answer; in the child it
would begin to undo what the parent is at, or wake the parent a second time through what both hold. Who forks ends it by closing
a pipe.
"""

import gc
import os
import signal
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress

_LAST_DESCRIPTOR = 1 << 20


def fork_child(work: Callable[[], None], kept: Collection[int]) -> int:
    """Fork a child that does `work` and ends.

    :param work: takes no lock that another thread of the parent may hold. :param kept: descriptors that it needs.
    :return: the process id, for `wait_for_child`. :raise OSError: the host does not fork.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = -1
    try:
        with warnings.catch_warnings():
            # What Python warns of, a lock that another thread holds, the child does not ask for.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
    finally:
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if pid:
        return pid
    try:
        gc.disable()
        ordered = sorted(kept)
        for last, after in zip([-1, *ordered], [*ordered, _LAST_DESCRIPTOR], strict=True):
            os.closerange(last + 1, after)
        work()
    finally:
        os._exit(0)


def wait_for_child(pid: int) -> None:
    """Until it has ended; it was told to."""
    # Who started us with SIGCHLD ignored has the kernel wait for our children.
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
