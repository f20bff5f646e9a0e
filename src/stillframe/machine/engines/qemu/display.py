"""The VNC display's address, which outlives any one QEMU: two cannot listen there at once, as they would while a load goes on.

So a successor's display, with all its options, is first at a socket in its private directory, and moves to the address when the
former QEMU has ended.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from stillframe.errors import PeerError
from stillframe.machine.engines.qemu.monitor import QemuMonitor

_log = logging.getLogger(__name__)

_CANNOT_MOVE: Final = ("websocket", "reverse")

Addresses = list[dict[str, str]]


def aside(words: Sequence[str], path: Path) -> list[str]:
    """QEMU's words with its VNC display at `path`; as they are where there is none, or one that could not be moved from there."""
    found = list(words)
    places = [number for number in range(1, len(found)) if _vnc_prefix(found, number) is not None]
    if len(places) != 1:
        return found
    (place,) = places
    prefix = _vnc_prefix(found, place) or ""
    address, *options = found[place].removeprefix(prefix).split(",")
    if address == "none" or any(option.partition("=")[0] in _CANNOT_MOVE for option in options):
        return found
    kept = [option for option in options if not option.startswith("to=")]
    found[place] = ",".join([f"{prefix}unix:{str(path).replace(',', ',,')}", *kept])
    return found


def _vnc_prefix(words: Sequence[str], number: int) -> str | None:
    """What stands before the address in a word that names a VNC display; None in any other word."""
    option = "-" + words[number - 1].lstrip("-")
    if option == "-vnc":
        return ""
    return "vnc=" if option == "-display" and words[number].startswith("vnc=") else None


def addresses(monitor: QemuMonitor) -> Addresses:
    """Where the display is; empty without one, or where QEMU is gone."""
    try:
        displays: list[dict[str, Any]] = monitor.execute("query-vnc-servers")
    except PeerError:
        # A QEMU that was built without VNC has no such command either.
        return []
    found: Addresses = []
    for server in displays[0]["server"] if displays else []:
        if server["family"] == "unix":
            found.append({"type": "unix", "path": server["service"]})
        else:
            found.append({"type": "inet", "host": server["host"], "port": server["service"]})
    return found


def move(monitor: QemuMonitor, to: Addresses) -> None:
    """Bring the display to the addresses; nothing where there are none. A failure is logged: the guest needs no display."""
    if not to:
        return
    try:
        monitor.execute("display-update", {"type": "vnc", "addresses": to})
    except PeerError as error:
        _log.error("The display is not at its address after the load: %s", error)
