"""What a snapshot of a QEMU could not have is refused by name, before the guest is stopped. No guest is booted.

vfio and vhost-vdpa need hardware that is not there; tests/machine/qemu/test_outside.py has them by their names alone.
"""

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

_TPM_ANSWERS = {1: struct.pack(">Q", 0xFFFF), 4: bytes(8), 17: struct.pack(">IIII", 0, 4096, 4096, 4096)}
"""To swtpm's requests: all capabilities, no establishment, the size of a buffer; to all others that it is done."""

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


def _obey_as_a_tpm(control: socket.socket) -> None:
    """The control channel of a TPM of another process: QEMU gives it the other channel first, then sets it up."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
        if not request:
            return
        for each in descriptors:
            threading.Thread(
                target=_say_yes_as_a_tpm, args=(socket.socket(fileno=each),), daemon=True
            ).start()
        control.sendall(_TPM_ANSWERS.get(int.from_bytes(request[:4]), bytes(4)))


def _say_yes_as_a_tpm(commands: socket.socket) -> None:
    """Of version 2."""
    with commands:
        while commands.recv(4096):
            commands.sendall(struct.pack(">HII", 0x8001, 10, 0))


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[Path]:
    """A TPM that can nothing, in another process than QEMU's."""
    listener, file = listening_unix_socket(tmp_path / "tpm")

    def serve() -> None:
        try:
            connection, _ = listener.accept()
            with connection:
                _obey_as_a_tpm(connection)
        except OSError:
            return

    threading.Thread(target=serve, daemon=True).start()
    yield tmp_path / "tpm"
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


@pytest.mark.parametrize(("kind", "more"), [("vhost-user-rng-pci", ""), ("vhost-user-fs-pci", ",tag=files")])
@every_version
def test_device_with_a_back_end_of_its_own_is_refused_by_name(
    version: str, kind: str, more: str, back_end: Path, tmp_path: Path
) -> None:
    words = ["-chardev", f"socket,id=v,path={back_end}", "-device", f"{kind},chardev=v,id=outside{more}"]
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words) as machine:
        assert f"Device 'outside' ({kind}) keeps its state outside of QEMU" in refusal(machine)


@pytest.mark.parametrize("kind", ["tpm-tis", "tpm-crb"])
@every_version
def test_tpm_of_another_process_is_refused_by_name(
    version: str, kind: str, tpm: Path, tmp_path: Path
) -> None:
    words = ["-chardev", f"socket,id=t,path={tpm}", "-tpmdev", "emulator,id=keys,chardev=t"]
    words += ["-device", f"{kind},tpmdev=keys,id=mine"]
    with GuestMachine(tmp_path / "guest", version, "--paused", words=words) as machine:
        assert f"Device 'mine' ({kind}) keeps its state outside of QEMU" in refusal(machine)


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
