"""`stillframe image convert`: what it makes reads as its source did, to every QEMU, and a failed one costs nobody a file."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.commands import Outcome, assert_one_sentence, in_process, stillframe
from peers import QEMU_VERSIONS, peer

K, M = 1 << 10, 1 << 20


def qemu(*arguments: str | Path, version: str | None = None) -> Outcome:
    run = subprocess.run(
        [peer("qemu-img", version), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return Outcome(run.returncode, run.stdout, run.stderr)


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(
        [peer("qemu-io"), "-f", path.suffix[1:], *words, str(path)], check=True, stdout=subprocess.PIPE
    )


def make(path: Path, size: int, *options: str, writes: tuple[str, ...] = ()) -> Path:
    made = qemu("create", "-q", "-f", path.suffix[1:], *options, path, str(size))
    assert made.code == 0, made
    if writes:
        qemu_io(path, *writes)
    return path


def assert_alike(first: Path, second: Path, *options: str) -> None:
    kinds = ("-f", first.suffix[1:], "-F", second.suffix[1:])
    for version in QEMU_VERSIONS:
        said = qemu("compare", *options, *kinds, first, second, version=version)
        assert said.code == 0, said
        if second.suffix == ".qcow2":
            checked = qemu("check", second, version=version)
            assert checked.code == 0, checked


def mixed(length: int) -> bytes:
    """Zeroes, text, and what does not get smaller, in pieces of 16 KiB."""
    source = random.Random(length)
    parts = [bytes(16 * K), b"a line of text, and another\n" * 600, b""]
    data = bytearray()
    while len(data) < length:
        part = source.choice(parts)
        data += part[: 16 * K] if part else source.randbytes(16 * K)
    return bytes(data[:length])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """3 MiB and two sectors."""
    path = tmp_path / "disk.raw"
    path.write_bytes(mixed(3 * M + 1024))
    return path


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-o", "cluster_size=512"),
        ("-o", "cluster_size=2M"),
        ("-o", "compat=0.10"),
        ("-o", "refcount_bits=1"),
        ("-S", "0"),
        ("-S", "1M"),
        ("-c",),
        ("-c", "-o", "compression_type=zstd"),
        ("-c", "-o", "cluster_size=512"),
        ("-c", "-o", "cluster_size=4k,compression_type=zstd,refcount_bits=2"),
        ("-c", "-o", "cluster_size=2M"),
        ("-c", "-o", "refcount_bits=1"),
        ("-c", "-o", "compat=0.10"),
        ("-c", "-S", "0"),
    ],
    ids=" ".join,
)
def test_a_copy_reads_as_its_source_and_is_clean(disk: Path, options: tuple[str, ...]) -> None:
    copy, back = disk.with_name("copy.qcow2"), disk.with_name("back.raw")
    done = in_process("image", "convert", "-f", "raw", "-O", "qcow2", *options, disk, copy)
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    assert_alike(disk, copy)
    theirs = disk.with_name("theirs.qcow2")
    assert qemu("convert", "-f", "raw", "-O", "qcow2", *options, disk, theirs).code == 0
    # Both leave zeroes out by their own measure, which are a few clusters of the smallest.
    packed = [
        json.loads(qemu("check", "--output=json", path).stdout).get("compressed-clusters", 0)
        for path in (copy, theirs)
    ]
    assert abs(packed[0] - packed[1]) <= packed[1] // 100
    if "cluster_size=2M" not in options:
        # Else the tables weigh more than the disk.
        assert copy.stat().st_blocks <= theirs.stat().st_blocks * 1.1 + 128
    assert in_process("image", "convert", "-f", "qcow2", copy, back).code == 0
    assert back.read_bytes() == disk.read_bytes()
    assert sorted(each.name for each in disk.parent.iterdir()) == [
        "back.raw",
        "copy.qcow2",
        "disk.raw",
        "theirs.qcow2",
    ]


def test_holes_stay_holes(tmp_path: Path) -> None:
    size = 1 << 40
    source = make(tmp_path / "large.qcow2", size, writes=("write -P 1 512G 64k",))
    raw, back = tmp_path / "large.raw", tmp_path / "back.qcow2"
    assert in_process("image", "convert", source, raw).code == 0
    assert (raw.stat().st_size, raw.stat().st_blocks * 512) == (size, 64 * K)
    assert in_process("image", "convert", "-f", "raw", "-O", "qcow2", raw, back).code == 0
    assert back.stat().st_size < M
    # Allocated, and never written.
    full = make(
        tmp_path / "full.qcow2", 1 << 30, "-o", "preallocation=metadata", writes=("write -P 1 7M 64k",)
    )
    assert in_process("image", "convert", "--force", full, raw).code == 0
    assert raw.stat().st_blocks * 512 == 64 * K


def test_a_chain_becomes_one_image_or_stays_a_chain(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", 4 * M, writes=("write -P 1 0 2M",))
    other = make(tmp_path / "other.qcow2", 4 * M, writes=("write -P 1 0 1M", "write -P 9 3M 64k"))
    top = make(
        tmp_path / "top.qcow2",
        5 * M,
        "-b",
        str(base),
        "-F",
        "qcow2",
        writes=("write -P 2 64k 64k", "write -z 1M 64k", "write -P 3 4200k 4k"),
    )
    for number, (below, options) in enumerate(
        ((None, ()), (base, ()), (other, ()), (base, ("-c",)), (other, ("-c",)), (base, ("-S", "0")))
    ):
        words = ("-B", below.name, "-F", "qcow2") if below else ()
        copy = tmp_path / f"copy{number}.qcow2"
        done = in_process("image", "convert", "-O", "qcow2", *words, *options, top, copy)
        assert done.code == 0, done
        assert_alike(top, copy)
        said = json.loads(qemu("info", "--output=json", copy).stdout)
        assert said.get("backing-filename") == (below.name if below else None)
        if below == base and not options:
            theirs = tmp_path / "theirs.qcow2"
            assert qemu("convert", "-O", "qcow2", *words, top, theirs).code == 0
            maps = [json.loads(qemu("map", "--output=json", path).stdout) for path in (copy, theirs)]
            for entry in maps[0] + maps[1]:
                entry.pop("offset", None)
            assert maps[0] == maps[1]


def test_a_snapshot_is_copied_as_it_was(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", 8 * M, writes=("write -P 7 0 8M",))
    path = make(tmp_path / "disk.qcow2", 4 * M, "-b", str(base), "-F", "qcow2", writes=("write -P 1 0 1M",))
    assert qemu("snapshot", "-c", "first", path).code == 0
    assert qemu("snapshot", "-c", "7", path).code == 0
    assert qemu("resize", path, "8M").code == 0
    qemu_io(path, "write -P 2 0 6M")
    ours, theirs = tmp_path / "ours.raw", tmp_path / "theirs.raw"
    for words, same in (("first", "first"), ("snapshot.name=7", "7"), ("snapshot.id=1", "1"), ("7", "7")):
        done = in_process("image", "convert", "--force", "-l", words, path, ours)
        assert done.code == 0, done
        assert qemu("convert", "-O", "raw", "-l", same, path, theirs).code == 0
        # QEMU's copy has the size that the disk has now, and shows what lies below behind the old end.
        assert ours.read_bytes() == theirs.read_bytes()[: 4 * M]
    for words, expected in (
        ("nope", "Can't find snapshot 'nope'"),
        ("2", "snapshot.id=ID"),
        ("snapshot.id=9", "Can't find snapshot"),
        ("snapshot.foo=9", "Invalid parameter 'snapshot.foo'"),
    ):
        assert_one_sentence(in_process("image", "convert", "-l", words, path, tmp_path / "new"), expected)
    assert not (tmp_path / "new").exists()


def test_an_existing_target_is_written_into_where_asked(disk: Path) -> None:
    target = make(disk.with_name("target.qcow2"), 4 * M, writes=("write -P 9 0 4M",))
    assert qemu("snapshot", "-c", "kept", target).code == 0
    assert in_process("image", "convert", "-n", "-f", "raw", disk, target).code == 0
    padded = disk.with_name("padded.raw")
    padded.write_bytes(disk.read_bytes() + b"\x09" * (4 * M - disk.stat().st_size))
    assert_alike(padded, target)
    assert qemu("snapshot", "-a", "kept", target).code == 0
    small = make(disk.with_name("small.qcow2"), M)
    refused = in_process("image", "convert", "-n", "-f", "raw", disk, small)
    assert_one_sentence(refused, "output file is smaller than input file")
    assert "smaller" in qemu("convert", "-n", "-f", "raw", "-O", "qcow2", disk, small).stderr
    assert_one_sentence(
        in_process("image", "convert", "-n", disk, disk), 'Failed to get "write" lock', str(disk)
    )
    assert_one_sentence(in_process("image", "convert", "-n", disk, "nx"), "Could not open 'nx'")


@settings(
    max_examples=10, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    writes=st.lists(
        st.tuples(
            st.sampled_from(["write -P 1", "write -P 2", "write -z", "write -z -u", "discard"]),
            st.integers(0, 2000),
            st.integers(1, 300),
        ),
        max_size=8,
    ),
    before=st.sampled_from(["512", "4k", "64k", "2M"]),
    after=st.sampled_from(["512", "4k", "64k", "2M"]),
    packed=st.booleans(),
)
def test_images_made_at_random_read_alike_after_a_conversion(
    writes: list[tuple[str, int, int]], before: str, after: str, packed: bool, tmp_path: Path
) -> None:
    for old in tmp_path.glob("*.qcow2"):
        old.unlink()
    source = make(
        tmp_path / "source.qcow2",
        M + 512,
        "-o",
        f"cluster_size={before}",
        writes=tuple(
            f"{word} {at * 512} {min(length * 512, M + 512 - at * 512)}" for word, at, length in writes
        ),
    )
    copy, again = tmp_path / "copy.qcow2", tmp_path / "again.qcow2"
    words = ("-c",) if packed else ()
    made = in_process("image", "convert", "-O", "qcow2", "-o", f"cluster_size={after}", *words, source, copy)
    assert made.code == 0, made
    # Our own compressed clusters are read by us, too.
    assert in_process("image", "convert", "-O", "qcow2", copy, again).code == 0
    assert_alike(source, copy)
    assert_alike(source, again)


def test_a_file_that_is_there_is_replaced_only_where_asked_and_only_by_a_whole_copy(
    disk: Path, tmp_path: Path
) -> None:
    target = tmp_path / "precious.raw"
    target.write_bytes(b"precious")
    target.chmod(0o640)
    assert_one_sentence(in_process("image", "convert", disk, target), "precious.raw", "exists already")
    assert target.read_bytes() == b"precious"
    # One that fails in its midst: the source's second half cannot be read.
    broken = make(tmp_path / "broken.qcow2", 64 * M, "-o", "cluster_size=4k", writes=("write -P 1 0 8M",))
    with broken.open("r+b") as file:
        file.seek(int.from_bytes(broken.read_bytes()[40:48], "big") + 3 * 8)
        file.write((0x8000000000000200).to_bytes(8, "big"))
    refused = in_process("image", "convert", "--force", broken, target)
    assert_one_sentence(refused, "L2 table")
    assert target.read_bytes() == b"precious"
    assert {each.name for each in tmp_path.iterdir()} == {"disk.raw", "precious.raw", "broken.qcow2"}
    link = tmp_path / "link.raw"
    link.symlink_to("precious.raw")
    assert in_process("image", "convert", "--force", disk, link).code == 0
    assert link.is_symlink()
    assert target.read_bytes() == disk.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_source_is_not_replaced_by_its_copy_nor_an_image_in_use(disk: Path) -> None:
    base = make(disk.with_name("base.qcow2"), M, writes=("write -P 1 0 64k",))
    top = make(disk.with_name("top.qcow2"), M, "-b", str(base), "-F", "qcow2")
    for target in (top, base, disk):
        before = target.read_bytes()
        source = disk if target == disk else top
        refused = in_process("image", "convert", "--force", "-O", "qcow2", source, target)
        assert_one_sentence(refused, 'Failed to get "write" lock', str(target))
        assert target.read_bytes() == before
    assert {each.name for each in disk.parent.iterdir()} == {"disk.raw", "base.qcow2", "top.qcow2"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_ended_leaves_no_half_copy_under_the_name(
    number: signal.Signals, tmp_path: Path
) -> None:
    source, target = tmp_path / "source.raw", tmp_path / "target.qcow2"
    source.write_bytes(os.urandom(M) * 96)
    target.write_bytes(b"precious")
    words = ("convert", "-c", "--force", "-f", "raw", "-O", "qcow2", str(source), str(target))
    process = subprocess.Popen(
        [sys.executable, "-m", "stillframe", "image", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while (
        not (unfinished := list(tmp_path.glob("target.qcow2.unfinished-*")))
        or not unfinished[0].stat().st_size
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert target.read_bytes() == b"precious"
    if number == signal.SIGINT:
        assert (process.returncode, said.strip()) == (130, "stillframe: interrupted")
        assert list(tmp_path.glob("*.unfinished-*")) == []
    else:
        assert process.returncode == -number
        # Whoever finds it sees that it is not whole.
        assert len(list(tmp_path.glob("target.qcow2.unfinished-*"))) == 1


def test_progress_goes_to_the_end(disk: Path) -> None:
    copy = disk.with_name("copy.raw")
    done = stillframe("image", "convert", "-p", disk, copy)
    steps = done.stdout.splitlines()
    assert (steps[0], steps[-1]) == ("    (0.00/100%)", "    (100.00/100%)")
    assert stillframe("image", "convert", "--force", disk, copy).stdout == ""
