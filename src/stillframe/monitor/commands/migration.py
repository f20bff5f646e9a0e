"""What managers ask about migration before anything else, though they want none: there is none here.

Where a QEMU runs the guest, neither command is there: its migrations are how stillframe saves and loads.
"""

from enum import Enum

from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command


class MigrationCapability(Enum):
    """What a migration can do. Without one, no more than be told of in events, of which there are none."""

    EVENTS = "events"


class MigrationCapabilityStatus(Structure):
    """:param capability: its name. :param state: whether it is switched on."""

    capability: MigrationCapability
    state: bool


class MigrationCapabilities(Structure):
    """:param capabilities: those to be switched."""

    capabilities: list[MigrationCapabilityStatus]


@command("query-migrate-capabilities", at_once=True, of_program=True)
def query_migrate_capabilities(host: Host) -> list[MigrationCapabilityStatus]:
    """What a migration can do."""
    return [MigrationCapabilityStatus(MigrationCapability.EVENTS, host.migration_events)]


@command("migrate-set-capabilities", at_once=True, of_program=True)
def migrate_set_capabilities(host: Host, arguments: MigrationCapabilities) -> None:
    """Switch what a migration can do: whether events tell of it."""
    for each in arguments.capabilities:
        host.migration_events = each.state
