"""The human monitor's commands through QMP."""

from msgspec import UNSET, UnsetType

from stillframe.errors import InvalidRequest
from stillframe.monitor.hmp import run
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command


class HumanCommand(Structure):
    """A line as a human would type it.

    :param command_line: the line; `help` lists what is known.
    :param cpu_index: of the processor that the command is about; there is one, 0.
    """

    command_line: str
    cpu_index: int | UnsetType = UNSET


@command("human-monitor-command", features=["savevm-monitor-nodes"])
def human_monitor_command(host: Host, arguments: HumanCommand) -> str:
    """Run a human command and return what it prints, errors included."""
    if arguments.cpu_index not in (UNSET, 0):
        raise InvalidRequest("Parameter 'cpu-index' expects a CPU number")
    return run(host, arguments.command_line)
