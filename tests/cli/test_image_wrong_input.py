"""Wrong input of every kind gets one sentence that names the thing, and leaves nothing behind."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.commands import Outcome, assert_one_sentence, in_process, stillframe
from peers import peer

COMMANDS = [
    ("info",),
    ("check",),
    ("map",),
    ("snapshot", "list"),
    ("snapshot", "create", "IMAGE", "tag"),
    ("snapshot", "apply", "IMAGE", "tag"),
    ("snapshot", "delete", "IMAGE", "tag"),
    ("resize", "IMAGE", "16M"),
]
SNAPSHOTS = [words for words in COMMANDS if words[0] == "snapshot" and "IMAGE" in words]
CHANGING = [words for words in COMMANDS if "IMAGE" in words]


def on(words: tuple[str, ...], path: Path) -> tuple[str, ...]:
    """The command with the image where it belongs."""
    if "IMAGE" not in words:
        return ("image", *words, str(path))
    return ("image", *(str(path) if word == "IMAGE" else word for word in words))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", str(path), "8M"], check=True)
    subprocess.run(
        [peer("qemu-io"), "-c", "write -P 1 0 256k", str(path)], check=True, stdout=subprocess.DEVNULL
    )
    return path


@pytest.mark.parametrize("words", COMMANDS)
def test_a_missing_file(words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "nx"
    assert_one_sentence(in_process(*on(words, path)), f"Could not open '{path}': No such file or directory")


@pytest.mark.parametrize("words", COMMANDS)
def test_a_directory(words: tuple[str, ...], tmp_path: Path) -> None:
    assert_one_sentence(in_process(*on(words, tmp_path)), f"Could not open '{tmp_path}': Is a directory")


def test_not_qcow2(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 100_000)
    for words in COMMANDS:
        refused = in_process(*on(words, path), "-f", "qcow2")
        assert_one_sentence(refused, "Image is not in qcow2 format")
    for words in SNAPSHOTS:
        assert_one_sentence(in_process(*on(words, path)), "disk.raw", "cannot keep snapshots")
    assert_one_sentence(in_process(*on(("check",), path)), "does not support checks", code=63)
    assert path.read_bytes() == b"x" * 100_000


def test_an_empty_file_is_an_empty_raw_disk(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert "virtual size: 0 B" in in_process("image", "info", path).stdout


@pytest.mark.parametrize("length", [4, 71, 103, 111, 0x10000, 0x20000, 0x30000])
def test_a_truncated_image(image: Path, length: int) -> None:
    subprocess.run([peer("qemu-img"), "snapshot", "-c", "tag", str(image)], check=True)
    os.truncate(image, length)
    before = image.read_bytes()
    for words in COMMANDS:
        outcome = in_process(*on(words, image))
        assert "Traceback" not in outcome.stderr, (words, outcome.stderr)
        if words[0] == "check":
            assert outcome.code in (1, 2)
        elif outcome.code:
            assert_one_sentence(outcome)
        after = bytearray(image.read_bytes())
        if outcome.code and after != before:
            # Its tables are not there any more: it is marked as corrupt, and nothing else.
            assert "metadata" in outcome.stderr, (words, outcome.stderr)
            after[79] &= ~2
            assert after == before
        image.write_bytes(before)


def as_nobody(*arguments: str) -> Outcome:
    """Run `stillframe` without the rights of root, its modules imported before they are given up."""
    program = (
        "import os, sys\n"
        "import stillframe.cli.image, stillframe.cli.main, stillframe.block.graph, stillframe.block.create\n"
        "import stillframe.block.qcow2, stillframe.block.describe, stillframe.snapshots.group, uuid\n"
        "import stillframe.block.qcow2.check, stillframe.block.qcow2.repair, stillframe.block.qcow2.resize\n"
        "import stillframe.block.qcow2.preallocation, stillframe.block.compare\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"sys.argv = ['stillframe', *{list(arguments)!r}]\n"
        "stillframe.cli.main.main()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    return Outcome(run.returncode, run.stdout, run.stderr)


@pytest.fixture
def reachable(image: Path) -> Iterator[Path]:
    """The image, in a directory that everybody may pass; pytest closes its own when another run of it starts."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(shutil.copy(image, directory))


def test_no_permission_to_read(reachable: Path) -> None:
    reachable.chmod(0)
    for words in COMMANDS:
        refused = as_nobody(*on(words, reachable))
        assert_one_sentence(
            refused, f"Could not open '{reachable}': Permission denied", "Check the permissions"
        )


def test_no_permission_to_write(reachable: Path) -> None:
    reachable.chmod(0o444)
    before = reachable.read_bytes()
    assert as_nobody(*on(("info",), reachable)).code == 0
    assert as_nobody(*on(("check",), reachable)).code == 0
    for words in (*CHANGING, ("check", "--repair", "all")):
        refused = as_nobody(*on(words, reachable))
        assert_one_sentence(refused, f"Could not open '{reachable}': Permission denied")
    new = reachable.parent / "new.qcow2"
    reachable.parent.chmod(0o555)
    refused = as_nobody("image", "create", str(new), "1M")
    assert_one_sentence(refused, f"Could not create '{new}': Permission denied")
    assert reachable.read_bytes() == before


