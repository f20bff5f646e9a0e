"""Across the border: stock QEMU loads what stillframe saved, and the reverse, on the same image, with its
disks."""

from pathlib import Path

import pytest

from peers import QEMU_VERSIONS
from snapshots.hosts import qemu_img_check
from snapshots.servers import Server, qemu_img, qemu_io, server


def images(folder: Path) -> tuple[Path, Path]:
    paths = folder / "one.qcow2", folder / "two.qcow2"
    for path in paths:
        qemu_img("create", "-f", "qcow2", path, "16M")
    return paths


def add_all(found: Server, paths: tuple[Path, Path]) -> tuple[str, ...]:
    for number, path in enumerate(paths):
        found.add(number, path)
    return tuple(f"diskfmt{number}" for number in range(len(paths)))


@pytest.mark.parametrize("version", QEMU_VERSIONS)
@pytest.mark.parametrize("order", ["ours first", "qemu first"])
def test_each_loads_what_the_other_saved(version: str, order: str, tmp_path: Path) -> None:
    paths = images(tmp_path)
    kinds = ["stillframe", f"qemu {version}"]
    saver, loader = kinds if order == "ours first" else kinds[::-1]
    for path in paths:
        qemu_io(path, "write -P 1 0 4M")
    with server(saver, tmp_path, running=False) as found:
        nodes = add_all(found, paths)
        assert found.save(vmstate=nodes[1], devices=nodes).error is None
        found.ask("quit")
    for path in paths:
        qemu_img_check(path)
        qemu_io(path, "write -P 2 1M 8M")
    with server(loader, tmp_path) as found:
        nodes = add_all(found, paths)
        outcome = found.load(vmstate=nodes[1], devices=nodes)
        assert outcome.error is None
        assert found.save("snap1", vmstate=nodes[1], devices=nodes).error is None
        assert found.status() == "running"
        found.ask("quit")
    for path in paths:
        qemu_io(path, "read -P 1 0 4M", "read -P 0 4M 5M")
        qemu_img_check(path)
    with server(saver, tmp_path) as found:
        nodes = add_all(found, paths)
        for tag in ("snap1", "snap0"):
            assert found.load(tag, vmstate=nodes[1], devices=nodes).error is None
            assert found.delete(tag, devices=nodes).error is None
        found.ask("quit")
    for path in paths:
        assert qemu_img("snapshot", "-l", path) == ""
        qemu_io(path, "read -P 1 0 4M", "read -P 0 4M 5M")
        qemu_img_check(path)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_qemu_starts_from_a_snapshot_of_ours(version: str, tmp_path: Path) -> None:
    """`-loadvm`, which takes every disk there is."""
    paths = images(tmp_path)
    with server("stillframe", tmp_path) as found:
        nodes = add_all(found, paths)
        assert found.save(vmstate=nodes[0], devices=nodes).error is None
        found.ask("quit")
    blockdevs = [
        word
        for number, path in enumerate(paths)
        for word in ("-blockdev", f"qcow2,node-name=fmt{number},file.driver=file,file.filename={path}")
    ]
    with server(f"qemu {version}", tmp_path, arguments=(*blockdevs, "-loadvm", "snap0")) as found:
        assert found.status() == "running"
        assert "List of snapshots present on all disks:" in found.lines.hmp("info snapshots")


@pytest.mark.parametrize("tool", ["list", "apply", "delete"])
@pytest.mark.usefixtures("every_qemu")
def test_stock_tools_work_on_our_snapshots(tool: str, tmp_path: Path) -> None:
    paths = images(tmp_path)
    qemu_io(paths[0], "write -P 7 0 1M")
    with server("stillframe", tmp_path) as found:
        nodes = add_all(found, paths)
        assert found.save(vmstate=nodes[0], devices=nodes).error is None
        found.ask("quit")
    qemu_io(paths[0], "write -P 8 0 2M")
    if tool == "list":
        listed = qemu_img("snapshot", "-l", paths[0])
        assert "snap0" in listed
        assert "1.0" in listed, "the size of the machine state is shown"
    elif tool == "apply":
        qemu_img("snapshot", "-a", "snap0", paths[0])
        qemu_io(paths[0], "read -P 7 0 1M", "read -P 0 1M 1M")
    else:
        qemu_img("snapshot", "-d", "snap0", paths[0])
        qemu_io(paths[0], "read -P 8 0 2M")
    qemu_img_check(paths[0])
    if tool != "delete":
        with server("stillframe", tmp_path) as found:
            nodes = add_all(found, paths)
            assert found.load(vmstate=nodes[0], devices=nodes).error is None
            found.ask("quit")
    qemu_img_check(paths[0])


@pytest.mark.usefixtures("every_qemu")
def test_a_snapshot_keeps_its_family_through_stock_tools(tmp_path: Path) -> None:
    """The record of parents and members survives QEMU's own create, apply and delete."""
    from snapshots.hosts import opened

    paths = images(tmp_path)
    with server("stillframe", tmp_path) as found:
        nodes = add_all(found, paths)
        for tag in ("first", "second"):
            assert found.save(tag, vmstate=nodes[0], devices=nodes).error is None
        assert found.load("first", vmstate=nodes[0], devices=nodes).error is None
        assert found.save("third", vmstate=nodes[0], devices=nodes).error is None
        found.ask("quit")
    qemu_img("snapshot", "-c", "stock", paths[0])
    qemu_img("snapshot", "-a", "second", paths[0])
    qemu_img("snapshot", "-d", "stock", paths[0])
    lineages = {}
    for path in paths:
        with opened(path, "node") as node:
            lineages[path] = {each.name: each.lineage for each in node.info().snapshots}
    state, member = lineages[paths[0]], lineages[paths[1]]
    for tag, parent in (("first", None), ("second", "first"), ("third", "first")):
        ours, theirs = state[tag], member[tag]
        assert ours is not None
        assert theirs is not None
        expected = state[parent] if parent else None
        assert ours.parent == theirs.parent == (expected.snapshot if expected else None)
        assert ours.group == theirs.group
        assert ours.snapshot != theirs.snapshot
        assert ours.members == theirs.members
        assert [member.node_name for member in ours.members] == ["diskfmt0", "diskfmt1"]
        assert [member.snapshot for member in ours.members] == [ours.snapshot, theirs.snapshot]
