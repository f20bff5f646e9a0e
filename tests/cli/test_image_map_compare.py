"""`stillframe image map`, `compare` and `resize` beside qemu-img's, on images that qemu-io made."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.commands import Outcome, assert_one_sentence, in_process
from peers import QEMU_VERSIONS, peer

K, M = 1 << 10, 1 << 20


def qemu(*arguments: str | Path, version: str | None = None) -> Outcome:
    run = subprocess.run(
        [peer("qemu-img", version), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return Outcome(run.returncode, run.stdout, run.stderr)


def make(path: Path, size: int, *options: str, writes: tuple[str, ...] = ()) -> Path:
    kind = path.suffix[1:]
    made = qemu("create", "-q", "-f", kind, *options, path, str(size))
    assert made.code == 0, made
    if writes:
        words = [word for write in writes for word in ("-c", write)]
        subprocess.run([peer("qemu-io"), "-f", kind, *words, str(path)], check=True, stdout=subprocess.PIPE)
    return path


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """One of each kind that reads in a way of its own."""
    base = make(
        tmp_path / "base.qcow2", 8 * M, writes=("write -P 1 0 64k", "write -P 3 1M 128k", "write -z 2M 64k")
    )
    over = ("-b", str(base), "-F", "qcow2")
    found = {
        "base": base,
        "overlay": make(
            tmp_path / "overlay.qcow2",
            9 * M,
            *over,
            writes=("write -P 2 64k 64k", "write -z -u 3M 128k", "write -z 4M 32k", "write -P 9 8M 4k"),
        ),
        "packed": make(
            tmp_path / "packed.qcow2",
            8 * M,
            *over,
            writes=("write -c -P 7 4M 64k", "write -c -P 8 4160k 64k", "write -P 9 6M 1k"),
        ),
        "preallocated": make(
            tmp_path / "preallocated.qcow2",
            4 * M,
            "-o",
            "preallocation=metadata",
            writes=("write -P 1 64k 128k", "write -z 1M 64k"),
        ),
        "small clusters": make(
            tmp_path / "small.qcow2",
            2 * M,
            "-o",
            "cluster_size=512",
            writes=("write -P 1 0 192k", "write -z 64k 3k", "write -P 2 1M 5k"),
        ),
        "raw": make(tmp_path / "disk.raw", 3 * M, writes=("write -P 1 1000000 3",)),
        "empty": make(tmp_path / "empty.raw", 0),
        "blank": make(tmp_path / "blank.qcow2", 8 * M),
        "odd": tmp_path / "odd.raw",
    }
    found["odd"].write_bytes(b"x" * 1000)
    return found


def expected_map(path: Path, version: str, *options: str) -> list[dict[str, Any]]:
    said = qemu("map", "--output=json", "-f", path.suffix[1:], *options, path, version=version)
    assert said.code == 0, said
    # 7.2 does not tell what is compressed.
    return [{"compressed": "offset" not in each and each["data"]} | each for each in json.loads(said.stdout)]


def our_map(path: Path, *options: str) -> list[dict[str, Any]]:
    said = in_process("image", "map", "--json", "-f", path.suffix[1:], *options, path)
    assert said.code == 0, said
    return json.loads(said.stdout)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_the_map_for_programs_is_qemu_imgs(images: dict[str, Path], version: str) -> None:
    for path in images.values():
        assert our_map(path) == expected_map(path, version), path
        for options in (
            ("-s", "1M"),
            ("-s", "70000", "-l", "100k"),
            ("--start-offset", "1500k", "--max-length", "1"),
            ("-s", "100M"),
        ):
            assert our_map(path, *options) == expected_map(path, version, *options), (path, options)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_the_map_for_people_is_qemu_imgs(images: dict[str, Path], version: str) -> None:
    for path in images.values():
        expected = qemu("map", "-f", path.suffix[1:], path, version=version)
        ours = in_process("image", "map", "-f", path.suffix[1:], path)
        assert (ours.code, ours.stdout) == (expected.code, expected.stdout), path
        if ours.code:
            assert "compressed clusters" in ours.stderr
            assert "compressed clusters" in expected.stderr


def assert_same_verdict(ours: Outcome, theirs: Outcome) -> None:
    """QEMU's strict eye also sees where a run touches the end of one disk and not of the other: before us, then."""
    status = re.compile(r"Strict mode: Offset (\d+) block status mismatch!\n")
    here, there = status.fullmatch(ours.stdout), status.fullmatch(theirs.stdout)
    if here and there:
        assert int(here[1]) >= int(there[1])
        return
    assert (ours.code, ours.stdout) == (theirs.code, theirs.stdout)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_two_disks_differ_where_qemu_img_says(images: dict[str, Path], version: str) -> None:
    paths = list(images.values())
    seen = set()
    for number, first in enumerate(paths):
        for second in paths[number:]:
            for options in ((), ("-s",)):
                kinds = ("-f", first.suffix[1:], "-F", second.suffix[1:])
                expected = qemu("compare", *options, *kinds, first, second, version=version)
                ours = in_process("image", "compare", *options, *kinds, first, second)
                assert_same_verdict(ours, expected)
                seen.add(ours.stdout.split(" at offset")[0].split("Offset")[0])
    assert len(seen) >= 5


