"""Backing chains made by stock tools read the same, and what an image says about them is not trusted."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from peers import peer
from stillframe.block.file import FileNode
from stillframe.block.graph import BlockGraph
from stillframe.block.node import Node
from stillframe.block.opening import MAX_CHAIN
from stillframe.block.options import parse_options
from stillframe.block.qcow2 import create_image
from stillframe.errors import InUse, InvalidRequest, StillframeError, Unsupported

MIB = 1 << 20


@pytest.fixture
def graph():
    made = BlockGraph()
    yield made
    made.close()


def qemu_img(*arguments: str, cwd: Path | None = None) -> str:
    return subprocess.run(
        [peer("qemu-img"), *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=cwd
    ).stdout


def qemu_io(path: Path, *commands: str, kind: str = "qcow2") -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run([peer("qemu-io"), "-f", kind, *words, str(path)], check=True, stdout=subprocess.DEVNULL)


def overlay(path: Path, backing: str, kind: str | None, size: int = 4 * MIB) -> Path:
    """An image of ours that records any backing name, without looking at it."""
    file = FileNode.create("new", str(path))
    create_image(file, size, backing_file=backing, backing_format=kind)
    file.close()
    return path


def top(graph: BlockGraph, path: Path, **more: Any) -> Node:
    return graph.blockdev_add(
        {
            "driver": "qcow2",
            "node-name": "top",
            "file": {"driver": "file", "filename": str(path)},
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
    )


def content(path: Path, tmp_path: Path) -> bytes:
    """What qemu-img reads."""
    qemu_img("convert", "-O", "raw", str(path), str(tmp_path / "content"))
    return (tmp_path / "content").read_bytes()


@pytest.mark.usefixtures("every_qemu")
def test_a_chain_of_three_reads_as_qemu_img_reads_it(graph: BlockGraph, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    base, middle, above = tmp_path / "base.raw", tmp_path / "sub" / "middle.qcow2", tmp_path / "top.qcow2"
    base.write_bytes(bytes(range(256)) * 4096)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", str(middle), "2M")
    qemu_io(middle, "write -P 1 64k 100k", "write -z 300k 100k", "discard 600k 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "sub/middle.qcow2", "-F", "qcow2", str(above), "4M")
    qemu_io(above, "write -P 2 100k 10k", "write -P 3 3M 5k")
    node = top(graph, above)
    seen = node.read(0, node.size)
    assert {each.driver for each in graph.nodes()} == {"qcow2", "raw", "file"}
    assert len(graph.nodes()) == 6
    assert all(each.read_only for each in graph.nodes()[:4])
    graph.close()
    assert seen == content(above, tmp_path)


@pytest.mark.usefixtures("every_qemu")
def test_writes_go_to_the_top_and_leave_the_backing_image_alone(graph: BlockGraph, tmp_path: Path) -> None:
    base, above = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(base), "1M")
    qemu_io(base, "write -P 7 0 1M")
    before = base.read_bytes()
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", str(above), "2M")
    node = top(graph, above)
    node.write(100, b"x" * 50)
    node.write_zeroes(200_000, 100_000)
    node.write(MIB - 10, b"y" * 20)
    seen = node.read(0, node.size)
    graph.close()
    assert base.read_bytes() == before
    assert seen == content(above, tmp_path)
    expected = bytearray(b"\7" * MIB + bytes(MIB))
    expected[100:150] = b"x" * 50
    expected[200_000:300_000] = bytes(100_000)
    expected[MIB - 10 : MIB + 10] = b"y" * 20
    assert seen == expected
    assert "No errors" in qemu_img("check", str(above))


def test_without_a_recorded_format_the_backing_image_is_looked_at(graph: BlockGraph, tmp_path: Path) -> None:
    base = tmp_path / "base"
    qemu_img("create", "-q", "-f", "qcow2", str(base), "1M")
    qemu_io(base, "write -P 7 0 1M")
    above = overlay(tmp_path / "top.qcow2", "base", None)
    node = top(graph, above)
    assert node.children["backing"].driver == "qcow2"
    assert node.read(0, 10) == b"\7" * 10
    graph.close()
    base.write_bytes(b"raw bytes" + bytes(1000))
    assert top(graph, above).read(0, 9) == b"raw bytes"


def test_a_json_name_is_followed(graph: BlockGraph, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"0123456789" * 1000)
    options = {
        "driver": "raw",
        "offset": 5,
        "file": {"driver": "file", "filename": str(base), "locking": "off"},
    }
    above = overlay(tmp_path / "top.qcow2", "json:" + json.dumps(options), None)
    node = top(graph, above)
    assert node.read(0, 5) == b"56789"
    assert node.children["backing"].read_only


def test_the_backing_image_can_be_given_instead(graph: BlockGraph, tmp_path: Path) -> None:
    above = overlay(tmp_path / "top.qcow2", "gone.qcow2", "qcow2")
    (tmp_path / "other.raw").write_bytes(b"other" + bytes(1000))
    with pytest.raises(
        StillframeError, match=r"^Could not open backing file: Could not open '.*gone\.qcow2': No such"
    ):
        top(graph, above)
    assert top(graph, above, backing=None).read(0, 5) == bytes(5)
    graph.blockdev_del("top")
    other = {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "other.raw")}}
    assert top(graph, above, backing=other).read(0, 5) == b"other"
    graph.blockdev_del("top")
    graph.blockdev_add(other | {"node-name": "below", "read-only": True})
    assert top(graph, above, backing="below").read(0, 5) == b"other"
    with pytest.raises(InUse, match="Block device below is in use"):
        graph.blockdev_del("below")


@pytest.mark.usefixtures("every_qemu")
def test_nobody_may_write_an_image_that_others_stand_on(graph: BlockGraph, tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(base), "1M")
    top(graph, overlay(tmp_path / "top.qcow2", "base.qcow2", "qcow2"))
    with pytest.raises(InUse, match='Failed to get "write" lock'):
        FileNode("other", str(base))
    refused = subprocess.run(
        [peer("qemu-io"), "-c", "write 0 512", str(base)], stderr=subprocess.PIPE, text=True
    )
    assert 'Failed to get "write" lock' in refused.stderr
    backing = graph.find("top").children["backing"]
    with pytest.raises(StillframeError, match="Block node is read-only"):
        graph.use(backing, "disk0", writable=True)


def test_loops_are_refused(graph: BlockGraph, tmp_path: Path) -> None:
    overlay(tmp_path / "itself.qcow2", "itself.qcow2", "qcow2")
    overlay(tmp_path / "a.qcow2", "b.qcow2", "qcow2")
    overlay(tmp_path / "b.qcow2", "c.qcow2", None)
    overlay(tmp_path / "c.qcow2", str(tmp_path / "." / "a.qcow2"), "qcow2")
    os.symlink("a.qcow2", tmp_path / "link.qcow2")
    for name in ("itself.qcow2", "a.qcow2", "link.qcow2"):
        for read_only in (False, True):
            with pytest.raises(InvalidRequest, match="leads back to"):
                top(graph, tmp_path / name, read_only=read_only)
    assert graph.nodes() == ()


def test_chains_have_a_bound(graph: BlockGraph, tmp_path: Path) -> None:
    for number in range(MAX_CHAIN + 2):
        overlay(tmp_path / str(number), str(number + 1), "qcow2", size=512)
    (tmp_path / str(MAX_CHAIN + 2)).write_bytes(bytes(512))
    with pytest.raises(InvalidRequest, match=f"more than {MAX_CHAIN} images"):
        top(graph, tmp_path / "0")


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver": "raw", "file": "secret-node"}',
        'json:{"driver": "nbd", "host": "example.org"}',
        'json:{"driver": "file"}',
        "json:",
        "json:[",
        "json:" + "[" * 900,
        "nbd://example.org/disk",
        "fat:rw:/etc",
        "http://127.0.0.1:1/disk",
        "ssh://127.0.0.1/disk",
        'json:{"driver": "http", "url": "http://127.0.0.1:1/"}',
        'json:{"driver": "null-co", "latency-ns": 9000000000000000000}',
        'json:{"driver": "raw", "file": {"driver": "null-co", "latency-ns": 1}}',
        'json:{"driver": "file", "filename": "a\\u0000b"}',
        'json:{"driver": "file", "filename": "\\ud800"}',
        'json:{"driver": "raw", "file": ' + '{"driver": "raw", "file": ' * 33,
        '{"driver": "qcow2", "file": {"driver": "file", "filename": "/etc/passwd"}}',
        "json:{" + '"a":' + "9" * 900 + "}",
        "a" * 1023,
        "line\nbreak\x1b[31m",
        "",
    ],
)
def test_what_an_image_names_is_opened_only_if_it_is_a_plain_image(
    graph: BlockGraph, tmp_path: Path, name: str
) -> None:
    graph.blockdev_add({"driver": "null-co", "node-name": "secret-node"})
    path = overlay(tmp_path / "top.qcow2", name, "raw" if name else None)
    if not name:
        assert top(graph, path).read(0, 1) == b"\0"
        return
    with pytest.raises(StillframeError, match=r"^Could not open backing file: "):
        top(graph, path)
    assert [node.node_name for node in graph.nodes()] == ["secret-node"]


def test_a_backing_name_cannot_reach_a_device_or_a_directory(graph: BlockGraph, tmp_path: Path) -> None:
    for name in ("/dev/null", "/dev/tty", str(tmp_path)):
        path = overlay(tmp_path / f"top{name.count('/')}{len(name)}.qcow2", name, "raw")
        with pytest.raises(InvalidRequest, match=r"^Could not open backing file: "):
            top(graph, path)


def test_an_image_may_not_name_an_image_inside_an_image(graph: BlockGraph, tmp_path: Path) -> None:
    """Both would name a backing file of their own, so that the files to open double with every step of a chain."""
    inside = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "base.qcow2")}}
    qemu_img("create", "-q", "-f", "qcow2", str(tmp_path / "base.qcow2"), "1M")
    for words in (
        {"driver": "qcow2", "file": inside},
        {"driver": "qcow2", "file": {"driver": "raw", "file": inside}},
    ):
        path = tmp_path / f"{len(json.dumps(words))}.qcow2"
        overlay(path, "json:" + json.dumps(words), None)
        with pytest.raises(Unsupported, match="may not name a qcow2 image inside another"):
            top(graph, path)
    assert graph.nodes() == ()


def test_an_image_has_no_say_over_locks(graph: BlockGraph, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"below" + bytes(1019))
    words = {
        "driver": "raw",
        "force-share": True,
        "file": {"driver": "file", "filename": str(base), "locking": "off", "force-share": True},
    }
    top(graph, overlay(tmp_path / "top.qcow2", "json:" + json.dumps(words), None))
    with pytest.raises(InUse, match='Failed to get "write" lock'):
        FileNode("other", str(base))


def test_the_longest_chain_reads_to_its_bottom(graph: BlockGraph, tmp_path: Path) -> None:
    for number in range(MAX_CHAIN):
        overlay(
            tmp_path / str(number), str(number + 1), "qcow2" if number < MAX_CHAIN - 1 else "raw", size=512
        )
    (tmp_path / str(MAX_CHAIN)).write_bytes(b"bottom".ljust(512, b"!"))
    node = top(graph, tmp_path / "0")
    assert node.read(0, 6) == b"bottom"
    assert [each.depth for each in node.extents(0, 512)] == [MAX_CHAIN]
    node.write(0, b"x")
    assert node.read(0, 6) == b"xottom"
    assert node.info().backing_filename == "1"


def test_a_number_too_long_for_python_is_a_mistake_in_json_like_any_other() -> None:
    with pytest.raises(InvalidRequest, match="JSON parse error, a number is too long"):
        parse_options('{"driver": ' + "9" * 5000 + "}")
