"""The programs that tests compare stillframe with, and what happens where one is missing.

In CI (`STILLFRAME_PEERS=required`) a missing peer fails the test that needs it; elsewhere the test skips and names the line that
installs it.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"

_PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-riscv64": "qemu-system-misc",
    "riscv64-linux-gnu-gcc": "gcc-riscv64-linux-gnu libc6-dev-riscv64-cross",
    "x86_64-linux-gnu-gcc": "gcc libc6-dev",
    "dtc": "device-tree-compiler",
    "virsh": "libvirt-clients libvirt-daemon-driver-qemu",
    "unshare": "util-linux",
}


def missing(what: str, remedy: str) -> None:
    """Skip, or fail where peers are required."""
    text = f"{what} is missing: {remedy}"
    if os.environ.get("STILLFRAME_PEERS") == "required":
        pytest.fail(text)
    pytest.skip(text)


QEMU_VERSIONS = ("host", "10.0")
"""Parametrise with these what must hold for every QEMU we compare with: by a parameter `version`, or by the fixture
`every_qemu` where a test only asks `peer` without naming one."""

_of_the_test = "host"


def installed_versions() -> tuple[str, ...]:
    """The QEMUs to choose from; all of them where peers are required, so that a missing one is noticed."""
    if os.environ.get("STILLFRAME_PEERS") == "required":
        return QEMU_VERSIONS
    found = {"host": shutil.which("qemu-img"), "10.0": (CACHE / "debian-qemu" / "bin").exists()}
    return tuple(version for version in QEMU_VERSIONS if found[version]) or ("host",)


@contextmanager
def using(version: str) -> Iterator[None]:
    """Let `peer` mean this QEMU where no version is named."""
    global _of_the_test
    before, _of_the_test = _of_the_test, version
    try:
        yield
    finally:
        _of_the_test = before


def peer(name: str, version: str | None = None) -> str:
    """The path of a peer program.

    :param version: "host" is the installed one, "10.0" that of `scripts/debian-qemu`; without it the one that
        the running test got (conftest.py).
    """
    version = version or _of_the_test
    if version == "10.0" and name.startswith("qemu-"):
        path = CACHE / "debian-qemu" / "bin" / name
        if not path.exists():
            missing(f"{name} 10.0", "run scripts/debian-qemu")
        return str(path)
    found = shutil.which(name)
    if found is None:
        missing(name, f"apt-get install --no-install-recommends {_PACKAGES.get(name, name)}")
        raise AssertionError("unreachable")
    return found


_COMPILERS = {"riscv64": "riscv64-linux-gnu-gcc", "x86_64": "x86_64-linux-gnu-gcc"}


@cache
def linux_guest(architecture: str = "riscv64") -> dict[str, Path]:
    """Paths of the Linux guest by what they are, as `scripts/debian-guest` explains them.

    "kernel", "initrd", "agent-initrd"; "check-initrd" where there is a compiler; for "x86_64" also "ovmf-code" and "ovmf-vars".
    """
    what = f"the Linux guest for {architecture}"
    if not shutil.which("apt-get"):
        missing(what, "it is fetched from Debian's mirror with apt-get")
    script = str(ROOT / "scripts" / "debian-guest")
    run = subprocess.run([script, "--print", architecture], capture_output=True, text=True)
    if run.returncode:
        missing(what, f"scripts/debian-guest said: {run.stderr.strip().splitlines()[-1:]}")
    pairs = (line.split("=", 1) for line in run.stdout.splitlines() if "=" in line)
    return {key: Path(value) for key, value in pairs}


def checking_guest(architecture: str = "riscv64") -> dict[str, Path]:
    """The same, where the test cannot do without "check-initrd"."""
    files = linux_guest(architecture)
    if "check-initrd" not in files:
        packages = _PACKAGES[_COMPILERS[architecture]]
        missing(
            f"the self-checking Linux guest for {architecture}",
            f"apt-get install --no-install-recommends {packages}",
        )
    return files
