"""What clients of QEMU's see of our exports, beside what they see of qemu-nbd's."""

import json
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from export.client import Client
from export.serving import ours, theirs
from peers import peer


def run(program: str, *words: object) -> str:
    done = subprocess.run([peer(program), *map(str, words)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def image_with(path: Path, kind: str) -> Path:
    """An image with everything that a map can show."""
    below = path / "below"
    options: list[object] = ["-o", "cluster_size=4096" if kind == "small clusters" else "cluster_size=65536"]
    if kind == "backing":
        run("qemu-img", "create", "-q", "-f", "qcow2", below, "3M")
        run("qemu-io", "-c", "write -P 1 0 200k", "-c", "write -P 2 1M 1k", below)
        options += ["-b", below, "-F", "qcow2"]
    if kind == "preallocated":
        options = ["-o", "preallocation=metadata"]
    disk = path / "disk"
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, disk, 5 * 1024 * 1024 + 512)
    for words in ("write -P 3 70k 10k", "write -z 300k 1M", "write -P 4 2M 500k", "discard 2100k 128k"):
        run("qemu-io", "-c", words, disk)
    if kind == "compressed":
        run("qemu-io", "-c", "write -c -P 5 4M 64k", disk)
    return disk


KINDS = ("plain", "small clusters", "backing", "preallocated", "compressed")


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_and_the_content_are_those_of_qemu_nbd(tmp_path: Path, kind: str, every_qemu: str) -> None:
    disk = image_with(tmp_path, kind)
    with ours(tmp_path / "o", disk) as (at_ours, _, _), theirs(tmp_path / "t", disk) as at_theirs:
        maps = [json.loads(run("qemu-img", "map", "--output", "json", at)) for at in (at_ours, at_theirs)]
        assert maps[0] == maps[1]
        sizes = [json.loads(run("qemu-img", "info", "--output", "json", at)) for at in (at_ours, at_theirs)]
        assert sizes[0]["virtual-size"] == sizes[1]["virtual-size"]
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", at_ours, at_theirs)
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", at_ours, tmp_path / "copy")
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "-U", tmp_path / "copy", disk)


def commands(chance: random.Random, size: int) -> list[str]:
    """Requests of all kinds, also at odd places, also several at once."""
    found = []
    for number in range(60):
        offset = chance.randrange(size - 1)
        length = min(chance.choice((1, 511, 4096, 65536, 300000, 2 << 20)), size - offset)
        kinds = ("write -P {p}", "aio_write -P {p}", "write -f -P {p}", "write -z", "write -z -u", "discard")
        kind = chance.choices((*kinds, "read", "flush"), (6, 6, 2, 3, 3, 3, 4, 2))[0].format(p=number + 1)
        if kind in ("discard", "aio_write", "flush"):
            # What a discarded part of a cluster reads as is for each server to say.
            offset, length = offset & -65536, max(65536, length & -65536)
        if kind.startswith("aio"):
            # Two that overlap have no order.
            offset, length = number * 65536 % (size - 65536) & -65536, 65536
        found.append("flush" if kind == "flush" else f"{kind} {offset} {min(length, size - offset)}")
        if not kind.startswith("aio"):
            found.insert(len(found) - 1, "aio_flush")
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_leave_what_they_leave_behind_qemu_nbd(
    tmp_path: Path, seed: int, every_qemu: str
) -> None:
    size = 4 << 20
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("-o", f"cluster_size={(4096, 65536)[seed % 2]},extended_l2={('off', 'on')[seed == 3]}")
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, first, size)
    run("qemu-io", "-c", f"write -P 255 0 {size // 2}", first)
    run("qemu-img", "snapshot", "-c", "before", first)
    shutil.copy(first, second)
    words = [word for each in commands(random.Random(seed), size) for word in ("-c", each)]
    with ours(tmp_path / "o", first, writable=True) as (at, _, _):
        run("qemu-io", "-f", "raw", *words, at)
    with theirs(tmp_path / "t", second, writable=True) as at:
        run("qemu-io", "-f", "raw", *words, at)
    run("qemu-img", "compare", first, second)
    run("qemu-img", "check", first)