def test_a_comparison_that_cannot_be_made_has_a_code_of_its_own(images: dict[str, Path]) -> None:
    missing = in_process("image", "compare", images["raw"], "nx")
    assert_one_sentence(missing, "Could not open 'nx'", code=2)
    assert qemu("compare", images["raw"], "nx").code == 2
    # A table that cannot lie where it is said to.
    damaged = images["base"].with_name("damaged.qcow2")
    shutil.copy(images["base"], damaged)
    table = int.from_bytes(damaged.read_bytes()[40:48], "big")
    with damaged.open("r+b") as file:
        file.seek(table)
        file.write((0x8000000000000000 | 0x40200).to_bytes(8, "big"))
    assert qemu("compare", damaged, images["base"]).code > 1
    assert_one_sentence(in_process("image", "compare", damaged, images["base"]), "L2 table", code=4)


def test_a_comparison_for_programs(images: dict[str, Path]) -> None:
    said = in_process("image", "compare", "--json", images["base"], images["overlay"])
    assert (said.code, json.loads(said.stdout)) == (
        1,
        {"identical": False, "same-size": True, "difference": "content", "offset": 65536},
    )
    said = in_process("image", "compare", "--json", images["blank"], images["empty"])
    assert (said.code, json.loads(said.stdout)) == (0, {"identical": True, "same-size": False})


def test_progress_goes_to_the_end_where_it_is_asked_for(images: dict[str, Path]) -> None:
    said = in_process("image", "compare", "-p", images["overlay"], images["overlay"])
    assert said.stdout.startswith("    (0.00/100%)\r")
    assert said.stdout.endswith("    (100.00/100%)\r\nImages are identical.\n")


_WRITES = st.tuples(
    st.sampled_from(["write -P 1", "write -P 2", "write -z", "write -z -u", "discard", "write -c -P 3"]),
    st.integers(0, 12),
    st.integers(1, 4),
    st.booleans(),
)


