"""Commands on the machine as a whole, and the events that tell what became of it."""

from enum import Enum

import msgspec

from stillframe.machine.run_state import RunState
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command, event


class ShutdownCause(Enum):
    """Who ended or reset the machine, and how."""

    NONE = "none"
    HOST_ERROR = "host-error"
    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_QMP_SYSTEM_RESET = "host-qmp-system-reset"
    HOST_SIGNAL = "host-signal"
    HOST_UI = "host-ui"
    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_RESET = "guest-reset"
    GUEST_PANIC = "guest-panic"
    SUBSYSTEM_RESET = "subsystem-reset"
    SNAPSHOT_LOAD = "snapshot-load"


class StatusInfo(Structure):
    """What the machine is doing.

    :param running: whether the guest runs.
    :param status: the run state.
    """

    running: bool
    status: RunState


class NameInfo(Structure):
    """:param name: as the user calls the machine; absent without a name."""

    name: str | msgspec.UnsetType = msgspec.UNSET


class UuidInfo(Structure):
    """:param uuid: the machine's; all zeros for none."""

    uuid: str = msgspec.field(name="UUID")


@event("STOP")
class Stop(Structure):
    """The guest stands still."""


@event("RESUME")
class Resume(Structure):
    """The guest runs again."""


@event("POWERDOWN")
class Powerdown(Structure):
    """The power button was pressed."""


@event("SHUTDOWN")
class Shutdown(Structure):
    """The machine has ended, or is about to.

    :param guest: whether the guest did it.
    :param reason: how.
    """

    guest: bool
    reason: ShutdownCause


@event("RESET")
class Reset(Structure):
    """The machine was reset.

    :param guest: whether the guest did it.
    :param reason: how.
    """

    guest: bool
    reason: ShutdownCause


@command("query-status", at_once=True)
def query_status(host: Host) -> StatusInfo:
    """What the machine is doing."""
    state = host.machine.run_state
    return StatusInfo(state is RunState.RUNNING, state)


@command("query-name", at_once=True)
def query_name(host: Host) -> NameInfo:
    """The machine's name."""
    return NameInfo() if host.name is None else NameInfo(host.name)


@command("query-uuid")
def query_uuid(host: Host) -> UuidInfo:
    """The machine's UUID."""
    return UuidInfo(host.uuid())


@command("stop")
def stop(host: Host) -> None:
    """Pause the guest; nothing happens if it does not run."""
    host.machine.stop()


@command("cont")
def cont(host: Host) -> None:
    """Let the guest run; nothing happens if it does."""
    host.machine.cont()


@command("system_reset")
def system_reset(host: Host) -> None:
    """Press the reset button."""
    host.machine.reset()


@command("system_powerdown")
def system_powerdown(host: Host) -> None:
    """Press the power button; what comes of it is the guest's affair."""
    host.machine.powerdown()


@command("quit")
def end(host: Host) -> None:
    """End the machine. Jobs are cancelled and waited for, and told in events before the answer."""
    host.end()
