"""What a QEMU listens at survives a load, or the load is refused and the machine goes on. No guest is booted."""

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from peers import peer
from qemu_guests import GuestMachine, free_display, free_port, starting_while, versions
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
    words = ["-vnc", f"{free_display()},password=on"]
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


def answers(path: Path) -> bool:
    """Whether a QEMU that lives listens there: its monitor greets, and answers."""
    with connected_unix_socket(path) as monitor, monitor.makefile("rw") as lines:
        monitor.settimeout(30)
        lines.readline()
        lines.write('{"execute": "qmp_capabilities"}')
        lines.flush()
        return "return" in lines.readline()


@every_version
def test_socket_of_qemus_own_is_at_its_path_after_a_load_and_after_one_that_is_refused(
    version: str, tmp_path: Path
) -> None:
    path, there = tmp_path / "monitor", tmp_path / "there"
    there.touch()
    program = starting_while(there, peer("qemu-system-x86_64", version))
    words = ["-qmp", f"unix:{path},server=on,wait=off"]
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words, program=program) as machine:
        machine.save("one")
        machine.load("one")
        assert answers(path)
        # The second one binds the path, and then finds that it does not get a port.
        with socket.create_server(("127.0.0.1", 0)) as taken:
            there.write_text(f"-gdb tcp:127.0.0.1:{taken.getsockname()[1]}")
            with pytest.raises(StillframeError, match=re.compile("address", re.IGNORECASE)):
                machine.load("one")
        assert answers(path)
        assert [each.name for each in tmp_path.iterdir() if each.is_socket()] == ["monitor"]
        machine.quit()


@every_version
def test_memory_that_two_would_write_to_is_refused_by_name_and_the_guest_goes_on(
    version: str, tmp_path: Path
) -> None:
    words = ["-object", f"memory-backend-file,id=shared,size=128M,mem-path={tmp_path}/memory,share=on"]
    words += ["-machine", "memory-backend=shared"]
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words) as machine:
        machine.save("one")
        with pytest.raises(StillframeError, match=r"memory of 'shared' is the file .* `replace` would end"):
            machine.load("one")
        assert machine.status() in ("paused", "prelaunch")
        assert machine.way("snapshot-load", "one", what="machine", replace=True)[0] == "replaced"
        machine.save("two")
        machine.quit()


def of_chardev(port: int) -> list[str]:
    return ["-chardev", f"socket,id=x,host=127.0.0.1,port={port},server=on,wait=off"]


def of_network(port: int) -> list[str]:
    return ["-nic", f"user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{port}-:22"]


def of_debugger(port: int) -> list[str]:
    return ["-gdb", f"tcp:127.0.0.1:{port}"]


@pytest.mark.parametrize("words", [of_chardev, of_network, of_debugger])
@every_version
def test_load_is_refused_where_two_cannot_listen_and_the_machine_goes_on(
    version: str, words: Callable[[int], list[str]], tmp_path: Path
) -> None:
    port = free_port()
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words(port)) as machine:
        machine.save("one")
        refusal = r"No second QEMU starts .*([Aa]ddress already|forwarding rule).*in the way, `replace` ends it first"
        with pytest.raises(StillframeError, match=refusal):
            machine.load("one")
        assert machine.status() in ("paused", "prelaunch")
        socket.create_connection(("127.0.0.1", port)).close()
        assert machine.way("snapshot-load", "one", what="machine", replace=True)[0] == "replaced"
        socket.create_connection(("127.0.0.1", port)).close()
        machine.quit()
