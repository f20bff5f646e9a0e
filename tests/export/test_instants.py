"""Snapshots of disks that others write to through exports: they are of one instant, on all disks."""

import threading
from pathlib import Path

from export.client import Client
from snapshots.hosts import new_image, new_machine
from stillframe.block.export import nbd
from stillframe.block.export.exports import ExportRequest, NodeExports
from stillframe.block.graph import BlockGraph
from stillframe.block.qcow2.node import Qcow2Node
from stillframe.events import EventBus
from stillframe.snapshots.context import Unwatched
from stillframe.snapshots.keeping import KeepingOptions
from stillframe.snapshots.machine_snapshots import MachineSnapshots
from stillframe.sockets import listening_unix_socket

NAMES = ("first", "second")


def test_later_write_of_a_client_is_in_no_snapshot_without_its_earlier_one(tmp_path: Path) -> None:
    graph, events = BlockGraph(), EventBus()
    exports = NodeExports(graph, events)
    machine = new_machine()
    exports.start(lambda: listening_unix_socket(tmp_path / "nbd"))
    for name in NAMES:
        path = new_image(tmp_path / f"{name}.qcow2")
        graph.blockdev_add(
            {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}}
        )
        exports.add(ExportRequest(name, name, name, writable=True))
    written = 0
    ended = threading.Event()

    def write() -> None:
        nonlocal written
        with Client(tmp_path / "nbd").go("first") as first, Client(tmp_path / "nbd").go("second") as second:
            while not ended.is_set():
                data = (written + 1).to_bytes(512, "big")
                first.do(nbd.WRITE, 0, 512, data=data)
                second.do(nbd.WRITE, 0, 512, data=data)
                written += 1

    # The client is given time for a write between the two disks; held back, it makes none.
    node = graph.find("second")
    assert isinstance(node, Qcow2Node)
    store, late = node.snapshot_store, threading.Event()
    freeze = store.freeze

    def frozen_later() -> object:
        late.wait(0.05)
        return freeze()

    store.freeze = frozen_later  # type: ignore[method-assign,assignment]
    writer = threading.Thread(target=write)
    writer.start()
    try:
        snapshots = MachineSnapshots(machine, graph, KeepingOptions(), exports.drained)
        for number in range(8):
            snapshots.save(Unwatched(), f"s{number}", "first", NAMES)
    finally:
        ended.set()
        writer.join()
    assert written > 8
    for number in range(8):
        held = []
        for name in NAMES:
            shown = graph.find(name)
            assert isinstance(shown, Qcow2Node)
            (snapshot,) = [each for each in shown.snapshot_store.snapshots() if each.name == f"s{number}"]
            view = shown.at_snapshot(snapshot)
            held.append(int.from_bytes(view.read(0, 512), "big"))
            view.close()
        assert held[0] - 1 <= held[1] <= held[0]
    exports.close()
    graph.close()
    machine.close()
