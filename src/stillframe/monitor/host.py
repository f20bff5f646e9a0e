"""What a monitor serves: a machine, its nodes, its jobs; what every command's function is given."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stillframe.block.export.exports import NodeExports
from stillframe.block.graph import BlockGraph
from stillframe.events import EventBus
from stillframe.jobs import Jobs
from stillframe.machine.control import StreamedMachine
from stillframe.machine.machine import Machine
from stillframe.snapshots.keeping import KeepingOptions
from stillframe.snapshots.machine_snapshots import MachineSnapshots

_NO_UUID = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class CharacterDevice:
    """What a monitor or the serial port is at. :param label: its id. :param filename: what it is, in QEMU's words, at this time."""

    label: str
    filename: Callable[[], str]


@dataclass(slots=True, eq=False)
class Host:
    """One of a process.

    :param keeping: how states are kept.
    :param own_uuid: the machine's UUID, where it was given one.
    :param command_line: the options of QEMU's command line that the program takes, each with its parameters and their types;
        empty where it takes its own.
    :param chardevs: those in use. :param peripherals: the devices with an id, and QEMU's type of each.
    :ivar migration_events: whether clients have asked for them; there are no migrations.
    :ivar snapshots: the machine's; what changes them runs on its queue, as a job or inside
        `Jobs.run_internal`.
    :ivar exports: the nodes that are served to other processes.
    """

    machine: Machine | StreamedMachine
    graph: BlockGraph
    jobs: Jobs
    events: EventBus
    keeping: KeepingOptions = field(default_factory=KeepingOptions)
    own_uuid: str | None = None
    command_line: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    chardevs: tuple[CharacterDevice, ...] = ()
    peripherals: Mapping[str, str] = field(default_factory=dict)
    migration_events: bool = False
    snapshots: MachineSnapshots = field(init=False)
    exports: NodeExports = field(init=False)
    _over: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self) -> None:
        self.exports = NodeExports(self.graph, self.events)
        self.snapshots = MachineSnapshots(self.machine, self.graph, self.keeping, self.exports.drained)

    @property
    def name(self) -> str | None:
        """As the user calls the machine."""
        return self.machine.name

    def uuid(self) -> str:
        """The machine's, all zeros for none; as whoever runs the guest knows it. :raise Failed: he does not answer."""
        other = self.machine.other_monitor
        return (self.own_uuid or _NO_UUID) if other is None else str(other.execute("query-uuid", {})["UUID"])

    @property
    def over(self) -> bool:
        """Whether `end` was called: monitors send what they have to say and close."""
        return self._over.is_set()

    def end(self, reason: str = "host-qmp-quit") -> None:
        """End the machine, its jobs and exports, in the order in which QEMU tells it: SHUTDOWN, then the jobs, newest
        first.

        Waits for every job to undo its work, or to finish what cannot be undone. A second call waits as well.

        :param reason: as the SHUTDOWN event says it.
        """
        self.machine.quit(reason)
        self.jobs.cancel_all_and_wait()
        self.exports.close()
        self._over.set()
