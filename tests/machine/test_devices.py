"""Interrupt controller, serial port, clock and firmware: what a guest's driver sees."""

import random
import time
from collections.abc import Sequence

import pytest

from machine.machines import RAM
from stillframe.errors import StateMismatch
from stillframe.machine.clock import VirtualClock
from stillframe.machine.console import MemoryConsole
from stillframe.machine.devices.plic import Plic
from stillframe.machine.devices.rtc import Rtc
from stillframe.machine.devices.sbi import Sbi
from stillframe.machine.devices.uart import Uart
from stillframe.machine.engines.none import NoEngine
from stillframe.machine.mailbox import Mailbox
from stillframe.machine.memory import GuestMemory, MemoryBlock

ENABLE, THRESHOLD, CLAIM = 0x2080, 0x201000, 0x201004


def plic() -> tuple[Plic, list[bool]]:
    driven: list[bool] = []
    device = Plic(driven.append)
    driven.clear()
    return device, driven


def test_claims_come_by_priority_then_number_and_respect_the_threshold() -> None:
    device, driven = plic()
    for source, priority in ((3, 1), (5, 7), (6, 7), (40, 2), (9, 0)):
        device.write(4 * source, 4, priority)
        device.set_line(source, True)
    assert driven == []
    device.write(ENABLE, 4, 0xFFFF_FFFF)
    device.write(ENABLE + 4, 4, 0xFFFF_FFFF)
    assert driven == [True]
    device.write(THRESHOLD, 4, 1)
    assert [device.read(CLAIM, 4) for _ in range(4)] == [5, 6, 40, 0]
    assert driven == [True, False]
    device.write(THRESHOLD, 4, 0)
    assert device.read(CLAIM, 4) == 3
    for source in (5, 6, 40, 3):
        device.set_line(source, False)
        device.write(CLAIM, 4, source)
    assert device.read(CLAIM, 4) == 0
    assert driven[-1] is False


def test_level_that_stays_interrupts_again_after_completion_and_an_edge_does_not() -> None:
    device, _ = plic()
    device.write(ENABLE, 4, 0xFFFF)
    for source in (1, 2):
        device.write(4 * source, 4, 1)
    device.set_line(1, True)
    assert [device.read(CLAIM, 4), device.read(CLAIM, 4)] == [1, 0]
    device.write(CLAIM, 4, 1)
    assert device.read(CLAIM, 4) == 1
    device.set_line(1, False)
    device.write(CLAIM, 4, 1)
    device.pulse(2)
    assert device.read(CLAIM, 4) == 2
    device.write(CLAIM, 4, 2)
    assert device.read(CLAIM, 4) == 0


def test_interrupt_controller_survives_any_access_and_its_state_is_whole() -> None:
    chance = random.Random(7)
    device, _ = plic()
    for _ in range(2000):
        offset = chance.choice(
            (chance.randrange(0, 0x600000, 4), 4 * chance.randrange(96), ENABLE, THRESHOLD, CLAIM)
        )
        if chance.random() < 0.5:
            device.read(offset, 4)
        else:
            device.write(offset, 4, chance.getrandbits(32))
        device.set_line(chance.randrange(1, 96), chance.random() < 0.5)
    state = device.save_state()
    fresh, _ = plic()
    fresh.check_state(state)
    fresh.load_state(state)
    assert fresh.save_state() == state
    assert [device.read(CLAIM, 4) for _ in range(5)] == [fresh.read(CLAIM, 4) for _ in range(5)]
    with pytest.raises(StateMismatch, match="priority"):
        fresh.check_state({**state, "priority": (8,) * 96})


def uart() -> tuple[Uart, MemoryConsole, Mailbox, list[bool]]:
    lines: list[bool] = []
    console, mailbox = MemoryConsole(), Mailbox()
    return Uart(lines.append, console, mailbox), console, mailbox, lines


def test_serial_output_and_input_with_interrupts() -> None:
    device, console, mailbox, lines = uart()
    for character in b"out":
        device.write(0, 1, character)
    assert bytes(console.output) == b"out"
    device.write(1, 1, 1)
    console.feed(b"0123456789abcdefghij")
    assert not lines[-1], "delivered at a boundary only"
    mailbox.run()
    assert lines[-1]
    assert device.read(2, 1) & 0xF == 4
    got = bytearray()
    while device.read(5, 1) & 1:
        got.append(device.read(0, 1))
        mailbox.run()
    assert got == b"0123456789abcdefghij"
    assert not lines[-1]


def test_transmitter_interrupt_is_acknowledged_by_reading_its_cause() -> None:
    device, _, _, lines = uart()
    device.write(1, 1, 2)
    assert lines[-1]
    assert device.read(2, 1) & 0xF == 2
    assert not lines[-1]
    device.write(0, 1, ord("x"))
    assert lines[-1]


def test_serial_loopback_scratch_and_divisor() -> None:
    device, console, _, _ = uart()
    device.write(4, 1, 0x1A)
    assert device.read(6, 1) == 0x90
    device.write(0, 1, ord("l"))
    assert device.read(0, 1) == ord("l")
    assert not console.output
    device.write(7, 1, 0x5A)
    device.write(3, 1, 0x80)
    device.write(0, 1, 0x34)
    device.write(1, 1, 0x12)
    assert (device.read(7, 1), device.read(0, 1), device.read(1, 1)) == (0x5A, 0x34, 0x12)


