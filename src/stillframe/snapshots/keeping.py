"""How the state of a machine gets into snapshots and out of them, by the kind of machine.

A machine of this process is taken apart into devices and pages (save.py, load.py); one that gives its state as a stream is followed
by a successor that takes it (streamed_save.py, streamed_load.py). Both remember the snapshot that the machine stands on.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol
from uuid import UUID

from stillframe.errors import Unsupported
from stillframe.machine.control import Quiesce, StreamedMachine
from stillframe.machine.machine import Machine
from stillframe.machine.tracking import HashName, track
from stillframe.snapshots.context import AtRest, Context
from stillframe.snapshots.ground import STALE_AT_MOST, Ground
from stillframe.snapshots.load import load
from stillframe.snapshots.save import save
from stillframe.snapshots.selection import LoadSelection, SaveSelection
from stillframe.snapshots.streamed_load import load_streamed
from stillframe.snapshots.streamed_save import save_streamed

_NO_AGENT: Final = "this engine's machine has no port for a guest agent"


@dataclass(frozen=True, slots=True)
class KeepingOptions:
    """What a machine's user may choose.

    :param algorithm: finds changed pages of a machine of this process where the kernel does not tell.
    :param stale_at_most: the part of a state, from 0 to 1, that may be records out of force; with more of them a save is a whole
        one.
    """

    algorithm: HashName = "xxh3"
    stale_at_most: float = STALE_AT_MOST


class Keeping(Protocol):
    """Of one machine; called by one snapshot operation at a time."""

    def save(self, selection: SaveSelection, context: Context, *, quiesce: Quiesce | None = None) -> None:
        """See `save.save`. :param quiesce: the guest's file systems stand still for it."""
        ...

    def load(
        self, selection: LoadSelection, context: Context, *, eager: bool = False, replace: bool = False
    ) -> None:
        """See `load.load`. :param replace: see `streamed_load.load_streamed`."""
        ...


class InProcess:
    """Of a machine of this process. :ivar ground: the snapshot that it stands on, and what has changed since."""

    def __init__(self, machine: Machine, options: KeepingOptions, at_rest: AtRest) -> None:
        self._machine = machine
        self._at_rest = at_rest
        self.ground = Ground(machine, partial(track, algorithm=options.algorithm), options.stale_at_most)

    def save(self, selection: SaveSelection, context: Context, *, quiesce: Quiesce | None = None) -> None:
        if quiesce is Quiesce.REQUIRED:
            raise Unsupported(f"The guest's file systems cannot be frozen: {_NO_AGENT}")
        if quiesce is not None:
            context.chose("file-systems", "running", _NO_AGENT)
        save(self._machine, selection, context, ground=self.ground, at_rest=self._at_rest)

    def load(
        self, selection: LoadSelection, context: Context, *, eager: bool = False, replace: bool = False
    ) -> None:
        if replace:
            raise Unsupported(
                "This engine's machine takes a snapshot's state itself: there is no other that could replace it",
                remedy="Load without `replace`.",
            )
        load(self._machine, selection, context, ground=self.ground, eager=eager, at_rest=self._at_rest)


class Streamed:
    """Of a machine elsewhere. :ivar standing: the UUID of the snapshot that it stands on."""

    def __init__(self, machine: StreamedMachine, options: KeepingOptions, at_rest: AtRest) -> None:
        self._machine = machine
        self._options = options
        self._at_rest = at_rest
        self.standing: UUID | None = None

    def save(self, selection: SaveSelection, context: Context, *, quiesce: Quiesce | None = None) -> None:
        self.standing = save_streamed(
            self._machine,
            selection,
            context,
            standing=self.standing,
            at_rest=self._at_rest,
            quiesce=quiesce,
            stale_at_most=self._options.stale_at_most,
        )

    def load(
        self, selection: LoadSelection, context: Context, *, eager: bool = False, replace: bool = False
    ) -> None:
        self.standing = load_streamed(
            self._machine, selection, context, eager=eager, replace=replace, at_rest=self._at_rest
        )


def keeping(machine: Machine | StreamedMachine, options: KeepingOptions, at_rest: AtRest) -> Keeping:
    """The way for this machine.

    :param at_rest: held for the instant of a save, and of a load.
    """
    if isinstance(machine, Machine):
        return InProcess(machine, options, at_rest)
    return Streamed(machine, options, at_rest)
