"""What a QEMU can do here for snapshots, asked of the program itself: started with no guest, told to switch each ability on."""

import json
import subprocess
from dataclasses import dataclass

_PATIENCE = 30.0
_ABILITIES = ("background-snapshot", "postcopy-ram")


@dataclass(frozen=True, slots=True)
class QemuAbilities:
    """What it answered.

    :param version: as "7.2.22". :param no_tracking: :param no_fetching: why it may not track what a guest writes, and not fetch
        missing pages; empty if it may.
    """

    version: str
    no_tracking: str
    no_fetching: str


def ask_qemu(program: str) -> QemuAbilities:
    """Start it, ask it, end it; waits 30 seconds at most.

    :raise OSError: there is no such program, or it may not be started. :raise ValueError: it does not answer as a QEMU.
    """
    lines: list[dict[str, object]] = [{"execute": "qmp_capabilities"}]
    for ability in _ABILITIES:
        state = [{"capability": ability, "state": True}]
        off = [{"capability": ability, "state": False}]
        lines.append(
            {"execute": "migrate-set-capabilities", "arguments": {"capabilities": state}, "id": ability}
        )
        lines.append({"execute": "migrate-set-capabilities", "arguments": {"capabilities": off}})
    lines.append({"execute": "quit"})
    words = [
        "-incoming",
        "defer",
        "-machine",
        "none",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-qmp",
        "stdio",
    ]
    try:
        done = subprocess.run(
            [program, *words],
            input="\n".join(map(json.dumps, lines)),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
        messages = [json.loads(line) for line in done.stdout.splitlines()]
        found = messages[0]["QMP"]["version"]["qemu"]
        refused = {each["id"]: each.get("error", {}).get("desc", "") for each in messages if "id" in each}
        return QemuAbilities(
            f"{found['major']}.{found['minor']}.{found['micro']}", *(refused[each] for each in _ABILITIES)
        )
    except (json.JSONDecodeError, KeyError, IndexError, subprocess.TimeoutExpired) as error:
        said = done.stderr.strip().splitlines() if not isinstance(error, subprocess.TimeoutExpired) else []
        raise ValueError(said[-1] if said else "it does not answer as a QEMU") from error
