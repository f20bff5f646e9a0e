"""The engine: exact slices, no instruction lost or run twice, the same with public functions alone."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from machine.machines import RAM, load, machine, saved, word
from machine.rv64 import Program
from stillframe.errors import Unsupported
from stillframe.machine.clock import VirtualClock
from stillframe.machine.engines.unicorn import layout
from stillframe.machine.engines.unicorn.engine import Counting, UnicornEngine
from stillframe.machine.run_state import RunState

COUNTER, INTERRUPTS, RESULT = RAM + 0x10_0000, RAM + 0x10_0008, RAM + 0x10_0010
TIME, DBCN = 0x54494D45, 0x4442434E


@pytest.fixture(params=["direct", "public"])
def any_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once as it is, once as if the self-check had found another Unicorn."""
    if request.param == "public":
        monkeypatch.setattr(layout, "_CPU", 448)
    return str(request.param)


def amoadd_under_timer(period: int = 50) -> Program:
    """Adds to COUNTER with amoadd and to s2, forever; a timer interrupt every `period` ticks counts INTERRUPTS."""
    p = Program()
    p.la("t0", "trap")
    p.csrw("stvec", "t0")
    p.li("s0", COUNTER)
    p.li("s1", 1)
    p.li("t0", 0x20)
    p.csrw("sie", "t0")
    p.csrr("a0", "time")
    p.sbi(TIME)
    p.li("t0", 2)
    p.csrs("sstatus", "t0")
    p.label("loop")
    p.amoadd("zero", "s1", "s0")
    p.addi("s2", "s2", 1)
    p.jump("loop")
    p.label("trap")
    p.li("t1", INTERRUPTS)
    p.load("t2", "t1")
    p.addi("t2", "t2", 1)
    p.store("t2", "t1")
    p.csrr("a0", "time")
    p.addi("a0", "a0", period)
    p.sbi(TIME)
    p.sret()
    return p


def test_amoadd_loop_stopped_ten_thousand_times_counts_exactly(any_path: str, tmp_path: Path) -> None:
    stops, period = (10_000, 50) if any_path == "direct" else (500, 2000)
    with machine(tmp_path, amoadd_under_timer(period)) as (built, _, _):
        built.start(paused=True)
        engine, clock = built.engine, built.clock
        assert isinstance(engine, UnicornEngine)
        assert engine.counting is (Counting.BLOCKS if any_path == "direct" else Counting.EXACT)
        clock.start()
        (cpu,) = engine.devices
        for _ in range(stops):
            clock.run_timers()
            engine.run_until(count=None, deadline_ns=clock.ns + 30_000)
            in_register = cpu.save_state()["gpr"][18]  # type: ignore[index]
            assert 0 <= word(built, COUNTER) - in_register <= 1, "between the two adds, at most"
        assert word(built, COUNTER) > stops
        assert word(built, INTERRUPTS) > stops // 50


def test_boundaries_asked_for_by_other_threads_lose_nothing(tmp_path: Path) -> None:
    with machine(tmp_path, amoadd_under_timer()) as (built, _, _):
        built.start()
        (cpu,) = built.engine.devices

        def look() -> None:
            for _ in range(150):
                counted, register = built.at_boundary(
                    lambda: (word(built, COUNTER), cpu.save_state()["gpr"][18])  # type: ignore[index]
                )
                assert 0 <= counted - register <= 1

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        built.stop()
        assert word(built, INTERRUPTS) > 10
        assert built.run_state is RunState.PAUSED


def countdown(iterations: int, finish: Callable[[Program], None]) -> Program:
    p = Program()
    p.li("t0", iterations)
    p.label("loop")
    p.addi("t0", "t0", -1)
    p.branch("ne", "t0", "zero", "loop")
    finish(p)
    return p


def test_icount_counts_every_instruction_once(tmp_path: Path) -> None:
    def stop(p: Program) -> None:
        p.shut_down()

    short, long = (countdown(n, stop) for n in (1000, 251_000))
    counts = []
    for number, program in enumerate((short, long)):
        directory = tmp_path / str(number)
        directory.mkdir()
        with machine(directory, program, icount_shift=0) as (built, _, _):
            built.start()
            assert built.wait(20) is not None
            built.at_boundary(lambda: None)
            counts.append(built.clock.instructions)
    extra = len(long.assemble()) // 4 - len(short.assemble()) // 4
    assert counts[1] - counts[0] == 2 * 250_000 + extra


