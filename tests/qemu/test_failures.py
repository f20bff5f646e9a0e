"""What is left when QEMU dies: images that are whole, older snapshots that load, a clear word, and no process or file.

`dying.py` kills it, or us, at a step of a save or load that is chosen by its number. Here a few are, another each day;
STILLFRAME_LONG=1 goes through all of them.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu.killed import SmallMachine, listed, qemu_of, qemus_of, steps
from qemu_guests import GuestMachine, QemuGuest, check_image, versions
from stillframe.client import Client
from stillframe.errors import StillframeError


def outcome_of(work: Callable[[], object]) -> str:
    """What a client is told of it; "done" for a success."""
    try:
        work()
    except (StillframeError, OSError) as error:
        return str(error)
    return "done"


def keep_one(directory: Path, version: str) -> None:
    """A machine was there, and has left the snapshot "kept"."""
    with SmallMachine(directory, version) as machine:
        machine.beat()
        machine.save("kept")
        machine.quit()


def assert_kept(machine: SmallMachine, runtime: Path, step: str) -> None:
    """It has ended, the snapshot is there, and nothing else is left. :param step: at which somebody was killed."""
    assert list(runtime.iterdir()) == [], step
    check_image(machine.image, in_use=True)
    assert listed(machine.image) == ["kept"], step


def test_qemu_that_is_killed_ends_the_machine_with_a_word_and_nothing_is_left(
    tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", "10.0", "--name", "box") as machine:
        machine.beat()

        async def shutdown(client: Client) -> object:
            async with client.events("SHUTDOWN") as events:
                os.kill(qemu_of(runtime), signal.SIGABRT)
                return (await anext(events)).data

        assert machine.talk(shutdown) == {"guest": False, "reason": "host-error"}
        assert machine.process.wait(30) == 1
    assert "QEMU ended with signal SIGABRT" in machine.log.read_text()
    assert list(runtime.iterdir()) == []
    check_image(machine.image, in_use=True)


def test_qemu_that_somebody_ends_says_so_with_its_last_words(tmp_path: Path, runtime: Path) -> None:
    with SmallMachine(tmp_path / "m", "7.2") as machine:
        machine.beat()
        os.kill(qemu_of(runtime), signal.SIGTERM)
        assert machine.process.wait(30) == 1
    assert "terminating on signal 15" in machine.log.read_text()
    check_image(machine.image)


def test_machine_whose_qemu_dies_is_started_anew_where_that_was_asked_for_but_not_for_ever(
    tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", "10.0", "--name", "box", "--restart") as machine:
        machine.beat()
        machine.save("kept")
        for _ in range(3):
            before = qemus_of(tmp_path)
            os.kill(before[0], signal.SIGKILL)
            machine.connect_again(lambda: qemus_of(tmp_path) not in ([], before))  # noqa: B023
            machine.beat()
        machine.load("kept")
        assert goes_on(machine)
        os.kill(qemu_of(runtime), signal.SIGKILL)
        assert machine.process.wait(30) == 1
    log = machine.log.read_text()
    assert (log.count("QEMU ended with signal SIGKILL"), log.count("is started anew")) == (4, 3)
    assert list(runtime.iterdir()) == []
    check_image(machine.image)
    assert listed(machine.image) == ["kept"]


@pytest.mark.xdist_group("qemu-10.0")
def test_guest_that_powers_off_ends_the_machine_unless_it_is_to_stay(tmp_path: Path, runtime: Path) -> None:
    with GuestMachine(tmp_path / "m", "10.0", "--no-shutdown") as machine:
        machine.console.until("HB 3 ")
        machine.save("up")
        machine.console.type("poweroff\n")
        while (status := machine.execute("query-status"))["status"] == "running":
            time.sleep(0.02)
        assert status == {"status": "shutdown", "running": False}
        machine.load("up")
        machine.execute("cont")
        machine.beat()
        machine.execute("set-action", shutdown="poweroff")
        machine.console.type("poweroff\n")
        assert machine.process.wait(60) == 0, machine.log.read_text()
    check_image(machine.image, in_use=True)


@pytest.mark.parametrize("version", versions("qemu"))
def test_qemu_killed_at_any_step_of_a_save_costs_that_snapshot_at_most(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    for number in steps("save", 1):
        directory = tmp_path / str(number)
        with SmallMachine(directory, version, "--name", "box", dying=("machine", number)) as machine:
            machine.beat()
            outcome = outcome_of(lambda: machine.save("new"))
            if not machine.died.exists():
                machine.quit()
                break
            assert machine.process.wait(60) == 1
        step = machine.died.read_text()
        assert "QEMU ended with signal SIGKILL" in machine.log.read_text(), step
        assert list(runtime.iterdir()) == [], step
        check_image(machine.image, in_use=True)
        assert (outcome == "done") <= ("new" in listed(machine.image)), (step, outcome)


@pytest.mark.parametrize("who", ["machine", "successor"])
@pytest.mark.parametrize("version", versions("qemu"))
def test_either_qemu_killed_at_any_step_of_a_load_leaves_snapshots_that_load(
    version: str, who: str, tmp_path: Path, runtime: Path
) -> None:
    keep_one(tmp_path / "m", version)
    for number in steps("load", 1):
        with SmallMachine(tmp_path / "m", version, "--name", "box", dying=(who, number)) as machine:
            machine.beat()
            outcome = outcome_of(lambda: machine.load("kept"))
            if not machine.died.exists():
                machine.quit()
                break
            step = f"{machine.died.read_text()}: {outcome}"
            if goes_on(machine):
                # It was not the machine yet, or not any more.
                assert (outcome == "done") == (who == "machine"), step
                machine.load("kept")
                machine.beat()
                machine.quit()
            else:
                assert machine.process.wait(60) == 1, step
        assert_kept(machine, runtime, step)


@pytest.mark.parametrize("version", versions("qemu"))
def test_qemu_killed_at_any_step_of_a_replacement_leaves_snapshots_that_load(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    keep_one(tmp_path / "m", version)
    for number in steps("load", 1):
        with SmallMachine(tmp_path / "m", version, "--name", "box", dying=("successor", number)) as machine:
            machine.beat()
            outcome = outcome_of(lambda: machine.job("snapshot-load", "kept", replace=True))
            if not machine.died.exists():
                machine.quit()
                break
            step = f"{machine.died.read_text()}: {outcome}"
            if outcome.endswith("had been ended for this load, and is gone"):
                assert machine.status() == "internal-error", step
                machine.load("kept")
                machine.beat()
                machine.quit()
            else:
                # It was the machine already.
                assert machine.process.wait(60) == 1, step
        assert_kept(machine, runtime, step)


def goes_on(machine: QemuGuest) -> bool:
    """Whether its guest is heard of again, and again; the console of a machine that ends is closed."""
    try:
        # The first may have been on its way when its QEMU was killed.
        for _ in range(5):
            machine.beat()
    except (AssertionError, OSError):
        return False
    return True
