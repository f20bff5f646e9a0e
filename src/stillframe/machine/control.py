"""What a monitor, and the snapshots, ask of a machine, whoever runs its guest.

`machine.Machine` runs it in this process. A `StreamedMachine` has it run elsewhere and gives and takes its state as a stream:
`engines/qemu/machine.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from stillframe.block.node import Node
from stillframe.events import EventBus
from stillframe.machine.machine import Disk, Shutdown
from stillframe.machine.run_state import RunState
from stillframe.vmstate.page_index import PageIndex
from stillframe.vmstate.relayed import RelayedHead
from stillframe.vmstate.transfer import StateSource


class Quiesce(Enum):
    """Whether the guest's file systems are to stand still at the instant of a save."""

    REQUIRED = "required"
    TRY = "try"


class OtherMonitor(Protocol):
    """The monitor of whoever runs the guest, for the commands that are not ours."""

    def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Its answer. :raise Refused: it says no, in its words. :raise PeerError: it does not answer."""
        ...

    def execute_typed(self, command: str, words: Sequence[str], line: str) -> str:
        """What a line prints at its human monitor. :param command: that it begins with. :param words: that follow.

        :raise CommandNotFound: it is none that may be given there. :raise Unsupported: not with these words.
        """
        ...

    def commands(self) -> Sequence[str]:
        """The names of its commands that may be given."""
        ...


class MachineControl(Protocol):
    """See machine.py for what each promises."""

    @property
    def name(self) -> str | None: ...

    @property
    def events(self) -> EventBus: ...

    @property
    def disks(self) -> tuple[Disk, ...]: ...

    @property
    def run_state(self) -> RunState: ...

    @property
    def shutdown(self) -> Shutdown | None: ...

    @property
    def other_monitor(self) -> OtherMonitor | None: ...

    def start(self, *, paused: bool = False) -> None: ...

    def stop(self) -> None: ...

    def cont(self) -> None: ...

    def reset(self) -> None: ...

    def powerdown(self) -> None: ...

    def quit(self, reason: str = "host-qmp-quit") -> None: ...

    def wait(self, timeout: float | None = None) -> Shutdown | None: ...

    def close(self) -> None: ...

    def at_instant(self, fn: Callable[[], None]) -> int:
        """Run `fn` while the guest stands still and none of its requests is in flight.

        :return: the guest's virtual clock, nanoseconds; 0 where it is not known.
        """
        ...


class CapturedState(Protocol):
    """The machine's state of one instant, on its way.

    :ivar how: which way it is taken. :ivar why: why not a better one; empty for the best.
    :ivar head: the stream's beginning.
    :ivar not_quiesced: why the guest's file systems were not frozen, where that was to be tried; empty if they were.
    """

    @property
    def not_quiesced(self) -> str: ...

    @property
    def how(self) -> str: ...

    @property
    def why(self) -> str: ...

    @property
    def head(self) -> RelayedHead: ...

    def source(self) -> StateSource:
        """The stream behind its head; to be read once."""
        ...

    def rest(self, offset: int, most: int) -> bytes:
        """From `offset` to the end. :raise IOFailed: it did not come as a whole."""
        ...


@dataclass(frozen=True, slots=True)
class StoredState:
    """A stream whose pages can come later.

    :param head: its beginning. :param devices: the devices' sections. :param index: where its pages lie.
    :param read: its bytes, from an offset on, so many.
    :param descriptors: all that `read` needs, so that a forked child can call it; None where it needs more.
    """

    head: RelayedHead
    devices: bytes
    index: PageIndex
    read: Callable[[int, int], bytes]
    descriptors: tuple[int, ...] | None


class Successor(Protocol):
    """A second one that is to take the machine's place, in the state of a snapshot."""

    def listen(self, *, later: bool) -> str:
        """Before anything is offered: have it wait for its state.

        :param later: for one whose memory comes after it. :return: why it waits for all of it nevertheless; empty if it does not.
        :raise StateMismatch: it does not wait, in the other program's words.
        """
        ...

    def offer(self, state: StoredState) -> None:
        """After `listen` for what comes later: give it the state, its memory excepted. It stands still when this returns.

        :raise StateMismatch: the state does not fit, in the other program's words.
        """
        ...

    def offer_all(
        self,
        size: int,
        read: Callable[[int, int], bytes],
        took: Callable[[int], None],
        checkpoint: Callable[[], None],
    ) -> None:
        """After `listen`: give it the whole stream, memory included. :raise StateMismatch: as `offer`."""
        ...

    def fill(self, progress: Callable[[int], None], checkpoint: Callable[[], None]) -> None:
        """After `offer`: its memory, while it runs. :raise IOFailed: it cannot be read."""
        ...


class StreamedMachine(MachineControl, Protocol):
    """A machine whose state is another program's stream.

    :ivar memory_size: bytes of the guest's memory.
    """

    memory_size: int

    def refuse_outside_state(self) -> None:
        """:raise Refused: a device keeps state that the stream would not hold; it is named."""
        ...

    def captured(
        self,
        at_instant: Callable[[], None],
        refuse_if_cancelled: Callable[[], None] = lambda: None,
        quiesce: Quiesce | None = None,
        others_at_rest: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> AbstractContextManager[CapturedState]:
        """The state of one instant; the guest goes on before the block begins.

        :param at_instant: called in the pause, with no request in flight.
        :param refuse_if_cancelled: called while much is to be done before the pause; raises to end it, and never waits.
        :param quiesce: freeze the guest's file systems for it, which are thawed whatever comes. :raise Refused: they cannot be.
        :param others_at_rest: a block that `at_instant` is called in, begun just before the pause and ended right after the call.
        :raise Failed: there is none to be had; the guest goes on.
        """
        ...

    def successor(self) -> AbstractContextManager[Successor]:
        """Somebody to take this machine's place, ended with the block if it has not."""
        ...

    def refuse_unlike(self, head: RelayedHead) -> None:
        """As far as it can be seen from a stream's beginning. :raise StateMismatch: the state is of another machine."""
        ...

    def standing_still(self, decides: Node, *, gone: str | None = None) -> AbstractContextManager[None]:
        """The guest waits inside the block, and whoever is the machine by then runs after it, if it ran before.

        :param decides: the node whose switch inside the block is the commit: whoever takes over after our death looks there.
        :param gone: end the guest at the block's beginning, which gives its memory and all else that it holds to a successor.
            Where none has become the machine at the end, nothing can be done with it but a load, and this says why. None: it stays.
        """
        ...

    def become(self, successor: Successor) -> None:
        """Inside `standing_still`: the successor is the machine from here on; the former one ends."""
        ...

    def lose_memory(self, why: str) -> None:
        """Not all of the memory has come: the guest cannot go on, until another load."""
        ...

    def refuse_without_memory(self) -> None:
        """:raise Refused: the guest is gone, or `lose_memory` was called; and no load since."""
        ...
