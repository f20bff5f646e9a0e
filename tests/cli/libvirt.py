"""A libvirt of the test's own, on a host whose only QEMU is stillframe-qemu.

Its driver runs inside virsh (`qemu:///embed`), so there is no daemon to leave behind; every path is below the test's directory.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import stillframe
from peers import missing, peer
from running import PATIENCE

EMULATOR = "qemu-system-riscv64"
"""As libvirt looks for it in PATH."""


class Libvirt:
    """:param folder: empty, for everything that libvirt keeps. :ivar emulator: what it takes for QEMU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._virsh = [*_as_user(), peer("virsh"), "-q", "-c", f"qemu:///embed?root={folder / 'root'}"]
        for name in ("root", "home", "runtime", "bin"):
            (folder / name).mkdir(mode=0o700)
        self.emulator = folder / "bin" / EMULATOR
        # libvirt hands on none of our environment.
        self.emulator.write_text(
            "#!/bin/sh\n"
            f"export PYTHONPATH={shlex.quote(str(Path(stillframe.__file__).parents[1]))}\n"
            f'exec {shlex.quote(sys.executable)} -m stillframe.cli.drop_in "$@"\n'
        )
        self.emulator.chmod(0o700)

    def virsh(self, *commands: str) -> list[str]:
        """What each of these commands prints, in one process: a domain of libvirt's does not outlive it here."""
        separator = "-- next --"
        script = f"; echo '{separator}'; ".join(commands)
        run = subprocess.run(
            [*self._virsh, script],
            env={
                "PATH": str(self.emulator.parent),
                "HOME": str(self._folder / "home"),
                "XDG_RUNTIME_DIR": str(self._folder / "runtime"),
                "LIBVIRT_LOG_FILTERS": "1:qemu.qemu_monitor 3:*",
                "LIBVIRT_LOG_OUTPUTS": f"1:file:{self._folder / 'log'}",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if "no connection driver available" in run.stderr:
            missing(
                "libvirt's QEMU driver", "apt-get install --no-install-recommends libvirt-daemon-driver-qemu"
            )
        assert run.returncode == 0, run.stderr
        return [part.strip() for part in run.stdout.split(separator)]

    def asked(self) -> list[str]:
        """The commands that libvirt has sent to monitors, in their order."""
        log = (self._folder / "log").read_text(errors="replace")
        return re.findall(r'MONITOR_IO_WRITE: .*?buf=\{"execute":"([^"]+)"', log)

    def close(self) -> None:
        """Wait for the emulators to end, as libvirt has told them to; a libvirt that died may have left some."""
        deadline = time.monotonic() + 5
        while left := self._processes():
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"libvirt has left emulators behind: {left}")
            time.sleep(0.02)

    def _processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if bytes(self._folder) in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue  # It has just ended.
        return [pid for pid in found if pid != os.getpid()]


def _as_user() -> list[str]:
    """For root libvirt would want users of its own, which are made where its daemon is set up: root is called another here."""
    if os.getuid() != 0:
        return []
    words = [peer("unshare"), "--user", "--map-user=1000", "--map-group=1000"]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        missing("a user namespace", "run the tests as another user than root")
    return words
