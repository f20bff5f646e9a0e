"""Images that qemu-img and qemu-io made by any sequence of commands are read, snapshotted, reverted and tidied up by us."""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

from peers import QEMU_VERSIONS, peer
from qcow2.images import LONG, as_raw, assert_clean, delete, named, qemu_img, revert, take
from qcow2.recipes import Recipe, recipes
from stillframe.block.graph import BlockGraph
from stillframe.block.node import ExtentKind, Node
from stillframe.errors import LimitReached, Unsupported

STEP = st.one_of(
    st.tuples(
        st.sampled_from(["write", "write", "write -c", "write -z", "write -z -u", "discard"]),
        st.integers(0, 1 << 16),
        st.integers(1, 1 << 16),
        st.integers(1, 255),
    ),
    st.tuples(
        st.sampled_from(["snapshot -c", "snapshot -c", "snapshot -a", "snapshot -d"]), st.integers(0, 3)
    ),
    st.tuples(st.just("resize"), st.integers(1, 4 << 20)),
    st.tuples(st.sampled_from(["rebase", "amend"])),
)


class Theirs:
    """An image in the hands of stock tools; a step that they refuse is left out."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe = recipe
        self.path, _ = recipe.make(directory)
        self.size = recipe.size
        self.names: list[str] = []
        self.contents: dict[str, tuple[int, bytes]] = {}
        self.number = 0

    def do(self, step: tuple[Any, ...]) -> None:
        if step[0].startswith(("write", "discard")):
            self._write(*step)
        elif step[0] == "resize":
            size = -(-step[1] // 512) * 512
            self._run("qemu-img", "resize", "--shrink", "-f", "qcow2", str(self.path), str(size))
            shown = json.loads(qemu_img("info", "--output=json", self.path))
            self.size = shown["virtual-size"]
        elif step[0] == "rebase":
            # What showed through becomes the image's own; from the snapshots it would be gone.
            if self.names:
                return
            self._run("qemu-img", "rebase", "-f", "qcow2", "-b", "", str(self.path))
        elif step[0] == "amend":
            switch = "off" if self.recipe.lazy_refcounts else "on"
            self._run("qemu-img", "amend", "-f", "qcow2", "-o", f"lazy_refcounts={switch}", str(self.path))
        else:
            self._snapshot(*step)

    def _write(self, command: str, at: int, length: int, value: int) -> None:
        unit = self.recipe.cluster_size if command == "write -c" else 512
        units = max(1, self.size // unit)
        start = at % units * unit
        end = min(start + length % min(units, max(1, (1 << 20) // unit)) * unit + unit, self.size)
        pattern = f"-P {value}" if command in ("write", "write -c") else ""
        self._run(
            "qemu-io", "-f", "qcow2", "-c", f"{command} {pattern} {start} {end - start}", str(self.path)
        )

    def _snapshot(self, what: str, which: int) -> None:
        if what == "snapshot -c":
            name = f"s{self.number}"
            self.number += 1
            content = as_raw(self.path)
            if self._run("qemu-img", "snapshot", "-c", name, str(self.path)):
                self.names.append(name)
                self.contents[name] = (self.size, content)
            return
        if not self.names:
            return
        name = self.names[which % len(self.names)]
        done = self._run("qemu-img", *what.split(), name, str(self.path))
        if done and what == "snapshot -d":
            self.names.remove(name)
            del self.contents[name]
        elif done:
            self.size = self.contents[name][0]

    def _run(self, program: str, *words: str) -> bool:
        done = subprocess.run([peer(program), *words], capture_output=True, text=True)
        refused = bool(done.returncode) or "failed" in done.stdout
        event(
            f"{words[0] if program == 'qemu-img' else words[3].split()[0]} {'refused' if refused else 'done'}"
        )
        note(f"{program} {' '.join(words)}{': ' + done.stderr if refused else ''}")
        if refused and self.recipe.is_narrow:
            # Where a refcount was too narrow on the way, stock tools leave a mess, and a tool that tidies it.
            self.recipe.tidy(self.path)
        return not refused


def mapped(node: Node) -> list[tuple[int, int, str, int | None]]:
    """What lies where: start, end, kind, host offset; as coarse as it can be said."""
    runs: list[tuple[int, int, str, int | None]] = []
    for extent in node.extents(0, node.size):
        kind = "data" if extent.kind is ExtentKind.DATA else "zero"
        host = extent.host_offset if kind == "data" and not extent.compressed else None
        _join(runs, extent.offset, extent.length, f"{kind}{extent.depth if kind == 'data' else ''}", host)
    return runs


def mapped_by_qemu(path: Path) -> list[tuple[int, int, str, int | None]]:
    """The same, as `qemu-img map` says it."""
    runs: list[tuple[int, int, str, int | None]] = []
    for each in json.loads(qemu_img("map", "--output=json", "-f", "qcow2", path)):
        is_data = each["data"] and not each["zero"]
        host = each.get("offset") if is_data else None
        _join(runs, each["start"], each["length"], f"data{each['depth']}" if is_data else "zero", host)
    return runs


def _join(
    runs: list[tuple[int, int, str, int | None]], start: int, length: int, kind: str, host: int | None
) -> None:
    if runs:
        first, end, last, before = runs[-1]
        follows = host == before + end - first if before is not None else host is None
        if last == kind and follows:
            runs[-1] = (first, start + length, kind, before)
            return
    runs.append((start, start + length, kind, host))


def opened_with_backing(path: Path, *, read_only: bool) -> tuple[BlockGraph, Any]:
    graph = BlockGraph()
    file = {"driver": "file", "filename": str(path)}
    return graph, graph.blockdev_add(
        {"driver": "qcow2", "node-name": "node", "file": file, "read-only": read_only}
    )


@pytest.mark.timeout(7200 if LONG else 180)
@pytest.mark.parametrize("version", QEMU_VERSIONS)
@settings(max_examples=600 if LONG else 25, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes(), steps=st.lists(STEP, min_size=3, max_size=14), back=st.integers(0, 7))
def test_whatever_stock_tools_made_we_read_change_and_hand_back(
    recipe: Recipe, steps: list[tuple[Any, ...]], back: int, version: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="stillframe-") as directory:
        theirs = Theirs(recipe, Path(directory))
        for step in steps:
            theirs.do(step)
        path = theirs.path
        present = as_raw(path)
        graph, node = opened_with_backing(path, read_only=True)
        try:
            assert node.read(0, node.size) == present
            assert mapped(node) == mapped_by_qemu(path)
            assert (node.snapshot_store is None) == bool(recipe.data_file)
            if recipe.data_file:
                return
            assert [each.name for each in node.snapshot_store.snapshots()] == theirs.names
        finally:
            graph.close()
        contents = {name: content for name, (_, content) in theirs.contents.items()}
        graph, node = opened_with_backing(path, read_only=False)
        try:
            assert node.read(0, node.size) == present
            try:
                take(node, "ours", b"state" * 5000)
                contents["ours"] = present
            except LimitReached:
                assert recipe.is_narrow
            order = sorted(contents)
            for name in order[back % max(1, len(order)) :] + order:
                try:
                    revert(node, name)
                except LimitReached:
                    assert recipe.is_narrow
                except Unsupported:
                    assert recipe.is_v2 or recipe.bitmap
                else:
                    present = contents[name]
                assert node.read(0, node.size) == present
            node.write(node.size - 512, b"w" * 512)
            present = present[:-512] + b"w" * 512
            for name in theirs.names[::2]:
                delete(node, name)
                del contents[name]
        finally:
            graph.close()
        assert_clean(path)
        assert as_raw(path) == present
        if not recipe.is_narrow and not recipe.bitmap:
            for name, content in contents.items():
                qemu_img("snapshot", "-a", name, path)
                assert as_raw(path) == content
                assert_clean(path)
        graph, node = opened_with_backing(path, read_only=False)
        try:
            for each in list(node.snapshot_store.snapshots()):
                delete(node, named(node, each.name).name)
        finally:
            graph.close()
        assert_clean(path)
