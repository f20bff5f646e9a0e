"""`stillframe run`, in which a process is killed at the N-th step of the first save or load, or whatever else it is told to do.

    python dying.py WHO N FILE run ...

WHO is "us", "machine" (its QEMU) or "successor" (the QEMU that a load has started). A step is a command to a QEMU, a change of the
record, or a switch of an image, before it and after it. FILE is made just before the kill, and names the step.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillframe.block.qcow2.image import Image
from stillframe.cli.main import main
from stillframe.machine.engines.qemu.home import MachineHome
from stillframe.machine.engines.qemu.machine import QemuMachine
from stillframe.machine.engines.qemu.monitor import QemuMonitor
from stillframe.machine.engines.qemu.running import Started
from stillframe.machine.engines.qemu.successor import QemuSuccessor


class Killer:
    """Counts steps once it is armed."""

    def __init__(self, who: str, number: int, file: Path) -> None:
        self.who, self.left, self.file = who, number, file
        self.armed = False
        self.machine = 0
        self.newest = 0

    def target(self) -> int:
        if self.who == "us":
            return os.getpid()
        if self.who == "machine":
            return self.machine
        return self.newest if self.newest != self.machine else 0

    def step(self, name: str) -> None:
        if not self.armed or not self.target() or not Path(f"/proc/{self.target()}/root").exists():
            return
        self.left -= 1
        if self.left < 0:
            self.armed = False
            self.file.write_text(name)
            os.kill(self.target(), signal.SIGKILL)

    def watch(self, owner: type, method: str, name: Callable[..., str]) -> None:
        original = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            what = name(*args, **kwargs)
            self.step(f"before {what}")
            found = original(*args, **kwargs)
            self.step(f"after {what}")
            return found

        setattr(owner, method, watched)

    def arm_at(self, method: str) -> None:
        original = getattr(QemuMachine, method)

        def armed(machine: Any, *args: Any, **kwargs: Any) -> Any:
            self.machine = machine._qemu.pid
            self.armed = self.left >= 0
            return original(machine, *args, **kwargs)

        setattr(QemuMachine, method, armed)

    def note_starts(self) -> None:
        original = Started.__init__

        def started(running: Started, *args: Any, **kwargs: Any) -> None:
            original(running, *args, **kwargs)
            self.newest = running.pid
            self.step("after the start of a QEMU")

        Started.__init__ = started  # type: ignore[method-assign]


def prepare(who: str, number: int, file: Path) -> None:
    killer = Killer(who, number, file)
    killer.watch(QemuMonitor, "execute", lambda monitor, command, *_, **__: command)
    killer.watch(
        MachineHome, "note", lambda home, **changes: f"the note of {', '.join(changes) or 'nothing'}"
    )
    killer.watch(Image, "switch_world", lambda *_, **__: "the switch of an image")
    killer.watch(QemuSuccessor, "fill", lambda *_, **__: "the fill")
    killer.note_starts()
    killer.arm_at("captured")
    killer.arm_at("successor")


if __name__ == "__main__":
    prepare(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    sys.argv[1:4] = []
    main()
