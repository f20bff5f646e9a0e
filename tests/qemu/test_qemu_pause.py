"""What happens in the moment between the choice of a way to save and the pause itself: 7.2 and 10.0, a guest of a few pages."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from peers import peer
from qemu.killed import SmallMachine, small_guest
from qemu_guests import check_image, machine_within, versions
from running import STILLFRAME
from stillframe.errors import Cancelled
from stillframe.machine.build import MachineHome, QemuMachine
from stillframe.machine.engines.qemu import capture as capture_module
from stillframe.machine.run_state import RunState

every_version = pytest.mark.parametrize("version", versions("agent"))


@contextmanager
def machine(directory: Path, version: str, home: MachineHome | None = None) -> Iterator[QemuMachine]:
    """A small one, whose guest powers itself off at a reset, and stays."""
    with machine_within(
        directory,
        peer("qemu-system-x86_64", version),
        "HB 3 ",
        kernel=small_guest(),
        append="mb=16",
        words=("-no-reboot", "-no-shutdown"),
        home=home,
    ) as found:
        yield found


def way(machine: QemuMachine) -> str:
    """How the state was taken; all of it came."""
    with machine.captured(lambda: None) as found:
        source = found.source()
        assert len(found.rest(source.offset, 1 << 30)) > 1 << 20
        return found.how


def before_the_pause(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    monkeypatch.setattr(capture_module, "fold_other", lambda pid, attend: happens())


@every_version
def test_clients_stop_just_before_the_pause_is_not_undone(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(tmp_path, version) as small:
        before_the_pause(monkeypatch, small.stop)
        assert way(small) == ("stopped" if version == "7.2" else "background")
        assert small.run_state is RunState.PAUSED
        small.cont()
        assert small.run_state is RunState.RUNNING


@every_version
def test_guest_that_powers_off_just_before_the_pause_stays_off(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(tmp_path, version) as small:

        def power_off() -> None:
            small.reset()
            while small.run_state is RunState.RUNNING:
                assert not small.wait(0.01), small.failure

        before_the_pause(monkeypatch, power_off)
        assert way(small) == "stopped"
        assert small.run_state is not RunState.RUNNING
        assert not small.wait(0), small.failure


@every_version
def test_save_given_up_before_the_pause_leaves_no_word_that_the_guest_is_to_run(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(MachineHome.named(tmp_path / "box.qemu", ["run"])) as home:
        with machine(tmp_path, version, home) as small:

            def give_up() -> None:
                assert home.record is not None
                assert home.record.runs
                raise Cancelled

            before_the_pause(monkeypatch, give_up)
            with pytest.raises(Cancelled):
                way(small)
            assert home.record is not None
            assert not home.record.runs
            assert small.run_state is RunState.RUNNING


@every_version
def test_memory_is_in_huge_pages_when_the_guest_is_stopped_again(version: str, tmp_path: Path) -> None:
    found = []

    def note(pid: int) -> None:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found.append(int(text.split("AnonHugePages:")[1].split()[0]))

    with machine(tmp_path, version) as small:
        pid = small._qemu.pid
        note(pid)
        if not found[0]:
            pytest.skip("this host has no huge pages for it")
        for _ in range(2):
            with small.captured(lambda: note(pid)) as capture:
                capture.rest(capture.source().offset, 1 << 30)
            note(pid)
    _, _, after_one, at_two, _ = found
    assert after_one < found[0]
    if os.geteuid() != 0:
        pytest.skip("the kernel does it for root alone")
    # A busy host may have none just then, for some.
    assert at_two > (after_one + found[0]) // 2


@every_version
def test_without_the_right_to_put_memory_together_saves_and_loads_work(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = ("setpriv", "--bounding-set", "-sys_nice")
    if os.geteuid() != 0 or subprocess.run([*without, "true"]).returncode:
        pytest.skip("only root has a right to give up")
    monkeypatch.setattr(SmallMachine, "program", (*without, *STILLFRAME))
    with SmallMachine(tmp_path / "m", version) as small:
        for tag in ("one", "two"):
            small.beat()
            small.save(tag)
        small.load("one")
        small.beat()
        small.quit()
    assert "QEMU's memory stays in small pages: Operation not permitted" not in (small.log.read_text())
    check_image(small.image)


def test_python_without_a_name_for_processes_saves_all_the_same(tmp_path: Path) -> None:
    """Some builds of Python have no `os.pidfd_open`."""
    program = (
        "import os, sys; del os.pidfd_open\n"
        "from stillframe.machine.engines.qemu.huge_pages import fold_other\n"
        "try: fold_other(os.getppid(), lambda: None)\n"
        "except OSError as error: print(error.strerror)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
