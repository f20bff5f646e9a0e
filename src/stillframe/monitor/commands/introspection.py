"""Commands about the monitor itself: negotiation, versions, the schema."""

from functools import cache
from typing import Any

import msgspec

from stillframe.machine.control import OtherMonitor
from stillframe.monitor.host import Host
from stillframe.monitor.introspect import schema_entries
from stillframe.monitor.schema import COMMANDS, Structure, command
from stillframe.monitor.session import VERSION, QMPCapability, Session, VersionInfo


class Negotiation(Structure):
    """:param enable: capabilities of the greeting to switch on."""

    enable: list[QMPCapability] | msgspec.UnsetType = msgspec.UNSET


class CommandInfo(Structure):
    """:param name: the command's name."""

    name: str


class SchemaEntry(Structure):
    """An entry of the schema; which other members it has depends on its meta-type.

    :param name: of the command, event or type; names of types are numbers and mean nothing.
    :param meta_type: command, event, object, enum, array, builtin or alternate.
    """

    name: str
    meta_type: str


@command("qmp_capabilities")
def qmp_capabilities(session: Session, arguments: Negotiation) -> None:
    """End the negotiation: from then on other commands are accepted, and events are sent."""
    session.negotiate([] if isinstance(arguments.enable, msgspec.UnsetType) else arguments.enable)


@command("query-version", at_once=True)
def query_version(host: Host) -> VersionInfo:
    """Whose words are spoken, and who speaks."""
    return VERSION


@command("query-commands")
def query_commands(host: Host) -> list[CommandInfo]:
    """The names of all commands."""
    other = host.machine.other_monitor
    passed = [] if other is None else _passed(other)
    return [CommandInfo(name) for name in (*_own(other), *passed)]


@command("query-qmp-schema", returns=list[SchemaEntry])
def query_qmp_schema(host: Host) -> Any:
    """Every command and event with its arguments and types, in the form of QEMU's introspection. Where a QEMU runs the guest, those
    of its commands that are passed on to it are there as it says them.
    """
    other = host.machine.other_monitor
    if other is None:
        return _entries()
    return schema_entries(other.execute("query-qmp-schema", {}), _passed(other))


def _passed(other: OtherMonitor) -> list[str]:
    own = _own(other)
    return [name for name in other.commands() if name not in own]


def _own(other: OtherMonitor | None) -> list[str]:
    """The commands that are answered here: what is asked of the program is asked of the one that runs the guest."""
    return [name for name, known in COMMANDS.items() if other is None or not known.of_program]


@cache
def _entries() -> list[dict[str, Any]]:
    return schema_entries()
