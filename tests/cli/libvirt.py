"""A libvirt of the test's own, on a host whose only QEMU is stillframe-qemu.

Its driver runs inside one virsh (`qemu:///embed`), so there is no daemon to leave behind; every path is below the test's directory.
"""

import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest

import stillframe
from peers import missing, peer
from running import PATIENCE

EMULATOR = "qemu-system-riscv64"
"""As libvirt looks for it in PATH."""

_DRIVER = "libvirt-daemon-driver-qemu"
_PROMPT, _END = "virsh # ", "-- done --"


class VirshError(Exception):
    """What virsh says of a command that failed."""


class Libvirt:
    """:param folder: for everything that libvirt keeps; short, for sockets. :ivar emulator: what it takes for QEMU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("root/etc", "home", "runtime", "bin"):
            (folder / name).mkdir(mode=0o700, parents=True)
        # A domain's output goes to a file, not to another daemon.
        (folder / "root" / "etc" / "qemu.conf").write_text('stdio_handler = "file"\n')
        self.emulator = folder / "bin" / EMULATOR
        # libvirt hands on none of our environment.
        self.emulator.write_text(
            "#!/bin/sh\n"
            f"export PYTHONPATH={shlex.quote(str(Path(stillframe.__file__).parents[1]))}\n"
            f'exec {shlex.quote(sys.executable)} -m stillframe.cli.drop_in "$@"\n'
        )
        self.emulator.chmod(0o700)
        self._process = subprocess.Popen(
            [*_as_user(), peer("virsh"), "-q", "-c", f"qemu:///embed?root={folder / 'root'}"],
            env={
                "PATH": str(self.emulator.parent),
                "HOME": str(folder / "home"),
                "XDG_RUNTIME_DIR": str(folder / "runtime"),
                "LIBVIRT_LOG_FILTERS": "1:qemu.qemu_monitor 3:*",
                "LIBVIRT_LOG_OUTPUTS": f"1:file:{folder / 'log'}",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._until(_PROMPT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        left = self._emulators()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        if exception[0] is None:
            assert not left, f"libvirt has left emulators behind: {left}"

    def virsh(self, command: str) -> str:
        """What a command of virsh's prints. :raise VirshError: it failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\necho '{_END}'\n".encode())
        self._process.stdin.flush()
        # What was typed comes back, too, and an `echo` has no line of its own.
        text = self._until(f"\n{_END}{_PROMPT}").removeprefix(command).partition(f"{_PROMPT}echo")[0].strip()
        if found := re.search(r"^error: .*", text, re.MULTILINE | re.DOTALL):
            raise VirshError(found[0])
        return text

    def _until(self, end: str) -> str:
        assert self._process.stdout is not None
        data, deadline = b"", time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not data.endswith(end.encode()):
                assert selector.select(deadline - time.monotonic()), f"no {end!r} after {data!r}"
                more = os.read(self._process.stdout.fileno(), 1 << 16)
                if b"no connection driver available" in data:
                    missing("libvirt's QEMU driver", f"apt-get install --no-install-recommends {_DRIVER}")
                assert more, f"virsh has ended with {self._process.wait()} after {data!r}"
                data += more
        return data.decode()

    def asked(self) -> list[str]:
        """The commands that libvirt has sent to monitors, in their order."""
        log = (self._folder / "log").read_text(errors="replace")
        return re.findall(r'MONITOR_IO_WRITE: .*?buf=\{"execute":"([^"]+)"', log)

    def _emulators(self) -> list[int]:
        """The processes that have not ended. Those that libvirt has told to get a moment for it."""
        deadline = time.monotonic() + 5
        while (found := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def _processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if b"stillframe.cli.drop_in" in (words := path.read_bytes()) and bytes(self._folder) in words:
                    found.append(int(path.parent.name))
            except OSError:
                continue  # It has just ended.
        return found


def _as_user() -> list[str]:
    """For root libvirt would want users of its own, which are made where its daemon is set up: root is called another here."""
    if os.getuid() != 0:
        return []
    words = [peer("unshare"), "--user", "--map-user=1000", "--map-group=1000"]
    if subprocess.run([*words, shutil.which("true") or "true"], capture_output=True, check=False).returncode:
        pytest.skip("this host has no user namespaces, and root needs one here")
    return words
