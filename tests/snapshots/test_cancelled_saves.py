"""A live save that is cancelled leaves the older snapshots, the guest's disks and the space as if it had never been asked for."""

from pathlib import Path

import pytest

from block.faults import Log
from qcow2.worlds import Witness
from snapshots.hosts import qemu_img_check
from snapshots.living import Guest, Host, Kind, held_by, host_on, in_small_steps, pages_of, with_a_past
from stillframe.errors import Cancelled

KIND = Kind(4096)


def cancelled_save(host: Host, witness: Witness, number: int) -> bool:
    """:return: whether there was a checkpoint of that number to be cancelled at."""
    guest = Guest(host.machine, witness, seed=number, cancel_at=number)
    pages_of(host.machine)[10:30] ^= 0x11
    try:
        host.save("new", guest)
    except Cancelled:
        return True
    return False


@pytest.mark.parametrize("stand", ["parent", None], ids=["continued", "whole"])
def test_a_live_save_cancelled_at_any_checkpoint_leaves_nothing_of_it(
    stand: str | None, tmp_path: Path
) -> None:
    """While the guest writes to memory and disks."""
    with in_small_steps():
        with_a_past(tmp_path, KIND)
        with host_on(tmp_path, KIND.names, Log()) as host:
            if stand is not None:
                host.load(stand, eager=True)
            before = [held_by(node) for node in host.nodes]
            witness = Witness(host.files, Log(), before, lambda _: host.nodes)
            number = 0
            while cancelled_save(host, witness, number):
                after = [held_by(node) for node in host.nodes]
                assert [each.snapshots for each in after] == [each.snapshots for each in before]
                assert [each.disk for each in after] == [witness.present(image) for image in (0, 1)]
                assert host.machine.run_state.value == "running"
                number += 1
            assert number > 8
            # The last one was not cancelled, and holds all that changed before those that were.
            memory = pages_of(host.machine).tobytes()
            host.save("last")
            pages_of(host.machine)[:] = 0
            host.load("last", eager=True)
            assert pages_of(host.machine).tobytes() == memory
            host.load("older", eager=True)
            for node in host.nodes:
                node.close()
    for name in KIND.names:
        qemu_img_check(tmp_path / name)


def test_what_a_cancelled_save_had_written_is_where_the_next_one_writes(tmp_path: Path) -> None:
    blocks = []
    with in_small_steps():
        with_a_past(tmp_path, KIND)
        with host_on(tmp_path, KIND.names, Log()) as host:
            witness = Witness(host.files, Log(), [held_by(node) for node in host.nodes], lambda _: host.nodes)
            for _ in range(12):
                assert cancelled_save(host, witness, 15)
                for node in host.nodes:
                    node.flush()
                blocks.append(sum((tmp_path / name).stat().st_blocks * 512 for name in KIND.names))
            for node in host.nodes:
                node.close()
    # The guest's disks have been written to by then.
    assert blocks[-1] <= blocks[4] + (64 << 10)
    for name in KIND.names:
        qemu_img_check(tmp_path / name)
