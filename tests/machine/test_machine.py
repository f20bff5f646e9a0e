"""Run states: what a client of the machine can rely on while others stop, continue, hold and end it."""

import threading
from pathlib import Path

import pytest

from machine.machines import RAM, Events, load, machine, saved, wait_until, word
from machine.rv64 import Program
from stillframe.errors import InvalidRequest, Refused, StateMismatch
from stillframe.machine.build import DriveConfig, MachineConfig, build_machine
from stillframe.machine.machine import Machine
from stillframe.machine.run_state import RunState

COUNTER = RAM + 0x10_0000


def counting() -> Program:
    p = Program()
    p.li("s0", COUNTER)
    p.label("loop")
    p.addi("t0", "t0", 1)
    p.store("t0", "s0")
    p.jump("loop")
    return p


def advances(built: Machine) -> bool:
    """Whether the guest runs: its counter moves between two boundaries, or it does not."""
    first = built.at_boundary(lambda: word(built, COUNTER))
    return any(built.at_boundary(lambda: word(built, COUNTER)) != first for _ in range(20))


def none_machine() -> tuple[Machine, Events]:
    events = Events()
    return build_machine(MachineConfig(board="none", name="n"), events.bus), events


def test_machine_without_processor_has_run_states_and_time() -> None:
    built, events = none_machine()
    assert built.run_state is RunState.PRELAUNCH
    built.start(paused=True)
    assert built.run_state is RunState.PRELAUNCH
    built.cont()
    built.stop()
    assert built.run_state is RunState.PAUSED
    with built.hold(RunState.SAVE_VM):
        assert built.run_state is RunState.PAUSED
    built.reset()
    built.powerdown()
    built.quit()
    built.close()
    assert events.names == ["RESUME", "STOP", "RESET", "POWERDOWN", "SHUTDOWN"]
    assert built.shutdown is not None
    assert built.shutdown.reason == "host-qmp-quit"
    assert [device.section_name for device in built.devices] == ["timer"]


def test_board_without_processor_takes_no_devices() -> None:
    with pytest.raises(InvalidRequest, match="no processor"):
        build_machine(MachineConfig(board="none", kernel=Path("/kernel")), Events().bus)
    with pytest.raises(InvalidRequest, match="There is no board 'pc'"):
        build_machine(MachineConfig(board="pc"), Events().bus)


def test_stop_and_cont_hold_and_release_the_guest(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, events):
        built.start(paused=True)
        assert built.run_state is RunState.PRELAUNCH
        assert not advances(built)
        built.cont()
        built.cont()
        assert advances(built)
        built.stop()
        built.stop()
        assert not advances(built)
        assert built.run_state is RunState.PAUSED
        built.cont()
        assert advances(built)
        assert events.names == ["RESUME", "STOP", "RESUME"]


@pytest.mark.parametrize("state", [RunState.SAVE_VM, RunState.RESTORE_VM])
def test_hold_resumes_a_running_guest_even_after_an_error(state: RunState, tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, events):
        built.start()

        def fail() -> None:
            with built.hold(state):
                assert built.run_state is state
                before = word(built, COUNTER)
                with built.hold(RunState.SAVE_VM):
                    assert built.run_state is state
                assert word(built, COUNTER) == before
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert built.run_state is RunState.RUNNING
        assert advances(built)
        assert events.names == ["RESUME", "STOP", "RESUME"]


def test_hold_leaves_a_stopped_guest_stopped_and_tells_nothing(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, events):
        built.start(paused=True)
        with built.hold(RunState.SAVE_VM):
            assert built.run_state is RunState.PRELAUNCH
        assert built.run_state is RunState.PRELAUNCH
        assert events.names == []


def during_hold(built: Machine, action: str) -> None:
    """Another client acts while somebody holds the machine; its call must not wait for the end."""
    other = threading.Thread(target=getattr(built, action))
    with built.hold(RunState.SAVE_VM):
        other.start()
        other.join(20)
        assert not other.is_alive()


def test_stop_during_a_hold_takes_effect_at_its_end(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, events):
        built.start()
        during_hold(built, "stop")
        assert built.run_state is RunState.PAUSED
        assert not advances(built)
        assert events.names == ["RESUME", "STOP"]


def test_cont_during_a_hold_of_a_stopped_guest_takes_effect_at_its_end(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, events):
        built.start(paused=True)
        during_hold(built, "cont")
        assert advances(built)
        assert events.names == ["RESUME"]


