"""A QEMU that does not answer, as one is that a signal has stopped: what is ours is answered all the same, and is right."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qemu.killed import SmallMachine, qemu_of
from qemu_guests import QemuGuest, versions
from stillframe.client import Client

_ASKED_OFTEN = 400
"""Times: as many questions that nobody reads do not fit into a socket."""

every_version = pytest.mark.parametrize("version", versions("stall"))


@asynccontextmanager
async def stalled(pid: int) -> AsyncIterator[None]:
    """In the block no thread of it runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        while any(
            (task / "stat").read_text().rpartition(")")[2].split()[0] != "T"
            for task in Path(f"/proc/{pid}/task").iterdir()
        ):
            await asyncio.sleep(0)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def status_in_a_stall(machine: QemuGuest, pid: int) -> dict[str, object]:
    """What `query-status` says; nobody may have asked before."""

    async def ask(client: Client) -> dict[str, object]:
        async with stalled(pid):
            return dict(await client.execute("query-status"))

    return machine.talk(ask)


@every_version
def test_what_is_ours_is_answered_while_qemu_stalls_and_another_client_waits_for_it(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", version, "--name", "box") as machine:
        machine.beat()
        machine.save("one")

        async def ask(client: Client) -> None:
            async with Client(f"unix:{machine.qmp}") as other:
                async with stalled(qemu_of(runtime)):
                    waiting = asyncio.create_task(other.execute("query-cpus-fast"))
                    for _ in range(_ASKED_OFTEN):
                        assert await client.execute("query-status") == {"status": "running", "running": True}
                    assert await client.execute("query-jobs") == []
                    (disk,) = await client.execute("query-block")
                    assert disk["inserted"]["node-name"] == "root"
                    nodes = await client.execute("query-named-block-nodes")
                    assert "root" in [node["node-name"] for node in nodes]
                    said = await client.execute("human-monitor-command", {"command-line": "info snapshots"})
                    assert " one " in said
                    assert not waiting.done()
                assert len(await waiting) == 1

        machine.talk(ask)
        machine.beat()
        machine.execute("stop")
        assert machine.status() == "paused"
        machine.execute("cont")
        machine.save("two")
        machine.beat()
        machine.quit()


@every_version
def test_guest_is_not_called_paused_in_a_stall_or_running_when_it_is_not(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    """After each way of coming to run, or to stand still; nobody asks before."""
    running, paused = ({"status": "running", "running": True}, {"status": "paused", "running": False})
    with SmallMachine(tmp_path / "m", version, "--name", "box") as machine:
        machine.beat()
        assert status_in_a_stall(machine, qemu_of(runtime)) == running
        machine.save("one")
        machine.execute("stop")
        assert status_in_a_stall(machine, qemu_of(runtime)) == paused
        machine.load("one")
        assert status_in_a_stall(machine, qemu_of(runtime)) == paused
        machine.execute("system_reset")
        assert status_in_a_stall(machine, qemu_of(runtime))["status"] == "prelaunch"
        machine.execute("human-monitor-command", command_line="cont")
        assert status_in_a_stall(machine, qemu_of(runtime)) == running
        machine.load("one")
        assert status_in_a_stall(machine, qemu_of(runtime)) == running
        machine.kill()
        with QemuGuest(tmp_path / "again", "--adopt", "box") as again:
            assert status_in_a_stall(again, qemu_of(runtime)) == running
            again.execute("stop")
            again.kill()
        with QemuGuest(tmp_path / "again", "--adopt", "box") as again:
            assert status_in_a_stall(again, qemu_of(runtime)) == paused
            again.execute("cont")
            again.beat()
            again.quit()
