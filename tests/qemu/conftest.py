"""Machines of these tests are found by name in a place of their own, and leave no QEMU there."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu.killed import qemus_of, why_no_kvm
from qemu_guests import KVM


@pytest.fixture(scope="session", autouse=True)
def _with_kvm_or_not_at_all() -> None:
    """`make kvm` says why it has tried nothing."""
    if KVM and (why := why_no_kvm()):
        pytest.skip(f"KVM is not usable here: {why}")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where machines are found by name. What QEMU is left on it is ended; none may be."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path / "stillframe"
    left = qemus_of(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
