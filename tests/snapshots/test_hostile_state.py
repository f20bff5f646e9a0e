"""A machine state is not trusted: whatever is in it, a load succeeds or changes nothing."""

import random
from pathlib import Path

import numpy as np
import pytest

from snapshots.hosts import (
    Register,
    content,
    do_load,
    do_save,
    new_image,
    new_machine,
    opened,
    qemu_img_check,
)
from stillframe.block.node import Node, SnapshotRecord
from stillframe.errors import StillframeError
from stillframe.machine.run_state import RunState

PAGES = 24


def put(node: Node, name: str, state: bytes) -> None:
    """A snapshot with any bytes as its machine state."""
    store = node.snapshot_store
    assert store is not None
    pending = store.freeze()
    pending.write_state(0, state)
    change = pending.prepare(SnapshotRecord(name, 0, 0))
    change.commit()
    change.finish()


def mutated(state: bytes, chance: random.Random) -> bytes:
    data = bytearray(state)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(data)) if chance.random() < 0.4 else chance.randrange(200)
        at = at if chance.random() < 0.5 else len(data) - 1 - at
        what = chance.randrange(4)
        if what == 0:
            data[at] = chance.choice((0, 1, 2, 4, 8, 0x10, 0x22, 0x28, 0x7E, 0x7F, 0x80, 0xFF))
        elif what == 1:
            data[at] ^= 1 << chance.randrange(8)
        elif what == 2:
            del data[at : at + chance.choice((1, 8, 9, 4104))]
        else:
            data[at:at] = data[at : at + chance.choice((1, 9, 4104))]
    return bytes(data) or b"\0"


@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_state_is_loaded_or_changes_nothing(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    device = Register(value=1)
    device.queue = b"queue"
    machine = new_machine(device, memory={"ram": PAGES * 4096}, running=True)
    pages = np.frombuffer(machine.memory.blocks[0].view, np.uint8).reshape(PAGES, 4096)
    pages[::3] = np.random.default_rng(seed).integers(0, 256, 4096, np.uint8)
    path = new_image(tmp_path / "image", cluster_size=4096)
    refused = loaded = 0
    with opened(path, "node") as node:
        do_save(machine, [node], "good")
        store = node.snapshot_store
        good = store.snapshots()[0]
        state = store.read_state(good, 0, good.state_size)
        for number in range(120):
            put(node, f"bad{number}", mutated(state, chance))
            node.write(0, number.to_bytes(4, "big"))
            device.value = 1000 + number
            pages[1] = number
            before = (pages.tobytes(), device.value, device.queue, content(node))
            try:
                do_load(machine, [node], f"bad{number}")
                loaded += 1
            except StillframeError:
                refused += 1
                assert (pages.tobytes(), device.value, device.queue, content(node)) == before
            assert machine.run_state is RunState.RUNNING
        do_load(machine, [node], "good")
    assert refused > 20
    assert loaded > 5, "bytes of pages and of the description may be anything"
    qemu_img_check(path)


def test_a_state_that_claims_too_much_takes_no_memory_for_it(tmp_path: Path) -> None:
    """Blocks, names and counts up to the largest that their fields can say."""
    import tracemalloc

    path = new_image(tmp_path / "image", cluster_size=4096)
    machine = new_machine(Register(), memory={"ram": 4096}, running=True)
    with opened(path, "node") as node:
        do_save(machine, [node], "good")
        store = node.snapshot_store
        good = store.snapshots()[0]
        state = store.read_state(good, 0, good.state_size)
        claims = {
            "memory": state.replace(
                (4096 | 4).to_bytes(8, "big") + b"\3ram" + (4096).to_bytes(8, "big"),
                ((1 << 55) | 4).to_bytes(8, "big") + b"\3ram" + (1 << 55).to_bytes(8, "big"),
            ),
            "all memory": state.replace(
                (4096 | 4).to_bytes(8, "big"), (((1 << 64) - 4096) | 4).to_bytes(8, "big")
            ),
            "description": state.replace(b"\0\x06\0\0", b"\0\x06\x7f\xff"),
            "machine": state.replace(b"\x07\0\0\0\4none", b"\x07\xff\xff\xff\xffnone"),
        }
        tracemalloc.start()
        try:
            for name, claim in claims.items():
                assert claim != state, name
                put(node, name, claim)
                with pytest.raises(StillframeError):
                    do_load(machine, [node], name)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 64 << 20