def timed_trace() -> Program:
    """Prints a dot at each of 20 timer interrupts and stores the time of each; idles in between."""
    p = Program()
    p.li("s0", RESULT)
    p.li("s3", 20)
    p.li("t0", 0x20)
    p.csrw("sie", "t0")
    p.label("again")
    p.csrr("a0", "time")
    p.store("a0", "s0")
    p.addi("s0", "s0", 8)
    p.li("t0", 3000)
    p.add("a0", "a0", "t0")
    p.sbi(TIME)
    p.li("t0", 777)
    p.label("busy")
    p.addi("t0", "t0", -1)
    p.branch("ne", "t0", "zero", "busy")
    p.wfi()
    p.li("a0", ord("."))
    p.sbi(DBCN, 2)
    p.addi("s3", "s3", -1)
    p.branch("ne", "s3", "zero", "again")
    p.shut_down()
    return p


def test_two_runs_with_icount_see_the_same_times(tmp_path: Path) -> None:
    traces = []
    for disturbed in (False, True):
        with machine(tmp_path, timed_trace(), icount_shift=3) as (built, console, _):
            built.start()
            while disturbed and built.wait(0.0005) is None:
                built.stop()
                built.cont()
            assert built.wait(20) is not None
            built.at_boundary(lambda: None)
            traces.append(
                ([word(built, RESULT + 8 * n) for n in range(20)], built.clock.instructions, built.clock.ns)
            )
            assert bytes(console.output) == b"." * 20
    assert traces[0] == traces[1]
    assert all(
        later - earlier >= 3000 for earlier, later in zip(traces[0][0], traces[0][0][1:], strict=False)
    )


def test_guest_time_stands_still_while_the_machine_does(tmp_path: Path) -> None:
    with machine(tmp_path, timed_trace()) as (built, _, _):
        built.start()
        built.stop()
        before = built.clock.ns
        threading.Event().wait(0.05)
        assert built.clock.ns == before
        built.cont()
        assert built.wait(20) is not None


def trap_causes() -> Program:
    """Provokes exceptions and stores (scause, stval, sepc) of each at RESULT."""
    p = Program()
    p.la("t0", "trap")
    p.csrw("stvec", "t0")
    p.li("s0", RESULT)
    p.li("t1", 0x4000_0000)
    p.load("t2", "t1")
    p.store("t2", "t1")
    p.word(0xFFFF_FFFF)
    p.ebreak()
    p.li("t1", RAM + 1)
    p.load_reserved("t2", "t1")
    p.shut_down()
    p.label("trap")
    p.csrr("t3", "scause")
    p.store("t3", "s0")
    p.csrr("t3", "stval")
    p.store("t3", "s0", 8)
    p.csrr("t3", "sepc")
    p.store("t3", "s0", 16)
    p.addi("s0", "s0", 24)
    p.addi("t3", "t3", 4)
    p.csrw("sepc", "t3")
    p.sret()
    return p


def test_exceptions_reach_the_guest_as_the_standard_says(any_path: str, tmp_path: Path) -> None:
    with machine(tmp_path, trap_causes()) as (built, _, _):
        built.start()
        assert built.wait(20) is not None
        built.at_boundary(lambda: None)
        traps = [tuple(word(built, RESULT + 24 * n + 8 * i) for i in range(3)) for n in range(5)]
        causes = [cause for cause, _, _ in traps]
        assert causes == [5, 7, 2, 3, 4]
        assert traps[2][1] == 0xFFFF_FFFF
        assert [traps[n + 1][2] - traps[n][2] for n in range(3)] == [4, 4, 4]
        assert traps[4][1] == RAM + 1


