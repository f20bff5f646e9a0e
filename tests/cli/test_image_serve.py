"""`stillframe image serve`, as a process of its own, with qemu-img as its client."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peers import peer

PATIENCE = 20.0


def qemu(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([peer(program), *map(str, words)], capture_output=True, text=True)


@contextmanager
def serve(*words: object) -> Iterator[subprocess.Popen[str]]:
    """The command, until its socket is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stillframe", "image", "serve", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        path = Path(words[words.index("--socket") + 1])
        deadline = time.monotonic() + PATIENCE
        while not path.exists() and process.poll() is None:
            assert time.monotonic() < deadline, "it does not listen"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    assert not qemu("qemu-img", "create", "-q", "-f", "qcow2", disk, "1M").returncode
    assert not qemu("qemu-io", "-c", "write -P 1 0 64k", disk).returncode
    assert not qemu("qemu-img", "snapshot", "-c", "old", disk).returncode
    return disk


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_image_is_served_until_the_user_ends_it_and_is_clean_then(
    tmp_path: Path, disk: Path, number: signal.Signals
) -> None:
    at = tmp_path / "s"
    with serve("--socket", at, "--export-name", "root", disk) as process:
        url = f"nbd+unix:///root?socket={at}"
        assert not qemu("qemu-io", "-f", "raw", "-c", "write -P 2 100 1000", url).returncode
        assert qemu("qemu-img", "info", f"nbd+unix:///?socket={at}").returncode
        # Nobody else writes to it meanwhile.
        assert "lock" in qemu("qemu-io", "-c", "write 0 512", disk).stderr
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert said.count("\n") == 1
    assert not at.exists()
    assert not qemu("qemu-img", "check", disk).returncode
    assert "failed" not in qemu("qemu-io", "-c", "read -P 2 100 1000", disk).stdout


def test_a_snapshot_and_a_read_only_image_cannot_be_written(tmp_path: Path, disk: Path) -> None:
    assert not qemu("qemu-io", "-c", "write -P 3 0 64k", disk).returncode
    at = tmp_path / "s"
    url = f"nbd+unix:///?socket={at}"
    for words, byte in ((["--snapshot", "old"], 1), (["--read-only"], 3)):
        with serve("--socket", at, *words, disk) as process:
            assert qemu("qemu-io", "-f", "raw", "-c", "write 0 512", url).returncode
            said = qemu("qemu-io", "-r", "-f", "raw", "-c", f"read -P {byte} 0 64k", url).stdout
            assert "64 KiB" in said
            assert "failed" not in said
            process.terminate()
            assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["disk"], "Say where to listen"),
        (["--socket", "s", "--snapshot", "nope", "disk"], "no snapshot 'nope'"),
        (["--socket", "s", "missing"], "missing"),
        (["--tcp", ":0", "disk"], "all addresses"),
        (["--tcp", "1", "disk"], "not an address"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(
    tmp_path: Path, disk: Path, words: list[str], said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stillframe", "image", "serve", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()
