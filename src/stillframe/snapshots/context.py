"""What a snapshot operation is given by whoever runs it: a job's context, or one that nobody watches."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from stillframe.errors import StillframeError


class Context(Protocol):
    """As `jobs.JobContext`, as far as a snapshot operation needs it."""

    def progress(self, done: int, total: int) -> None:
        """How far the work is: bytes, and one unit for the commit, so that only what is committed is
        complete."""
        ...

    def chose(self, what: str, chosen: str, why: str = "") -> None:
        """In which of several ways the work is done: `chosen`, and why not otherwise; see docs/monitor.md."""
        ...

    def checkpoint(self) -> None:
        """Stand still here during a pause. :raise Cancelled: somebody asked to cancel."""
        ...

    def refuse_if_cancelled(self) -> None:
        """A checkpoint for a place where nobody may stand still: a pause is not obeyed. :raise Cancelled:"""
        ...

    def moved(self, count: int) -> None:
        """So many bytes were read or written while the guest runs: a checkpoint, and a rest where a limit of speed asks for
        one. :raise Cancelled: somebody asked to cancel."""
        ...

    def point_of_no_return(self) -> None:
        """The last checkpoint: what follows is done to its end. :raise Cancelled: somebody asked before."""
        ...


AtRest = Callable[[], AbstractContextManager[object]]
"""A block in which others than the guest, such as an export's clients, change no disk either."""


class Unwatched:
    """The context of an operation that nobody follows, pauses or cancels."""

    def progress(self, done: int, total: int) -> None:
        """Nobody looks."""

    def chose(self, what: str, chosen: str, why: str = "") -> None:
        """Nobody asks."""

    def checkpoint(self) -> None:
        """Nobody pauses or cancels."""

    def refuse_if_cancelled(self) -> None:
        """Nobody cancels."""

    def moved(self, count: int) -> None:
        """Nobody asks for less."""
        self.checkpoint()

    def point_of_no_return(self) -> None:
        """Nobody cancels."""


@contextmanager
def told(prefix: str) -> Iterator[None]:
    """Errors of the block get `prefix` and a colon before their own words, as QEMU does; their class
    stays."""
    try:
        yield
    except StillframeError as error:
        error.message = f"{prefix}: {error.message}"
        error.args = (error.message,)
        raise


def add_left(error: BaseException, text: str) -> None:
    """Tell with an error, whatever it is, one more thing about the state in which it leaves things."""
    if isinstance(error, StillframeError):
        error.left = f"{error.left}; {text}" if error.left else text
    else:
        error.add_note(text)