def busy_registers() -> Program:
    """Every integer register and several CSRs and floating point registers get values; then it waits for RESULT to be set."""
    p = Program()
    p.li("t0", 0x6000)
    p.csrs("sstatus", "t0")
    p.li("t0", 3)
    p.word(0xD222_8053 | 1 << 7)  # fcvt.d.l f1, t0
    p.li("t0", 7)
    p.word(0xD222_8053 | 2 << 7)  # fcvt.d.l f2, t0
    p.word(0x1A20_F1D3)  # fdiv.d f3, f1, f2: inexact
    p.li("t0", 0x1234_5678)
    p.csrw("sscratch", "t0")
    for number, name in enumerate(
        ("ra", "sp", "gp", "tp", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"), 1
    ):
        p.li(name, 0x0101_0101 * number)
    p.li("s0", RESULT)
    p.label("wait")
    p.load("t0", "s0")
    p.branch("eq", "t0", "zero", "wait")
    p.csrr("t1", "fcsr")
    p.store("t1", "s0", 8)
    p.word(0xE201_82D3 | 0 << 12)  # fmv.x.d t0, f3
    p.store("t0", "s0", 16)
    p.csrr("t1", "sscratch")
    p.store("t1", "s0", 24)
    for name in ("ra", "sp", "gp", "tp", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"):
        p.add("t6", "t6", name)
    p.store("t6", "s0", 32)
    p.shut_down()
    return p


@pytest.mark.parametrize("restorer", ["direct", "public"])
@pytest.mark.parametrize("saver", ["direct", "public"])
def test_every_register_survives_into_a_fresh_machine(
    saver: str, restorer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = busy_registers()
    monkeypatch.setattr(layout, "_CPU", 440 if saver == "direct" else 448)
    with machine(tmp_path, program) as (built, _, _):
        built.start()
        while built.at_boundary(lambda: built.engine.devices[0].save_state()["gpr"])[8] != RESULT:  # type: ignore[index]
            pass
        state = saved(built)
        assert state[1]["cpu"]["fflags"] == 1
    monkeypatch.setattr(layout, "_CPU", 440 if restorer == "direct" else 448)
    with machine(tmp_path, program) as (fresh, _, _):
        fresh.start(paused=True)
        load(fresh, state)
        again = saved(fresh)
        assert again[1]["cpu"] == state[1]["cpu"]
        assert again[1]["timer"] == state[1]["timer"]
        fresh.memory.write(RESULT, b"\1")
        fresh.cont()
        assert fresh.wait(20) is not None
        fresh.at_boundary(lambda: None)
        assert word(fresh, RESULT + 8) == 1
        assert word(fresh, RESULT + 16) == 0x3FDB_6DB6_DB6D_B6DB
        assert word(fresh, RESULT + 24) == 0x1234_5678
        assert word(fresh, RESULT + 32) == 0x0101_0101 * 78


def test_code_written_by_a_device_or_a_load_is_what_runs_next(any_path: str, tmp_path: Path) -> None:
    p = Program()
    p.li("s0", RESULT)
    p.label("loop")
    p.addi("t0", "zero", 1)
    p.store("t0", "s0")
    p.jump("loop")
    code = p.assemble()
    at = RAM + len(code) - 12
    two = Program()
    two.addi("t0", "zero", 2)
    with machine(tmp_path, p) as (built, _, _):
        built.start()
        while built.at_boundary(lambda: word(built, RESULT)) != 1:
            pass
        built.at_boundary(lambda: built.memory.write(at, two.assemble()))
        while built.at_boundary(lambda: word(built, RESULT)) != 2:
            pass
        with built.hold(RunState.RESTORE_VM):
            built.memory.blocks[0].view[: len(code)] = code
            built.memory.replaced()
        while built.at_boundary(lambda: word(built, RESULT)) != 1:
            pass


def test_unicorn_of_another_layout_is_refused_only_where_nothing_public_would_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "_CPU", 448)
    UnicornEngine(VirtualClock(), lambda registers: (0, 0)).close()
    with pytest.raises(Unsupported, match="cannot be counted"):
        UnicornEngine(VirtualClock(icount_shift=1), lambda registers: (0, 0))
    monkeypatch.setattr(layout, "STATE_WORDS", 190)
    with pytest.raises(Unsupported, match="cannot be saved"):
        UnicornEngine(VirtualClock(), lambda registers: (0, 0))


def test_self_check_finds_this_unicorn() -> None:
    assert layout.find_counter() is not None


@pytest.mark.parametrize("place", ["_COUNT_HOOK", "_COUNTER", "_COUNT", "_NO_EXIT"])
def test_self_check_notices_each_place_that_moved(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_found", [])
    monkeypatch.setattr(layout, place, getattr(layout, place) + 8)
    assert layout.find_counter() is None
