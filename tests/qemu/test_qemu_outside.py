"""What a snapshot of a QEMU could not have is refused by name, before the guest is stopped. No guest is booted."""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_guests import GuestMachine, versions
from stillframe.errors import StillframeError
from stillframe.sockets import listening_unix_socket

_ANSWERS = {1: 1 << 32, 11: 0, 15: 0, 17: 1, 36: 8}
"""To vhost-user's requests: features (a device of version 1), a ring's base, protocol features, queues, memory slots."""

every_version = pytest.mark.parametrize("version", versions("agent"))


@pytest.fixture
def back_end(tmp_path: Path) -> Iterator[Path]:
    """A vhost-user back end that can nothing, for one device."""
    listener, file = listening_unix_socket(tmp_path / "vhost")

    def serve() -> None:
        try:
            connection, _ = listener.accept()
            with connection:
                while head := connection.recv(12, socket.MSG_WAITALL):
                    request, flags, size = struct.unpack("<III", head)
                    connection.recv(size, socket.MSG_WAITALL) if size else b""
                    if request in _ANSWERS:
                        answer = struct.pack("<IIIQ", request, flags | 4, 8, _ANSWERS[request])
                        connection.sendall(answer)
        except OSError:
            return

    threading.Thread(target=serve, daemon=True).start()
    yield tmp_path / "vhost"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    file.remove()


def refusal(machine: GuestMachine) -> str:
    """Of a save: the guest was not touched."""
    before = machine.status()
    with pytest.raises(StillframeError) as refused:
        machine.save("one")
    assert (machine.status(), machine.tags()) == (before, [])
    return str(refused.value)


@every_version
def test_device_with_a_back_end_of_its_own_is_refused_by_name(
    version: str, back_end: Path, tmp_path: Path
) -> None:
    words = ["-chardev", f"socket,id=v,path={back_end}", "-device", "vhost-user-rng-pci,chardev=v,id=outside"]
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words) as machine:
        assert "Device 'outside' (vhost-user-rng-pci) keeps its state outside of QEMU" in refusal(machine)


@every_version
def test_network_with_a_back_end_of_its_own_is_refused_by_name(
    version: str, back_end: Path, tmp_path: Path
) -> None:
    words = ["-chardev", f"socket,id=v,path={back_end}", "-netdev", "vhost-user,id=wire,chardev=v"]
    words += ["-device", "virtio-net-pci,netdev=wire"]
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words) as machine:
        assert "Network 'wire' (vhost-user) keeps its state outside of QEMU" in refusal(machine)


@every_version
def test_what_qemu_does_not_migrate_is_refused_in_its_words(version: str, tmp_path: Path) -> None:
    words = ["-object", "memory-backend-ram,size=1M,id=m,share=on"]
    words += ["-device", "ivshmem-plain,memdev=m,master=off"]
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words) as machine:
        assert "Migration is disabled when using feature 'peer mode' in device 'ivshmem'" in refusal(machine)
