"""What there is to say of record and replay: nothing is recorded here."""

from enum import Enum

import msgspec

from stillframe.machine.machine import Machine
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command


class ReplayMode(Enum):
    """What is done with the events that a guest cannot know beforehand; always `none`."""

    NONE = "none"
    RECORD = "record"
    PLAY = "play"


class ReplayInfo(Structure, kw_only=True):
    """Where a recording stands.

    :param mode: what is done.
    :param filename: of the recording; absent without one.
    :param icount: instructions executed so far; 0 where they are not counted.
    """

    mode: ReplayMode
    filename: str | msgspec.UnsetType = msgspec.UNSET
    icount: int


@command("query-replay")
def query_replay(host: Host) -> ReplayInfo:
    """Whether the guest is recorded or replayed, and how many instructions it has executed."""
    machine = host.machine
    icount = 0
    if isinstance(machine, Machine) and machine.clock.icount_shift is not None:
        clock = machine.clock
        icount = machine.at_boundary(lambda: clock.instructions)
    return ReplayInfo(mode=ReplayMode.NONE, icount=icount)
