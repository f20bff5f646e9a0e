"""Which of a client's commands QEMU gets, by its monitor for programs and by the one for people.

QEMU's disks are our exports, one node for each, from its start to its end. A command that puts another node beneath a device, has
QEMU write elsewhere what the guest writes, or writes into a disk behind the guest, would make every later snapshot miss something
without a word. So whatever a command's name says is about disks is not there, unless it is known here to be harmless: the next
QEMU has commands that nobody has looked at yet.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from stillframe.errors import CommandNotFound, Unsupported
from stillframe.machine.engines.qemu.command_line import drive_of

_OURS_ALONE: Final = frozenset({"quit", "qmp_capabilities", "human-monitor-command"})
_OF_MIGRATION: Final = re.compile("migrate|query-migrate(-capabilities|-parameters)?$")
_OF_DISKS: Final = re.compile(
    "block|drive|medium|eject|mirror|snapshot|export|nbd|transaction|commit|backing|bitmap"
)
_ONLY_ASKS: Final = re.compile("(x-|x-debug-)?query-")
_HARMLESS: Final = frozenset(
    {
        # How fast, and what is counted or told of it.
        "block_set_io_throttle",
        "block-latency-histogram-set",
        "block-set-write-threshold",
        # The medium stays; that the tray is open is the device's state.
        "blockdev-open-tray",
        "blockdev-close-tray",
    }
)
_NODE_PROPERTY: Final = re.compile(r"drive|pflash\d+")
"""Of a device its node; of a board those of its flash banks. QEMU lets them be set while the device is at work."""


def is_passed(command: str) -> bool:
    """Whether QEMU gets a command of this name, of either monitor's."""
    if command in _OURS_ALONE or _OF_MIGRATION.match(command):
        return False
    return command in _HARMLESS or bool(_ONLY_ASKS.match(command)) or not _OF_DISKS.search(command)


def refuse(command: str, arguments: Mapping[str, Any], is_new: Callable[[str], bool]) -> None:
    """Refuse what QEMU is not to get.

    :param is_new: whether a node is ours that QEMU has not.
    :raise CommandNotFound: the command is not there. :raise Unsupported: it is, but not for this.
    """
    if not is_passed(command):
        raise CommandNotFound(f"The command {command} has not been found")
    if command == "qom-set":
        _refuse_other_node(arguments)
    elif command == "device_add":
        _refuse_new_disk(arguments, is_new)


def refuse_typed(command: str, words: Sequence[str], is_new: Callable[[str], bool]) -> None:
    """The same for people. :param words: that follow the command."""
    arguments: Mapping[str, Any] = {}
    match command, [word for word in words if not word.startswith("-")]:
        case "change", [device, *_] if device != "vnc":
            # The medium of a drive.
            raise CommandNotFound(f"The command {command} has not been found")
        case "qom-set", [path, name, *_]:
            arguments = {"path": path, "property": name}
        case "device_add", [device, *_]:
            arguments = {"driver": device.partition(",")[0], "drive": drive_of(device)}
    refuse(command, arguments, is_new)


def _refuse_other_node(arguments: Mapping[str, Any]) -> None:
    name = arguments.get("property")
    if isinstance(name, str) and _NODE_PROPERTY.fullmatch(name):
        raise Unsupported(
            f"Property '{name}' of '{arguments.get('path')}' cannot be set: "
            "devices keep the nodes that they were started with",
            remedy="Start the machine with another disk.",
        )


def _refuse_new_disk(arguments: Mapping[str, Any], is_new: Callable[[str], bool]) -> None:
    drive = arguments.get("drive")
    if isinstance(drive, str) and is_new(drive):
        raise Unsupported(
            f"Device '{arguments.get('driver')}' cannot use node '{drive}': "
            "QEMU has the disks that were given on the command line, and gets no other while it runs",
            remedy="Start the machine with the disk: --blockdev for the node, --device for the device.",
        )
