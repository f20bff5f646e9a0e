"""Memory that comes after the guest runs again: what each load asks before, and says when it does not come."""

from collections.abc import Sequence
from typing import Protocol

from stillframe.errors import Corrupt, StillframeError
from stillframe.events import EventBus
from stillframe.snapshots.ground import read_page_index
from stillframe.snapshots.selection import Found
from stillframe.vmstate.page_index import PageIndex
from stillframe.vmstate.ram import RamBlock


class Stopped(Protocol):
    """A machine that can be stopped for good, until a load."""

    @property
    def events(self) -> EventBus: ...

    def lose_memory(self, why: str) -> None: ...


def known_pages(found: Found, blocks: Sequence[RamBlock]) -> tuple[PageIndex | None, str]:
    """Where each page lies in the snapshot's stream; else why that is not known."""
    place = found.snapshot.lineage.page_index if found.snapshot.lineage else None
    if place is None:
        return None, f"snapshot '{found.snapshot.name}' has no page index"
    try:
        return read_page_index(found.node, found.snapshot, place, blocks), ""
    except Corrupt as error:
        return None, f"the page index cannot be used: {error.message}"


def stop_without(machine: Stopped, found: Found, error: BaseException, way_out: str) -> None:
    """Its memory has not come as a whole: the guest is stopped with an event, and the error says so.

    :param way_out: what can be done then.
    """
    why = error.message if isinstance(error, StillframeError) else str(error) or type(error).__name__
    machine.lose_memory(f"The memory of snapshot '{found.snapshot.name}' has not come as a whole: {why}")
    machine.events.emit(
        "BLOCK_IO_ERROR",
        device="",
        node_name=found.node.name,
        operation="read",
        action="stop",
        nospace=False,
        reason=why,
    )
    if isinstance(error, StillframeError):
        error.left = f"The guest is stopped; {way_out}"