def test_quit_during_a_hold_ends_the_machine_at_its_end(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, events):
        built.start()
        during_hold(built, "quit")
        assert built.wait(0) is not None
        assert built.run_state is RunState.SHUTDOWN
        assert not advances(built)
        assert events.names == ["RESUME", "STOP", "SHUTDOWN"]


def test_reset_waits_for_the_end_of_a_hold(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, events):
        built.start()
        other = threading.Thread(target=built.reset)
        with built.hold(RunState.SAVE_VM):
            other.start()
            wait_until(lambda: built._waiting == 1, "the reset waits")
            assert "RESET" not in events.names
        other.join(20)
        assert events.names[-1] == "RESET"
        assert built.run_state is RunState.RUNNING


def test_many_clients_at_once_leave_the_machine_consistent(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, events):
        built.start()

        def stop_and_go() -> None:
            for _ in range(40):
                built.stop()
                built.cont()

        def hold() -> None:
            for _ in range(40):
                with built.hold(RunState.SAVE_VM):
                    before = word(built, COUNTER)
                    assert built.run_state is not RunState.RUNNING
                    assert word(built, COUNTER) == before

        threads = [threading.Thread(target=target) for target in (stop_and_go, stop_and_go, hold, hold)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        built.cont()
        assert advances(built)
        told = [name for name in events.names if name in ("STOP", "RESUME")]
        assert told == ["RESUME", "STOP"] * (len(told) // 2) + ["RESUME"]


def test_set_run_state_in_a_hold_decides_its_end(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, _):
        built.start()
        with built.hold(RunState.RESTORE_VM):
            built.set_run_state(RunState.PAUSED)
        assert built.run_state is RunState.PAUSED


def test_reset_starts_the_guest_anew(tmp_path: Path) -> None:
    p = Program()
    p.li("s0", COUNTER)
    p.load("t0", "s0")
    p.addi("t0", "t0", 1)
    p.store("t0", "s0")
    p.addi("s5", "s5", 1)
    p.label("loop")
    p.jump("loop")
    with machine(tmp_path, p) as (built, _, events):
        built.start()
        for boots in (1, 2, 3):
            wait_until(
                lambda boots=boots: built.at_boundary(lambda: word(built, COUNTER)) == boots, f"boot {boots}"
            )  # type: ignore[misc]
            assert built.at_boundary(lambda: built.engine.devices[0].save_state()["gpr"])[21] <= 1  # type: ignore[index]
            built.reset()
        assert [dict(e.data) for e in events.seen if e.name == "RESET"] == [
            {"guest": False, "reason": "host-qmp-system-reset"}
        ] * 3


def guest_asks(extension: int, function: int, first: int) -> Program:
    p = Program()
    p.li("a0", first)
    p.li("a1", 0)
    p.sbi(extension, function)
    p.label("loop")
    p.jump("loop")
    return p


def test_guest_that_powers_off_ends_the_machine(tmp_path: Path) -> None:
    with machine(tmp_path, guest_asks(0x53525354, 0, 0)) as (built, _, events):
        built.start()
        shutdown = built.wait(20)
        assert shutdown is not None
        assert (shutdown.guest, shutdown.reason) == (True, "guest-shutdown")
        wait_until(lambda: built.run_state is RunState.SHUTDOWN, "shutdown")
        assert dict(events.wait_for("SHUTDOWN").data) == {"guest": True, "reason": "guest-shutdown"}


def test_guest_that_powers_off_stays_where_the_machine_is_to_be_kept(tmp_path: Path) -> None:
    with machine(tmp_path, guest_asks(0x53525354, 0, 0), exit_on_shutdown=False) as (built, _, events):
        built.start()
        events.wait_for("SHUTDOWN")
        wait_until(lambda: built.run_state is RunState.SHUTDOWN, "shutdown")
        assert built.wait(0) is None
        with pytest.raises(Refused, match="Resetting the Virtual Machine is required"):
            built.cont()
        built.reset()
        assert built.run_state is RunState.PRELAUNCH


def test_guest_that_resets_itself_comes_back(tmp_path: Path) -> None:
    p = Program()
    p.li("s0", COUNTER)
    p.load("t0", "s0")
    p.addi("t0", "t0", 1)
    p.store("t0", "s0")
    p.li("t1", 3)
    p.branch("eq", "t0", "t1", "done")
    p.li("t1", 0x10_0000)
    p.li("t2", 0x7777)
    p.store("t2", "t1", size=4)
    p.label("loop")
    p.jump("loop")
    p.label("done")
    p.shut_down()
    with machine(tmp_path, p) as (built, _, events):
        built.start()
        assert built.wait(20) is not None
        resets = [dict(e.data) for e in events.seen if e.name == "RESET"]
        assert resets == [{"guest": True, "reason": "guest-reset"}] * 2


def test_defect_in_a_device_stops_the_guest_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillframe.machine.devices.rtc import Rtc

    def broken(self: Rtc, offset: int, size: int) -> int:
        raise KeyError("a defect")

    monkeypatch.setattr(Rtc, "read", broken)
    p = Program()
    p.li("t1", 0x10_1000)
    p.load("t2", "t1", size=4)
    p.label("loop")
    p.jump("loop")
    with machine(tmp_path, p) as (built, _, events):
        built.start()
        events.wait_for("STOP")
        assert built.run_state is RunState.INTERNAL_ERROR
        assert "a defect" in caplog.text
        with pytest.raises(Refused, match="Resetting"):
            built.cont()


def test_state_for_another_machine_is_refused_by_section_and_field(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, _):
        built.start(paused=True)
        state = saved(built)
        wrong = {
            "cpu": ("priv", 3),
            "plic": ("priority", (9,) * 96),
            "serial": ("received_count", 17),
            "virtio-rng": ("queue_ready", True),
            "vmgenid": ("guid", b"short"),
            "timer": ("cpu_clock_offset", -1),
            "rtc": ("latched_high", 1 << 32),
        }
        for device in built.devices:
            if device.section_name not in wrong:
                continue
            field, value = wrong[device.section_name]
            with pytest.raises(StateMismatch, match=device.section_name) as caught:
                device.check_state({**state[1][device.section_name], field: value})
            assert caught.value.section == device.section_name
        assert saved(built) == state


def test_load_gives_a_new_generation_id_and_the_guest_can_read_it(tmp_path: Path) -> None:
    p = Program()
    p.li("t0", 0x10_2000)
    p.li("s0", COUNTER)
    p.label("loop")
    p.load("t1", "t0", size=4)
    p.store("t1", "s0")
    p.jump("loop")
    with machine(tmp_path, p) as (built, _, _):
        built.start()
        wait_until(lambda: built.at_boundary(lambda: word(built, COUNTER)) != 0, "the guest has read it")
        state = saved(built)
        assert int.from_bytes(state[1]["vmgenid"]["guid"][:4], "little") == word(built, COUNTER)  # type: ignore[index]
        load(built, state)
        fresh = saved(built)[1]["vmgenid"]["guid"]
        assert fresh != state[1]["vmgenid"]["guid"]
        wanted = int.from_bytes(fresh[:4], "little")  # type: ignore[index]
        wait_until(
            lambda: built.at_boundary(lambda: word(built, COUNTER)) == wanted, "the guest sees the new one"
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_size": 1 << 20}, "of memory"),
        ({"memory_size": (8 << 20) + 1}, "whole pages"),
        ({"bios": None}, "nothing to start"),
        ({"engine": "qemu"}, "cannot have the engine"),
        ({"initrd": Path("/initrd")}, "without a kernel"),
    ],
)
def test_configuration_that_does_not_fit_is_refused_in_a_sentence(
    options: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=words):
        with machine(tmp_path, counting(), **options):
            pass


def test_too_many_drives_and_bad_policies_are_refused(tmp_path: Path) -> None:
    from machine.machines import MemoryNode

    drives = tuple(DriveConfig(MemoryNode(f"n{n}", 4096)) for n in range(8))
    with pytest.raises(Refused, match="8 drives"):
        with machine(tmp_path, counting(), drives=drives):
            pass
    with pytest.raises(InvalidRequest, match="not an error policy"):
        with machine(tmp_path, counting(), drives=(DriveConfig(MemoryNode("n", 4096), werror="never"),)):
            pass


def test_a_device_that_fails_as_the_guest_is_stopped_leaves_the_guest_running(tmp_path: Path) -> None:
    with machine(tmp_path, counting()) as (built, _, _):
        built.start()
        device = built.devices[-1]
        drain = device.drain

        def fail() -> None:
            device.drain = drain
            raise MemoryError

        device.drain = fail
        with pytest.raises(MemoryError):
            with built.hold(RunState.SAVE_VM):
                pass
        assert built.run_state is RunState.RUNNING
        assert advances(built)
        built.stop()
        assert built.run_state is RunState.PAUSED
