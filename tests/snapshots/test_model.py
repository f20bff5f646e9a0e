"""Any sequence of saves, loads, deletes and writes: at each step every image holds what a plain model of it
holds."""

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peers import installed_versions, using
from snapshots.hosts import (
    Register,
    Steps,
    do_delete,
    do_load,
    do_save,
    new_image,
    new_machine,
    opened,
    qemu_img_check,
)
from stillframe.block.node import Node
from stillframe.errors import Cancelled, Refused
from stillframe.machine.run_state import RunState

DISK = 256 << 10
RAM = 64 << 10
TAGS = ("a", "b", "1", "")


@dataclass
class Model:
    """One image: its disk, and by tag the disk and the machine state of its snapshots."""

    disk: bytearray
    snapshots: dict[str, tuple[bytes, tuple[bytes, int] | None]] = field(default_factory=dict)


class Snapshots(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="stillframe-model-"))
        self.stack = ExitStack()
        self.nodes: dict[str, Node] = {}
        self.models: dict[str, Model] = {}
        self.device = Register()
        self.machine = new_machine(self.device, memory={"ram": RAM}, running=True)
        self.memory = bytearray(RAM)

    @initialize(sizes=st.lists(st.sampled_from((512, 4096, 65536)), min_size=2, max_size=3))
    def open(self, sizes: list[int]) -> None:
        for number, cluster_size in enumerate(sizes):
            name = f"node{number}"
            path = new_image(self.folder / name, DISK, cluster_size=cluster_size)
            self.nodes[name] = self.stack.enter_context(opened(path, name))
            self.models[name] = Model(bytearray(DISK))

    def chosen(self, data: st.DataObject) -> list[str]:
        return data.draw(st.lists(st.sampled_from(sorted(self.nodes)), min_size=1, max_size=3, unique=True))

    @rule(
        data=st.data(),
        offset=st.integers(0, DISK - 1),
        length=st.integers(1, 70_000),
        byte=st.integers(0, 255),
    )
    def write(self, data: st.DataObject, offset: int, length: int, byte: int) -> None:
        name = self.chosen(data)[0]
        content = bytes((byte,)) * min(length, DISK - offset)
        self.nodes[name].write(offset, content)
        self.models[name].disk[offset : offset + len(content)] = content

    @rule(page=st.integers(0, RAM // 4096 - 1), byte=st.integers(0, 255), value=st.integers(0, (1 << 64) - 1))
    def run(self, page: int, byte: int, value: int) -> None:
        content = bytes((byte,)) * 4096
        self.machine.memory.blocks[0].view[page * 4096 : page * 4096 + 4096] = content
        self.memory[page * 4096 : page * 4096 + 4096] = content
        self.device.value = value

    @rule(data=st.data(), tag=st.sampled_from(TAGS), cancel=st.sampled_from((None, None, 0, 1, 2, 3)))
    def save(self, data: st.DataObject, tag: str, cancel: int | None) -> None:
        names = self.chosen(data)
        vmstate = names[-1]
        taken = any(tag in self.models[name].snapshots for name in names)
        steps = Steps(cancel)
        try:
            do_save(self.machine, [self.nodes[name] for name in names], tag, steps, vmstate)
        except Refused:
            assert taken
        except Cancelled:
            assert not taken
        else:
            assert not taken
            assert cancel is None or steps.checkpoints <= cancel
            for name in names:
                state = (bytes(self.memory), self.device.value) if name == vmstate else None
                self.models[name].snapshots[tag] = (bytes(self.models[name].disk), state)

    @rule(data=st.data(), tag=st.sampled_from(TAGS), cancel=st.sampled_from((None, None, 0, 1)))
    def load(self, data: st.DataObject, tag: str, cancel: int | None) -> None:
        names = self.chosen(data)
        there = [self.models[name].snapshots.get(tag) for name in names]
        state = there[-1][1] if there[-1] is not None else None
        steps = Steps(cancel)
        try:
            do_load(self.machine, [self.nodes[name] for name in names], tag, steps, names[-1])
        except Refused:
            assert None in there or state is None
        except Cancelled:
            assert cancel is not None
        else:
            assert state is not None
            for name, snapshot in zip(names, there, strict=True):
                assert snapshot is not None
                self.models[name].disk[:] = snapshot[0]
            self.memory[:], self.device_value = state
            assert self.device.value == self.device_value

    @rule(data=st.data(), tag=st.sampled_from(TAGS))
    def delete(self, data: st.DataObject, tag: str) -> None:
        names = self.chosen(data)
        do_delete([self.nodes[name] for name in names], tag)
        for name in names:
            self.models[name].snapshots.pop(tag, None)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        self.stack.close()
        for name in self.nodes:
            self.nodes[name] = self.stack.enter_context(opened(self.folder / name, name))

    @invariant()
    def everything_agrees(self) -> None:
        assert self.machine.run_state is RunState.RUNNING
        assert bytes(self.machine.memory.blocks[0].view) == self.memory
        for name, model in self.models.items():
            node = self.nodes[name]
            assert node.read(0, DISK) == model.disk
            found = {snapshot.name: snapshot for snapshot in node.info().snapshots}
            assert found.keys() == model.snapshots.keys()
            for tag, (_, state) in model.snapshots.items():
                assert (found[tag].state_size > 0) == (state is not None)

    def teardown(self) -> None:
        self.stack.close()
        for version, name in zip(cycle(installed_versions()), self.nodes, strict=False):
            with using(version):
                qemu_img_check(self.folder / name)
        shutil.rmtree(self.folder)


TestSnapshots = Snapshots.TestCase
TestSnapshots.settings = settings(
    max_examples=50,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