def limited_to(size: int):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_no_room_for_a_new_image(tmp_path: Path) -> None:
    for kind, size in (("qcow2", "10M"), ("raw", "10M")):
        path = tmp_path / f"new.{kind}"
        refused = stillframe("image", "create", "-f", kind, path, size, preexec=limited_to(100_000))
        assert_one_sentence(refused, str(path), "File too large", "Make room")
        assert not path.exists()


def test_no_room_for_a_snapshot_leaves_the_image_as_it_was(image: Path) -> None:
    assert stillframe("image", "snapshot", "create", image, "older").code == 0
    size = image.stat().st_size
    refused = stillframe("image", "snapshot", "create", image, "newer", preexec=limited_to(size))
    assert_one_sentence(refused, "newer", "File too large", "Make room")
    names = stillframe("image", "snapshot", "list", image).stdout
    assert "older" in names
    assert "newer" not in names
    check = subprocess.run([peer("qemu-img"), "check", str(image)], stdout=subprocess.PIPE)
    assert check.returncode in (0, 3)
    assert stillframe("image", "snapshot", "apply", image, "older").code == 0
    read = [peer("qemu-io"), "-c", "read -P 1 0 256k", str(image)]
    assert b"verification failed" not in subprocess.run(read, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system needs root")
def test_a_full_file_system(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)]
    mounted = subprocess.run(mount, stderr=subprocess.PIPE)
    if mounted.returncode:
        pytest.skip("this host mounts no tmpfs")
    try:
        path = tmp_path / "disk.qcow2"
        assert stillframe("image", "create", path, "1G").code == 0
        (tmp_path / "filler").write_bytes(bytes((2 << 20) - path.stat().st_blocks * 512))
        refused = stillframe("image", "snapshot", "create", path, "tag")
        assert_one_sentence(refused, "tag", "No space left on device", "Make room")
        (tmp_path / "filler").unlink()
        assert stillframe("image", "check", path).code == 0
        assert stillframe("image", "snapshot", "create", path, "tag").code == 0
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("words", "expected", "code"),
    [
        (("create", "x.qcow2"), "needs a size", 1),
        (("create", "x.qcow2", "10X"), "'10X' is not a size", 2),
        (("create", "x.qcow2", "--", "-5"), "'-5' is not a size", 2),
        (("create", "x.qcow2", "1_0"), "'1_0' is not a size", 2),
        (("create", "x.qcow2", "9E"), "Invalid image size specified", 1),
        (("create", "x.qcow2", "1E"), "too large for this cluster size", 1),
        (("create", "x.raw", "-f", "raw", "9E"), "Invalid image size specified", 1),
        (("create", "x.qcow2", "-f", "vmdk", "1M"), "vmdk", 2),
        (("create", "x.qcow2", "-o", "foo=1", "1M"), "Invalid parameter 'foo'", 1),
        (("create", "x.qcow2", "-o", "cluster_size=300", "1M"), "power of two", 1),
        (("create", "x.qcow2", "-o", "cluster_size=", "1M"), "cluster_size", 1),
        (("create", "x.qcow2", "-o", "compat=2", "1M"), "compat", 1),
        (("create", "x.qcow2", "-o", "refcount_bits=3", "1M"), "Refcount width", 1),
        (("create", "x.qcow2", "-o", "lazy_refcounts=maybe", "1M"), "'on' or 'off'", 1),
        (("create", "x.qcow2", "-o", "extended_l2=on,cluster_size=4k", "1M"), "at least 16384 bytes", 1),
        (("create", "x.qcow2", "-o", "data_file_raw=on", "1M"), "data-file-raw requires data-file", 1),
        (("create", "x.qcow2", "-o", "data_file=x.qcow2", "1M"), "cannot be the image itself", 1),
        (("convert", "-O", "qcow2", "-o", "data_file=x.data", "nx", "x.qcow2"), "-n", 1),
        (("create", "x.qcow2", "-o", "preallocation=some", "1M"), "'preallocation'", 1),
        (
            ("create", "x.qcow2", "-o", "preallocation=full", "-b", "nx", "-F", "raw"),
            "Could not open 'nx'",
            1,
        ),
        (
            ("create", "x.raw", "-f", "raw", "-o", "preallocation=metadata", "1M"),
            "Unsupported preallocation",
            1,
        ),
        (
            ("create", "x.raw", "-f", "raw", "-o", "cluster_size=4k", "1M"),
            "Invalid parameter 'cluster_size'",
            1,
        ),
        (("create", "x.qcow2", "-o", "compression_type=lzo", "1M"), "'compression_type'", 1),
        (("create", "x.qcow2", "-o", "compression_type=zstd,compat=0.10", "1M"), "Non-zlib", 1),
        (
            ("create", "x.qcow2", "-o", "cluster_size=512,refcount_bits=64,preallocation=metadata", "60G"),
            "too large",
            1,
        ),
        (("convert", "x"), "TARGET", 2),
        (("convert", "nx", "x.raw"), "Could not open 'nx'", 1),
        (("convert", "-c", "nx", "x.raw"), "Compression not supported for this file format", 1),
        (
            ("convert", "-c", "-O", "qcow2", "-o", "preallocation=full", "nx", "x"),
            "not supported at the same time",
            1,
        ),
        (("convert", "-S", "x", "nx", "x.raw"), "'x' is not a size", 2),
        (("convert", "-B", "nx", "nx", "x.raw"), "Backing file not supported for file format 'raw'", 1),
        (("convert", "-O", "qcow2", "-B", "nx", "nx", "x.qcow2"), "without backing format", 1),
        (("convert", "-n", "-o", "cluster_size=4k", "nx", "x.qcow2"), "-n takes the target as it is", 2),
        (("convert", "-O", "vmdk", "nx", "x.vmdk"), "vmdk", 2),
        (("create", "x.qcow2", "-b", "nx"), "without backing format", 1),
        (("create", "x.qcow2", "-b", "nx", "-F", "qcow2"), "Could not open", 1),
        (("create", "x.qcow2", "-F", "qcow2", "1M"), "without backing file", 1),
        (("create", "x.raw", "-f", "raw", "-b", "nx", "1M"), "no backing file", 1),
        (("create", "no/such/x.qcow2", "1M"), "No such file or directory", 1),
        (("resize", "x.qcow2"), "SIZE", 2),
        (("resize", "x.qcow2", "10X"), "'10X' is not a size", 2),
        (("resize", "x.qcow2", "+-5"), "'+-5' is not a size", 2),
        (("resize", "x.qcow2", "+5M"), "Could not open 'x.qcow2'", 1),
        (("resize", "--preallocation", "some", "x", "1M"), "some", 2),
        (("map", "-s", "x", "y"), "'x' is not a size", 2),
        (("compare", "x"), "SECOND", 2),
        (("compare", "x", "y"), "Could not open 'x'", 2),
        (("create",), "FILE", 2),
        (("info",), "FILE", 2),
        (("info", "a", "b"), "b", 2),
        (("nosuch",), "nosuch", 2),
        (("snapshot", "create", "x"), "TAG", 2),
        (("check", "--repair", "some", "x"), "some", 2),
        (("check", "--repair", "all", "-U", "x"), "--force-share", 2),
    ],
)
def test_wrong_words(
    words: tuple[str, ...], expected: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(in_process("image", *words), expected, code=code)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_its_end_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(b"precious")
    assert_one_sentence(stillframe("image", "create", path, "1M"), str(path), "exists already")
    assert path.read_bytes() == b"precious"
    assert stillframe("image", "create", "--force", path, "1M").code == 0
    # One that fails on an existing file leaves the file, whatever is in it.
    refused = stillframe("image", "create", "--force", path, "1M", preexec=limited_to(4096))
    assert_one_sentence(refused, "File too large")
    assert path.exists()


def test_an_image_is_not_put_over_itself(image: Path) -> None:
    before = image.read_bytes()
    refused = stillframe("image", "create", "--force", "-b", image, "-F", "qcow2", image)
    assert_one_sentence(refused, "same filename as the backing file")
    assert image.read_bytes() == before


@pytest.mark.parametrize("words", [("--help",), ("info", "--json", "{image}")])
def test_output_that_finds_no_room_is_a_failure_in_one_sentence(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    image = tmp_path / "a.qcow2"
    stillframe("image", "create", image, "1M")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stillframe", "image", *(word.format(image=image) for word in words)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "stillframe: Could not go on: No space left on device\n")


def test_a_copy_without_room_leaves_nothing(image: Path) -> None:
    for words in (("-O", "raw"), ("-O", "qcow2"), ("-c", "-O", "qcow2", "-o", "cluster_size=4k")):
        copy = image.with_name("copy")
        refused = stillframe("image", "convert", *words, image, copy, preexec=limited_to(10_000))
        assert_one_sentence(refused, "copy", "File too large", "Make room")
        assert [each.name for each in image.parent.iterdir()] == [image.name]


def test_what_the_copy_takes_is_checked_before_anything_is_read(image: Path) -> None:
    copy = image.with_name("copy")
    for size in ("100", "32M"):
        refused = in_process("image", "convert", "-S", size, image, copy)
        assert_one_sentence(refused, "Invalid buffer size for sparse output")
    raw = image.with_name("disk.raw")
    raw.write_bytes(b"x" * 1024)
    assert_one_sentence(in_process("image", "convert", "-l", "tag", raw, copy), "Can't find snapshot 'tag'")
    refused = in_process("image", "convert", "-c", "-n", image, raw)
    assert_one_sentence(refused, "smaller")
    assert {each.name for each in image.parent.iterdir()} == {image.name, "disk.raw"}
