"""A fresh QEMU is given a stored state, while the guest runs or before: the guest goes on where it was, and finds nothing bad."""

import errno
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from machine.qemu.qemus import InBackground, Qemu, Stored, built_guest, stored, taken_apart
from peers import QEMU_VERSIONS, peer
from stillframe.errors import Failed, IOFailed
from stillframe.machine.engines.qemu.plain import feed
from stillframe.machine.engines.qemu.postcopy import PostcopySource
from stillframe.vmstate.relayed import timer_ns

pytestmark = [pytest.mark.xdist_group("postcopy")]

PATIENCE = 60.0
INCOMING = ("-incoming", "defer")
PATTERN = (16 << 20) // 4096
"""Number of the first page that the guest checks."""

Saved = Mapping[str, tuple[Stored, str]]
"""By QEMU's version: a stored state, and what its guest had printed by then."""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_guest(tmp_path_factory.mktemp("guest"))


@pytest.fixture(scope="module")
def saved(guest: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    found = {}
    for version in QEMU_VERSIONS:
        with Qemu(version, guest, tmp_path_factory.mktemp("saved") / "qemu") as qemu:
            for _ in range(3):
                qemu.guest.heartbeat()
            found[version] = stored(qemu.saved_behind()), qemu.printed
    return found


def goes_on(qemu: Qemu, printed: str) -> None:
    """What the guest printed before and after is what one guest prints that never stopped."""
    while qemu.guest.heartbeat().number < 40:
        pass
    text = printed + qemu.guest.drain()
    beats = re.findall(r"^HB (\d+) .*bad=(\d+) nonce=(\w{16})\r$", text, re.MULTILINE)
    assert [int(number) for number, _, _ in beats] == list(range(1, len(beats) + 1))
    assert {(bad, nonce) for _, bad, nonce in beats} == {("0", beats[0][2])}


@contextmanager
def offered(qemu: Qemu, state: Stored, **more: Any) -> Iterator[PostcopySource]:
    """A source whose guest runs."""
    qemu.capable_of("postcopy-ram")
    with closing(state.source(qemu.awaiting(), **more)) as source:
        source.offer()
        source.wait_until_loaded(PATIENCE)
        yield source


def nothing() -> None:
    """A checkpoint at which nobody is held."""


@pytest.mark.parametrize("version", QEMU_VERSIONS)
@pytest.mark.parametrize("made_by", QEMU_VERSIONS)
def test_guest_goes_on_before_its_memory_has_come(
    made_by: str, version: str, saved: Saved, guest: Path, tmp_path: Path
) -> None:
    state, printed = saved[made_by]
    with Qemu(version, guest, tmp_path / "qemu", *INCOMING) as qemu, offered(qemu, state) as source:
        came: list[int] = []
        source.fill(came.append, nothing)
        assert sum(came) == source.bytes_to_come
        source.close()
        goes_on(qemu, printed)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
@pytest.mark.parametrize("descriptors", [(), None], ids=["process", "thread"])
def test_a_held_fill_holds_no_guest(
    descriptors: tuple[int, ...] | None, saved: Saved, version: str, guest: Path, tmp_path: Path
) -> None:
    state, printed = saved[version]
    came: list[int] = []
    goes = threading.Event()

    def held() -> None:
        assert goes.wait(PATIENCE)

    with (
        Qemu(version, guest, tmp_path / "qemu", *INCOMING) as qemu,
        offered(qemu, state, descriptors=descriptors) as source,
        InBackground(lambda: source.fill(came.append, held)) as fill,
    ):
        try:
            goes_on(qemu, printed)
            assert not came
        finally:
            goes.set()
        fill.wait()
        assert fill.error is None
        assert sum(came) == source.bytes_to_come
        assert source.requested > 0
        goes_on(qemu, printed)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
@pytest.mark.parametrize("made_by", QEMU_VERSIONS)
def test_guest_goes_on_after_all_its_memory_has_come(
    made_by: str, version: str, saved: Saved, guest: Path, tmp_path: Path
) -> None:
    state, printed = saved[made_by]
    with Qemu(version, guest, tmp_path / "qemu", *INCOMING) as qemu:
        came: list[int] = []
        with qemu.awaiting() as connection:
            feed(connection, len(state.data), state.read, came.append, nothing)
        assert sum(came) == len(state.data)
        while qemu.ask("query-migrate").get("status") != "completed":
            pass
        qemu.ask("cont")
        goes_on(qemu, printed)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_qemu_that_dies_while_memory_comes_is_told_of(
    saved: Saved, version: str, guest: Path, tmp_path: Path
) -> None:
    state, _ = saved[version]
    with Qemu(version, guest, tmp_path / "qemu", *INCOMING) as qemu, offered(qemu, state) as source:

        def kill() -> None:
            os.kill(qemu.guest.pid, signal.SIGKILL)
            qemu.guest.wait()

        with pytest.raises(Failed, match="ended the load before it had the guest's memory") as failed:
            source.fill(lambda length: None, kill)
        assert failed.value.left is not None
        with pytest.raises(Failed, match="ended the load"):
            source.fill(lambda length: None, nothing)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
@pytest.mark.parametrize("descriptors", [(), None], ids=["process", "thread"])
def test_memory_that_cannot_be_read_is_an_error_and_never_a_page_of_zeroes(
    descriptors: tuple[int, ...] | None, saved: Saved, version: str, guest: Path, tmp_path: Path
) -> None:
    state, _ = saved[version]
    where = state.index.offsets["pc.ram"]
    bad_from = int(where[PATTERN + 1000])

    def read(offset: int, length: int) -> bytes:
        if offset <= bad_from < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return state.read(offset, length)

    with (
        Qemu(version, guest, tmp_path / "qemu", *INCOMING) as qemu,
        offered(qemu, state, descriptors=descriptors, read=read) as source,
    ):
        with pytest.raises(IOFailed, match="Input/output error") as failed:
            source.fill(lambda length: None, nothing)
        assert failed.value.errno == errno.EIO
        assert failed.value.left is not None
        source.close()
        assert set(re.findall("bad=([0-9]+)", qemu.guest.drain())) <= {"0"}


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_a_state_that_qemu_refuses_leaves_no_guest_running(
    saved: Saved, version: str, guest: Path, tmp_path: Path
) -> None:
    state, _ = saved[version]
    devices = state.tail.devices.replace(b"\x05timer", b"\x05timid", 1)
    with Qemu(version, guest, tmp_path / "qemu", *INCOMING) as qemu:
        qemu.capable_of("postcopy-ram")
        with closing(state.source(qemu.awaiting(), devices=devices)) as source:
            source.offer()
            with pytest.raises(Failed, match="before it had loaded the devices"):
                source.wait_until_loaded(PATIENCE)
        qemu.guest.wait()
        assert not qemu.guest.drain()


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_a_qemu_that_does_not_answer_holds_nobody_for_good(
    saved: Saved, version: str, guest: Path, tmp_path: Path
) -> None:
    state, _ = saved[version]
    with Qemu(version, guest, tmp_path / "qemu", *INCOMING) as qemu:
        qemu.capable_of("postcopy-ram")
        source = state.source(qemu.awaiting())
        os.kill(qemu.guest.pid, signal.SIGSTOP)
        with closing(source):
            with InBackground(source.offer) as offer:
                with pytest.raises(Failed, match="has not loaded the devices within"):
                    source.wait_until_loaded(0.1)
                source.close()
                offer.wait()
            assert isinstance(offer.error, Failed)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_clock_is_the_one_that_qemu_writes_into_its_own_snapshots(
    version: str, guest: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.qcow2"
    subprocess.run([peer("qemu-img", version), "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    words = ["-blockdev", f"qcow2,node-name=root,file.driver=file,file.filename={disk}"]
    with Qemu(version, guest, tmp_path / "qemu", *words, "-device", "virtio-blk-pci,drive=root") as qemu:
        qemu.guest.heartbeat()
        qemu.ask("stop")
        assert not qemu.ask("human-monitor-command", command_line="savevm one")
        (snapshot,) = qemu.ask("query-block")[0]["inserted"]["image"]["snapshots"]
        _, _, tail = taken_apart(qemu.saved_behind())
    assert timer_ns(tail.devices) == snapshot["vm-clock-sec"] * 10**9 + snapshot["vm-clock-nsec"]


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_qemu_that_dies_while_it_is_fed_is_told_of(
    saved: Saved, version: str, guest: Path, tmp_path: Path
) -> None:
    state, _ = saved[version]
    with Qemu(version, guest, tmp_path / "qemu", *INCOMING) as qemu, qemu.awaiting() as connection:

        def kill(length: int) -> None:
            os.kill(qemu.guest.pid, signal.SIGKILL)
            qemu.guest.wait()

        with pytest.raises(Failed, match="closed the connection after 2 of"):
            feed(connection, len(state.data), state.read, kill, nothing)
