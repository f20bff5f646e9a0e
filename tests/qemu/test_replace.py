"""A load for which the machine's QEMU is ended first: where there is no room beside it, in memory or at an address."""

import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from peers import peer
from qemu.killed import SmallMachine, qemus_of
from qemu_guests import BEAT, check_image, free_display, free_port, starting_while, versions
from running import STILLFRAME, stillframe
from stillframe.errors import StillframeError

every_version = pytest.mark.parametrize("version", versions("qemu"))


class PoorMachine(SmallMachine):
    """On a host that says that it has memory for one guest and not for two."""

    def __init__(self, directory: Path, version: str) -> None:
        directory.mkdir()
        figures = directory / "meminfo"
        figures.write_text(f"MemTotal: 200000 kB\nMemAvailable: {63 << 10} kB\n")
        inner = f'mount --bind {shlex.quote(str(figures))} /proc/meminfo && exec "$@"'
        apart = ["unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",))]
        if subprocess.run([*apart, "sh", "-c", inner, "sh", "true"], capture_output=True).returncode:
            pytest.skip("no mount namespace of one's own here")
        self.program = (*apart, "sh", "-c", inner, "sh", *STILLFRAME)
        super().__init__(directory, version)


@every_version
def test_guest_whose_address_two_cannot_have_is_replaced_and_goes_on(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    port = free_port()
    words = ["-chardev", f"socket,id=x,host=127.0.0.1,port={port},server=on,wait=off"]
    words += ["-vnc", free_display()]
    with SmallMachine(tmp_path / "m", version, "--name", "box", words=words) as machine:
        display = machine.execute("query-vnc")["service"]
        saved_at = machine.beat()
        machine.save("one")
        with pytest.raises(StillframeError, match=re.compile("address", re.IGNORECASE)):
            machine.load("one")
        machine.beat()
        for eager in (False, True):
            machine.console.skip()
            done = machine.job("snapshot-load", "one", replace=True, eager=eager)
            assert ("machine", "replaced") in [(each.what, each.chosen) for each in done.choices]
            assert machine.status() == "running"
            assert machine.beat() >= saved_at
            assert len(qemus_of(tmp_path)) == 1
            socket.create_connection(("127.0.0.1", port)).close()
            assert machine.execute("query-vnc")["service"] == display
        machine.save("two")
        machine.quit()
    check_image(machine.image, in_use=True)
    assert list(runtime.iterdir()) == []


@every_version
def test_load_that_the_host_has_no_memory_for_is_refused_unless_it_may_replace_the_guest(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    with PoorMachine(tmp_path / "m", version) as machine:
        saved_at = machine.beat()
        machine.save("one")
        with pytest.raises(
            StillframeError, match="up to 64 MiB of memory beside the guest's own, the host has 63 MiB"
        ):
            machine.load("one")
        later = machine.beat()
        machine.execute("stop")
        done = stillframe("load", "--qmp", f"unix:{machine.qmp}", "one", "--replace")
        assert (done.returncode, "replaced" in done.stdout) == (0, True), done.stderr
        assert machine.status() == "paused"
        machine.console.skip()
        machine.execute("cont")
        assert saved_at <= machine.beat() <= later + 1
        machine.quit()
    check_image(machine.image, in_use=True)


@every_version
def test_failed_replacement_says_that_the_guest_is_gone_and_leaves_snapshots_that_load(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    there = tmp_path / "there"
    there.touch()
    program = starting_while(there, peer("qemu-system-x86_64", version))
    with SmallMachine(tmp_path / "m", version, "--name", "box", program=program) as machine:
        saved_at = machine.beat()
        machine.save("one")
        machine.beat()
        there.unlink()
        with pytest.raises(
            StillframeError, match=r"no, not again.*; the guest had been ended .* and is gone"
        ):
            machine.job("snapshot-load", "one", replace=True)
        assert (machine.status(), qemus_of(tmp_path), machine.tags()) == ("internal-error", [], ["one"])
        for command in ("cont", "system_reset"):
            with pytest.raises(StillframeError, match="was ended to load snapshot 'one', which then failed"):
                machine.execute(command)
        with pytest.raises(StillframeError, match="was ended to load snapshot 'one'"):
            machine.save("two")
        with pytest.raises(StillframeError, match="no, not again"):
            machine.load("one")
        assert machine.status() == "internal-error"
        there.touch()
        machine.load("one")
        assert int(machine.console.until(BEAT)[1]) >= 1
        assert (machine.status(), machine.beat() >= saved_at) == ("running", True)
        machine.quit()
    check_image(machine.image, in_use=True)
    assert list(runtime.iterdir()) == []


def test_snapshot_of_another_machine_or_that_cannot_be_read_replaces_nobody(
    tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", "10.0", memory="96M") as machine:
        machine.beat()
        machine.save("larger")
        machine.quit()
    with SmallMachine(tmp_path / "m", "10.0", machine="pc-q35-7.1") as machine:
        machine.beat()
        machine.save("older")
        machine.quit()
    with SmallMachine(tmp_path / "m", "10.0") as machine:
        machine.beat()
        machine.save("damaged")
        with pytest.raises(StillframeError, match=r"Size mismatch: pc\.ram: 0x6000000 != 0x4000000"):
            machine.job("snapshot-load", "larger", replace=True)
        with pytest.raises(StillframeError, match=r"is 'pc-q35-7\.1' and local is 'pc-q35-7\.2'"):
            machine.job("snapshot-load", "older", replace=True)
        damage(machine.image)
        with pytest.raises(StillframeError, match="Error -22 while loading VM state"):
            machine.job("snapshot-load", "damaged", replace=True)
        assert machine.status() == "running"
        machine.beat()
        machine.quit()


@every_version
def test_snapshot_of_a_disk_of_another_size_is_refused_before_anything_is_touched(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    def resize(size: str) -> None:
        words = ["resize", "-q", "--shrink", str(tmp_path / "m/root.qcow2"), size]
        subprocess.run([peer("qemu-img"), *words], check=True)

    with SmallMachine(tmp_path / "m", version) as machine:
        machine.beat()
        machine.save("smaller")
        machine.quit()
    resize("96M")
    with SmallMachine(tmp_path / "m", version) as machine:
        before = machine.beat()
        for replace in (False, True):
            with pytest.raises(
                StillframeError, match="has 100663296 bytes, and had 67108864 in snapshot 'smaller'"
            ):
                machine.job("snapshot-load", "smaller", replace=replace)
        assert machine.beat() > before
        machine.quit()
    check_image(machine.image, in_use=True)
    resize("64M")
    with SmallMachine(tmp_path / "m", version) as machine:
        machine.load("smaller")
        machine.beat()
        machine.quit()


def damage(image: Path) -> None:
    """Each record of one page of the guest's has a flag that no record has."""
    record, data = bytes.fromhex("0000000001001028"), image.read_bytes()
    at, found = -1, 0
    with image.open("r+b") as file:
        while (at := data.find(record, at + 1)) >= 0:
            file.seek(at + 7)
            file.write(b"\x68")
            found += 1
    assert found
