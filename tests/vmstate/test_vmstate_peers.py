"""QEMU itself reads our streams, and we read what it writes of them again."""

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peers import QEMU_VERSIONS, peer
from stillframe.errors import StateMismatch
from stillframe.machine.clock import VirtualClock
from stillframe.vmstate.ram import PageMap
from stillframe.vmstate.sections import GLOBAL_STATE_KEY, SectionState, saved_run_state
from vmstate.streams import Memory, global_state, mixed_memory, surveyed, written

MEMORY = 24 << 20


def timer(clock_ns: int) -> SectionState:
    values = {"cpu_ticks_offset": 0, "unused": bytes(8), "cpu_clock_offset": clock_ns}
    return SectionState("timer", 0, VirtualClock.description, values)


class Qemu:
    """A QEMU without a processor, spoken to by QMP."""

    def __init__(self, process: subprocess.Popen[bytes], monitor: socket.socket) -> None:
        self.process = process
        self._lines = monitor.makefile("rwb")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        message = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self._lines.write(json.dumps(message).encode())
        self._lines.flush()
        for line in self._lines:
            answer = json.loads(line)
            if "event" not in answer:
                assert "return" in answer, answer
                return answer["return"]
        raise AssertionError("QEMU went away")

    def migrated(self) -> dict[str, Any]:
        """Ask until the migration in progress has ended; the test's own timeout bounds it."""
        while True:
            found: dict[str, Any] = self.ask("query-migrate")
            if found.get("status") in ("completed", "failed"):
                return found


@contextmanager
def qemu(version: str, *arguments: str) -> Iterator[Qemu]:
    here, there = socket.socketpair()
    command = [peer("qemu-system-x86_64", version), "-machine", "none", "-nodefaults", "-display", "none"]
    command += ["-chardev", f"socket,id=m,fd={there.fileno()}", "-mon", "chardev=m,mode=control", *arguments]
    with here, there:
        process = subprocess.Popen(command, pass_fds=[there.fileno()], stderr=subprocess.PIPE)
        there.close()
        try:
            yield Qemu(process, here)
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_memory_goes_through_qemu_and_back(version: str, tmp_path: Path) -> None:
    memory = mixed_memory(MEMORY // 4096)
    sent, returned = tmp_path / "sent", tmp_path / "returned"
    sent.write_bytes(written("none", {"ram": memory}, [timer(123_456_789_012), global_state("paused")]))
    with qemu(version, "-S", "-m", "24M", "-incoming", f"exec:cat {sent}") as machine:
        assert machine.migrated()["status"] == "completed"
        machine.ask("migrate", uri=f"exec:cat > {returned}")
        assert machine.migrated()["status"] == "completed"
    found = Memory()
    survey = surveyed(returned.read_bytes(), "none", [timer(0)], found)
    assert found.content == {"ram": memory}
    assert survey.sections["timer", 0].values["cpu_clock_offset"] == 123_456_789_012
    assert survey.size == returned.stat().st_size


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_a_refusal_has_the_words_of_qemus(version: str, tmp_path: Path) -> None:
    """Another board, another memory, a section that is not there, a version that is too young."""
    refusals = {
        "board": written("virt", {}, [timer(0)]),
        "section": written("none", {}, [SectionState("nic", 7, timer(0).description, timer(0).values)]),
    }
    for name, stream in refusals.items():
        sent = tmp_path / name
        sent.write_bytes(stream)
        command = [peer("qemu-system-x86_64", version), "-machine", "none", "-nodefaults", "-display", "none"]
        run = subprocess.run(
            [*command, "-incoming", f"exec:cat {sent}"], stderr=subprocess.PIPE, text=True, check=False
        )
        assert run.returncode != 0
        with pytest.raises(StateMismatch) as refused:
            surveyed(stream, sections=[timer(0)], pages=PageMap())
        assert str(refused.value) in run.stderr


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_the_run_state_that_qemu_recorded_is_read(version: str, tmp_path: Path) -> None:
    returned = tmp_path / "returned"
    with qemu(version) as machine:
        machine.ask("migrate", uri=f"exec:cat > {returned}")
        assert machine.migrated()["status"] == "completed"
    survey = surveyed(returned.read_bytes(), "none", [timer(0)])
    assert saved_run_state(survey.sections[GLOBAL_STATE_KEY]) == "running"