@settings(
    max_examples=8, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    below=st.lists(_WRITES, max_size=4),
    above=st.lists(_WRITES, max_size=4),
    cluster=st.sampled_from([4 * K, 64 * K]),
)
def test_chains_made_at_random_are_mapped_and_compared_alike(
    below: list[tuple[str, int, int, bool]],
    above: list[tuple[str, int, int, bool]],
    cluster: int,
    tmp_path: Path,
) -> None:
    def words(writes: list[tuple[str, int, int, bool]]) -> tuple[str, ...]:
        # Compressed ones only where nothing was: qemu-io refuses others.
        commands = [
            f"{word} {at * 64}k {length * 32 if cut else length * 64}k" for word, at, length, cut in writes
        ]
        return tuple(each for each in commands if "-c" not in each)

    packed = {at for word, at, _, _ in below if "-c" in word} - {
        at + step for word, at, length, _ in below if "-c" not in word for step in range(length)
    }
    first = tuple(f"write -c -P 3 {at * 64}k 64k" for at in sorted(packed)) if cluster == 64 * K else ()
    for old in tmp_path.glob("*.qcow2"):
        old.unlink()
    base = make(tmp_path / "below.qcow2", M, "-o", f"cluster_size={cluster}", writes=(*first, *words(below)))
    top = make(tmp_path / "above.qcow2", M + 64 * K, "-b", str(base), "-F", "qcow2", writes=words(above))
    for path in (base, top):
        assert our_map(path) == expected_map(path, "host")
    for options in ((), ("-s",)):
        expected = qemu("compare", *options, base, top)
        ours = in_process("image", "compare", *options, base, top)
        assert_same_verdict(ours, expected)


# resize


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_resize_says_what_qemu_img_says(tmp_path: Path, version: str) -> None:
    for kind in ("qcow2", "raw"):
        ours, theirs = (make(tmp_path / f"{name}.{kind}", 8 * M) for name in ("ours", "theirs"))
        for words in (
            ("16M",),
            ("+1M",),
            ("-1M",),
            ("--shrink", "-1M"),
            ("0",),
            ("--shrink", "-100M"),
            ("17M",),
            ("--preallocation=full", "17M"),
            ("--preallocation=metadata", "--shrink", "4M"),
            ("-q", "18M"),
            ("--shrink", "4M"),
        ):
            size = words[-1]
            expected = qemu("resize", "-f", kind, *words[:-1], theirs, size, version=version)
            said = in_process("image", "resize", "-f", kind, *words[:-1], ours, size)
            assert (said.code, said.stdout) == (expected.code, expected.stdout), (kind, words, said, expected)
            if said.code:
                assert expected.stderr.splitlines()[0].removeprefix("qemu-img: ") in said.stderr
            sizes = {
                json.loads(qemu("info", "--output=json", path).stdout)["virtual-size"]
                for path in (ours, theirs)
            }
            assert len(sizes) == 1, (kind, words)
        if kind == "qcow2":
            assert qemu("check", ours, version=version).code == 0


def test_a_snapshot_keeps_the_size_that_a_resize_takes(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 8 * M, writes=("write -P 1 7M 64k",))
    assert in_process("image", "snapshot", "create", path, "large").code == 0
    assert in_process("image", "resize", "--shrink", path, "1M").code == 0
    assert our_map(path)[-1]["start"] + our_map(path)[-1]["length"] == M
    assert in_process("image", "resize", path, "10M").code == 0
    assert in_process("image", "compare", "-q", path, make(tmp_path / "blank.raw", 10 * M)).code == 0
    assert in_process("image", "snapshot", "apply", path, "large").code == 0
    assert qemu("check", path).code == 0
    reread = subprocess.run(
        [peer("qemu-io"), "-c", "read -P 1 7M 64k", "-c", "length", str(path)], capture_output=True, text=True
    )
    assert "8 MiB" in reread.stdout
    assert "failed" not in reread.stdout


@pytest.mark.parametrize("how", ["falloc", "full"])
def test_space_is_taken_where_a_raw_disk_grows_with_preallocation(how: str, tmp_path: Path) -> None:
    path = make(tmp_path / "disk.raw", M, writes=("write -P 1 0 4k",))
    assert in_process("image", "resize", "-f", "raw", "--preallocation", how, path, "+2M").code == 0
    assert path.stat().st_size == 3 * M
    assert 2 * M <= path.stat().st_blocks * 512 < 3 * M
    assert path.read_bytes() == bytes([1]) * 4096 + bytes(3 * M - 4096)
    refused = in_process("image", "resize", "-f", "raw", "--preallocation", "metadata", path, "+2M")
    assert_one_sentence(refused, "Unsupported preallocation mode: metadata")
    assert path.stat().st_size == 3 * M