def test_unread_serial_input_is_part_of_the_state() -> None:
    device, console, mailbox, _ = uart()
    device.write(1, 1, 1)
    console.feed(b"abc")
    mailbox.run()
    fresh, _, _, lines = uart()
    state = device.save_state()
    fresh.check_state(state)
    fresh.load_state(state)
    assert fresh.save_state() == state
    assert lines[-1]
    assert bytes(fresh.read(0, 1) for _ in range(3)) == b"abc"


def test_rtc_shows_the_wall_clock_and_keeps_what_the_guest_set() -> None:
    clock = VirtualClock()
    device = Rtc(lambda raised: None, clock)

    def shown(rtc: Rtc) -> int:
        return rtc.read(0, 4) | rtc.read(4, 4) << 32

    before = time.time_ns()
    assert before <= shown(device) <= time.time_ns()
    device.write(4, 4, 0x1000_0000)
    device.write(0, 4, 0)
    fresh = Rtc(lambda raised: None, VirtualClock())
    state = device.save_state()
    fresh.check_state(state)
    fresh.load_state(state)
    assert 0 <= shown(fresh) - (0x1000_0000 << 32) < 60 * 10**9


def test_rtc_alarm_comes_when_guest_time_reaches_it() -> None:
    clock = VirtualClock(icount_shift=0)
    lines: list[bool] = []
    device = Rtc(lines.append, clock)
    alarm = (device.read(0, 4) | device.read(4, 4) << 32) + 5000
    device.write(0x10, 4, 1)
    device.write(0x0C, 4, alarm >> 32)
    device.write(0x08, 4, alarm & 0xFFFF_FFFF)
    clock.instructions += 4999
    clock.run_timers()
    assert not lines[-1]
    clock.instructions += 1
    clock.run_timers()
    assert lines[-1]
    device.write(0x1C, 4, 1)
    assert not lines[-1]


def firmware() -> tuple[Sbi, bytearray, list[str], GuestMemory, VirtualClock]:
    memory = GuestMemory((MemoryBlock.allocate("ram", RAM, 1 << 20, is_ram=True),))
    out, asked = bytearray(), []  # type: ignore[var-annotated]
    clock = VirtualClock()
    sbi = Sbi(
        memory,
        clock,
        transmit=out.extend,
        take_input=lambda limit: b"in"[:limit],
        shut_down=lambda: asked.append("off"),
        restart=lambda: asked.append("reset"),
    )
    sbi.attach(NoEngine())
    return sbi, out, asked, memory, clock


def call(sbi: Sbi, extension: int, function: int = 0, *arguments: int) -> Sequence[int | None]:
    return sbi.call([*arguments, *(0,) * (6 - len(arguments)), function, extension])


def test_firmware_answers_what_the_standard_lists() -> None:
    sbi, out, asked, memory, _ = firmware()
    assert call(sbi, 0x10, 0) == (0, 2 << 24)
    for extension in (0x54494D45, 0x735049, 0x52464E43, 0x48534D, 0x53525354, 0x4442434E, 0, 1):
        assert call(sbi, 0x10, 3, extension) == (0, 1)
    assert call(sbi, 0x10, 3, 0x999999) == (0, 0)
    assert call(sbi, 0x999999) == (-2, 0)
    memory.write(RAM + 16, b"hello")
    assert call(sbi, 0x4442434E, 0, 5, RAM + 16, 0) == (0, 5)
    assert call(sbi, 0x4442434E, 2, ord("!")) == (0, 0)
    assert call(sbi, 1, 0, ord("?")) == (0, None)
    assert bytes(out) == b"hello!?"
    assert call(sbi, 0x4442434E, 1, 2, RAM + 32, 0) == (0, 2)
    assert memory.read(RAM + 32, 2) == b"in"
    for address in (0, RAM + (1 << 20) - 2, (1 << 64) - 1):
        assert call(sbi, 0x4442434E, 0, 5, address, 0) == (-3, 0), "not RAM"
    assert call(sbi, 0x48534D, 2, 0) == (0, 0)
    assert call(sbi, 0x48534D, 2, 1)[0] == -3
    assert call(sbi, 0x735049, 0, 1, 0) == (0, 0)
    assert call(sbi, 0x735049, 0, 2, 0)[0] == -3
    call(sbi, 0x53525354, 0, 0, 0)
    call(sbi, 0x53525354, 0, 1, 0)
    assert asked == ["off", "reset"]


def test_timer_deadline_is_machine_state() -> None:
    sbi, _, _, _, _ = firmware()
    call(sbi, 0x54494D45, 0, 10**9)
    fresh, _, _, _, clock = firmware()
    fresh.load_state(sbi.save_state())
    assert clock.next_deadline_ns == 10**11
    assert fresh.save_state() == sbi.save_state()
    call(fresh, 0x54494D45, 0, (1 << 64) - 1)
    assert clock.next_deadline_ns is None


def test_clock_goes_on_from_a_saved_value() -> None:
    clock = VirtualClock()
    clock.start()
    clock.stop()
    state = {**clock.save_state(), "cpu_clock_offset": 5 * 10**9}
    fresh = VirtualClock()
    fresh.start()
    fresh.load_state(state)
    assert 5 * 10**9 <= fresh.ns < 6 * 10**9
    fresh.stop()
    assert fresh.ns == fresh.ns
