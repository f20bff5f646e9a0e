"""A real QEMU without a machine, to ask what it says to the same `blockdev-add`."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import peer


class QemuBlockLayer:
    """QMP with `-machine none`; `ask` one command after another, `close` at the end.

    :param directory: where relative file names start.
    """

    def __init__(self, directory: Path, version: str = "host", arguments: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [
                peer("qemu-system-x86_64", version),
                *("-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"),
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
        )
        self._reply()
        self.ask("qmp_capabilities")

    def ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """What it returns, or the error's text as `QemuError`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        while "event" in reply:
            reply = self._reply()
        if "error" in reply:
            return QemuError(reply["error"]["desc"])
        return reply["return"]

    def close(self) -> None:
        """End it."""
        self._process.communicate('{"execute": "quit"}\n', timeout=20)

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"QEMU has ended: {self._process.communicate()[1]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


class QemuError(str):
    """The text of an error."""


def said_on_command_line(directory: Path, text: str, version: str = "host") -> str | None:
    """What QEMU says to `-blockdev TEXT`; None where it takes it."""
    run = subprocess.run(
        [
            peer("qemu-system-x86_64", version),
            *("-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio", "-blockdev", text),
        ],
        input='{"execute": "qmp_capabilities"}{"execute": "quit"}',
        capture_output=True,
        text=True,
        cwd=directory,
        timeout=60,
    )
    if run.returncode == 0:
        return None
    return run.stderr.strip().split(f"-blockdev {text}: ", 1)[1]
