"""What a QEMU listens at survives a load, or the load is refused and the machine goes on. No guest is booted."""

import re
import socket
from pathlib import Path

import pytest

from qemu_guests import GuestMachine, versions
from stillframe.errors import StillframeError
from stillframe.sockets import connected_unix_socket

every_version = pytest.mark.parametrize("version", versions("agent"))


def greeting(connection: socket.socket) -> bytes:
    """What a VNC server says first."""
    with connection:
        connection.settimeout(30)
        return connection.recv(12, socket.MSG_WAITALL)


@every_version
def test_display_is_at_its_address_after_each_load_and_still_wants_its_password(
    version: str, tmp_path: Path
) -> None:
    words = ["-vnc", "127.0.0.1:40,to=200,password=on"]
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words) as machine:

        def found() -> tuple[str, str]:
            display = machine.execute("query-vnc")
            return display["service"], display["auth"]

        first = found()
        assert first[1] == "vnc"
        machine.save("one")
        for _ in range(2):
            machine.load("one")
            assert found() == first
            assert greeting(socket.create_connection(("127.0.0.1", int(first[0])))).startswith(b"RFB ")
        machine.quit()


@every_version
def test_display_at_a_socket_is_there_after_a_load(version: str, tmp_path: Path) -> None:
    path = tmp_path / "display"
    with GuestMachine(
        tmp_path / "guest", version, "--paused", words=["-display", f"vnc=unix:{path}"]
    ) as machine:
        machine.save("one")
        machine.load("one")
        assert greeting(connected_unix_socket(path)).startswith(b"RFB ")


@every_version
def test_load_is_refused_where_two_cannot_listen_and_the_machine_goes_on(
    version: str, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-chardev", f"socket,id=x,host=127.0.0.1,port={port},server=on,wait=off"]
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words) as machine:
        machine.save("one")
        with pytest.raises(StillframeError, match=re.compile("address", re.IGNORECASE)):
            machine.load("one")
        assert machine.status() in ("paused", "prelaunch")
        socket.create_connection(("127.0.0.1", port)).close()
        machine.save("two")
