"""What the monitor's tests share: a served machine, and a real QEMU beside it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor.harness import Client, Lines, Served, qemu, served
from peers import QEMU_VERSIONS, peer
from stillframe.monitor.addresses import UnixAddress


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[tuple[Served, UnixAddress]]:
    """A machine without a processor, running, and the address of its monitor."""
    with served(tmp_path / "qmp.sock") as both:
        yield both


@pytest.fixture
def client(monitor: tuple[Served, UnixAddress]) -> Iterator[Client]:
    """A client that has negotiated."""
    with Client(monitor[1]) as client:
        client.negotiate()
        yield client


@pytest.fixture(params=QEMU_VERSIONS)
def real(request: pytest.FixtureRequest) -> Iterator[Lines]:
    """A real QEMU's monitor, negotiated."""
    with qemu(peer("qemu-system-x86_64", request.param)) as lines:
        yield lines.negotiate()
