"""The Linux guests of scripts/debian-guest: they boot, and they notice what they are for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from guest.consoles import RUNNERS, GuestProcess, argv
from peers import ROOT, checking_guest, linux_guest, missing, peer


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "root.qcow2"
    subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", str(path), "64M"], check=True)
    return path


def test_a_shell_formats_and_checks_ext4(runner: str, disk: Path) -> None:
    files = linux_guest()
    words = argv(
        runner, files["kernel"], initrd=files["initrd"], disk=disk, memory=256, append="console=ttyS0 quiet"
    )
    with GuestProcess(words) as guest:
        guest.expect(r"^stillframe: shell ready")
        guest.expect(r"~ # ")
        guest.send(
            "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && echo kept >/mnt/file && umount /mnt; echo mk=$?"
        )
        assert guest.expect(r"^mk=(\d+)\r")[1] == b"0"
        guest.send("fsck.ext4 -fn /dev/vda; echo fs=$?")
        assert guest.expect(r"^fs=(\d+)\r")[1] == b"0"
        guest.send("mount /dev/vda /mnt; cat /mnt/file; hwclock >/dev/null; echo rtc=$?")
        assert guest.expect(r"^(\w+)\r\nrtc=(\d+)\r").groups() == (b"kept", b"0")
        guest.send("poweroff -f")
        assert guest.wait() == 0


def test_the_self_checking_linux_finds_nothing_bad_until_wrecked(runner: str, disk: Path) -> None:
    files = checking_guest()
    kernel, initrd = files["kernel"], files["check-initrd"]
    words = argv(runner, kernel, initrd=initrd, disk=disk, memory=192, append="console=ttyS0 quiet period=10")
    with GuestProcess(words) as guest:
        nonce = guest.expect(r"^boot nonce=([0-9a-f]{16}) pattern=32 disks=1\r")[1].decode()
        beats = [guest.heartbeat() for _ in range(100)]
        assert [beat.number for beat in beats] == list(range(1, 101))
        assert {(beat.bad, beat.nonce) for beat in beats} == {(0, nonce)}
        assert guest.command("check") == "ok check bad=0"
        assert guest.command("wreck") == "ok wreck"
        guest.command("check")
        status = guest.status()
        assert min(status["memory"], status["shared"], status["disk"]) > 0


@pytest.mark.parametrize("script", ["debian-guest", "debian-qemu"])
def test_a_host_without_a_debian_mirror_gets_one_sentence(script: str, tmp_path: Path) -> None:
    if not Path("/usr/bin/apt-get").exists():
        missing("apt-get", "these scripts need a Debian host")
    # A copy of the scripts has a cache of its own; its apt knows no sources.
    copy = tmp_path / "copy"
    for name in ("scripts", "guest"):
        shutil.copytree(ROOT / name, copy / name)
    config = tmp_path / "apt.conf"
    config.write_text('Dir::Etc::SourceList "/dev/null"; Dir::Etc::SourceParts "/dev/null";\n')
    run = subprocess.run(
        [str(copy / "scripts" / script)],
        env={**os.environ, "APT_CONFIG": str(config)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: The host's apt knows no source whose path ends in `debian`")
    assert "Traceback" not in run.stderr
    left = {path.name for path in (copy / ".cache" / script).iterdir()}
    assert left <= {"lock", "apt"}


def test_qemu_10_is_whole_and_says_so() -> None:
    for name in ("qemu-img", "qemu-io", "qemu-nbd", "qemu-system-x86_64", "qemu-system-riscv64"):
        run = subprocess.run(
            [peer(name, "10.0"), "--version"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "10.0." in run.stdout
        assert run.stderr == ""
