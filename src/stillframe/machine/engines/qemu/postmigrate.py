"""A QEMU that gave its state while its guest was paused gives it no second time before the guest runs: it is in "postmigrate".

There is one way to "paused" in which the guest runs no instruction. QEMU's debugger port takes all packets that have come at once
in one go of its main thread, and a processor needs that thread's lock to begin. So `cont`, given there as the monitor's command,
and the next packet's first byte, at which QEMU stops a guest that runs, are one step to the processors: they are told to begin
and to stand still before the first of them can look. The guest's clock goes on for that long, as after any `stop` and `cont`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from stillframe.errors import Failed, PeerError, Refused, Unsupported
from stillframe.machine.engines.qemu.monitor import QemuMonitor
from stillframe.sockets import connected_unix_socket

_PATIENCE: Final = 30.0
_OWN_DEBUGGER: Final = frozenset({"-s", "-gdb"})


def _packet(text: bytes) -> bytes:
    """As GDB's remote protocol frames it."""
    return b"$" + text + b"#%02x" % (sum(text) & 0xFF)


_CONT_AND_STOP: Final = _packet(b"qRcmd," + b"cont".hex().encode()) + b"+$"


def leave_postmigrate(monitor: QemuMonitor, directory: Path, words: Sequence[str]) -> None:
    """Bring a QEMU that is in "postmigrate" to "paused"; the guest runs no instruction.

    :param directory: where its debugger port may be for that long. :param words: that the user gave QEMU.
    :raise Unsupported: the debugger port is the user's own. :raise Refused: QEMU has none. :raise Failed: it is not paused.
    """
    if _OWN_DEBUGGER & {"-" + word.lstrip("-") for word in words if word.startswith("-")}:
        raise Unsupported(
            "This QEMU gives the state of a paused guest once, and has done so, and its debugger port is in use",
            remedy="Let the guest run (`stillframe cont`), or start the machine without -s and -gdb.",
        )
    path = directory / "debugger"
    try:
        said = _human(monitor, f'gdbserver "unix:{path},server=on,wait=off"')
        try:
            connection = connected_unix_socket(path)
        except (PeerError, Refused) as error:
            raise Refused(
                f"This QEMU gives the state of a paused guest once, and has done so: {said.strip() or error}",
                remedy="Let the guest run (`stillframe cont`), then save.",
            ) from error
        with connection:
            connection.settimeout(_PATIENCE)
            connection.sendall(_CONT_AND_STOP)
            # It answers when it has done both: they are one step. A QEMU that ended closes the connection.
            connection.recv(1)
            status = monitor.execute("query-status")["status"]
        if status != "paused":
            raise Failed(f"QEMU has not left the state 'postmigrate': it is '{status}'")
    except OSError as error:
        raise Failed(f"QEMU's debugger port did not answer: {error}") from error
    finally:
        if not monitor.ended:
            _human(monitor, "gdbserver none")
        path.unlink(missing_ok=True)


def _human(monitor: QemuMonitor, line: str) -> str:
    return str(monitor.execute("human-monitor-command", {"command-line": line}))