@pytest.mark.parametrize("length", [1, 511, 513, 4097, 1 << 20])
def test_a_raw_file_of_any_size_is_read_and_written_to_its_last_byte(tmp_path: Path, length: int) -> None:
    file = tmp_path / "raw"
    file.write_bytes(random.Random(length).randbytes(length))
    before = file.read_bytes()
    with ours(tmp_path / "o", file, "raw", writable=True) as (at, _, _):
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", at, tmp_path / "copy")
        copy = (tmp_path / "copy").read_bytes()
        assert copy[:length] == before
        assert not any(copy[length:])
        run("qemu-io", "-f", "raw", "-c", f"write -P 7 {length - 1} 1", at)
    assert file.read_bytes() == before[:-1] + b"\7"


def test_a_snapshot_is_served_as_it_was_and_stays_as_long_as_it_is(tmp_path: Path) -> None:
    from stillframe.errors import InUse

    disk = image_with(tmp_path, "plain")
    run("qemu-img", "snapshot", "-c", "old", disk)
    shutil.copy(disk, tmp_path / "before")
    run("qemu-io", "-c", "write -P 9 0 5M", disk)
    with ours(tmp_path / "o", disk, writable=True) as (_, exports, graph):
        from stillframe.block.export.exports import ExportRequest

        exports.add(ExportRequest("s", "n", "old", snapshot="old"))
        run(
            "qemu-img",
            "compare",
            "-U",
            "-F",
            "qcow2",
            f"nbd+unix:///old?socket={tmp_path / 'o'}",
            tmp_path / "before",
        )
        store = graph.find("n").snapshot_store
        assert store is not None
        (snapshot,) = store.snapshots()
        with pytest.raises(InUse):
            store.prepare_delete(snapshot)
        # Its client has ended; that it has, the server may not have noticed yet.
        exports.remove("s", hard=True)
        change = store.prepare_delete(snapshot)
        change.commit()
        change.finish()
    run("qemu-img", "check", disk)


def test_a_write_that_waits_for_a_snapshot_is_overtaken_by_reads(tmp_path: Path) -> None:
    from stillframe.block.export import nbd

    disk = image_with(tmp_path, "plain")
    run("qemu-img", "snapshot", "-c", "old", disk)
    with ours(tmp_path / "o", disk, writable=True) as (_, _, graph), Client(tmp_path / "o").go() as client:
        store = graph.find("n").snapshot_store
        assert store is not None
        change = store.prepare_delete(store.snapshots()[0])
        write = client.ask(nbd.WRITE, 4 << 20, 4096, data=bytes([9]) * 4096)
        assert client.do(nbd.READ, 2 << 20, 2) == [(2 << 20, b"\4\4")]
        change.commit()
        change.finish()
        assert client.reply()[:2] == (write, 0)
    run("qemu-img", "check", disk)


def test_what_a_client_wrote_in_order_is_frozen_in_order(tmp_path: Path) -> None:
    """Two disks of one client: whatever instant is taken, a later write is never there without an earlier one."""
    from stillframe.block.export import nbd
    from stillframe.block.export.exports import ExportRequest

    for name in ("first", "second"):
        (tmp_path / name).write_bytes(bytes(65536))
    with ours(tmp_path / "o", tmp_path / "first", "raw", writable=True) as (_, exports, graph):
        file = {"driver": "file", "filename": str(tmp_path / "second")}
        graph.blockdev_add({"driver": "raw", "node-name": "m", "file": file})
        exports.add(ExportRequest("f", "m", "second", writable=True))
        over, written = threading.Event(), threading.Semaphore(0)

        def write() -> None:
            with Client(tmp_path / "o").go() as first, Client(tmp_path / "o").go("second") as second:
                number = 0
                while not over.is_set():
                    number += 1
                    first.do(nbd.WRITE, 0, 8, data=number.to_bytes(8, "big"))
                    second.do(nbd.WRITE, 0, 8, data=number.to_bytes(8, "big"))
                    written.release()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(50):
                assert written.acquire(timeout=20)
                with exports.drained():
                    later, earlier = (graph.find(name).read(0, 8) for name in ("m", "n"))
                    again = graph.find("m").read(0, 8)
                assert later == again
                assert later <= earlier
        finally:
            over.set()
            writer.join()
