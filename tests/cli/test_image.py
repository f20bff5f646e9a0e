"""`stillframe image` says what qemu-img says, and leaves images that qemu-img calls clean."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.commands import assert_one_sentence, in_process, stillframe
from peers import QEMU_VERSIONS, peer

FIXTURES = Path(__file__).resolve().parent.parent / "data" / "qcow2"


def qemu_img(*arguments: str | Path, version: str | None = None, code: int = 0) -> str:
    run = subprocess.run([peer("qemu-img", version), *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert run.returncode == code
    return run.stdout


def qemu_io(path: Path, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    return subprocess.run(
        [peer("qemu-io"), "-f", "qcow2", *words, str(path)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """64 KiB of ones in 8 MiB."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    qemu_io(path, "write -P 1 0 64k")
    return path


@pytest.fixture
def images(image: Path, tmp_path: Path) -> list[Path]:
    """One of each kind that `info` has something of its own to say about."""
    qemu_img("snapshot", "-c", "one", image)
    qemu_img("snapshot", "-c", "with blanks", image)
    made = [image]
    for name, size, *options in (
        ("old.qcow2", "4M", "-f", "qcow2", "-o", "compat=0.10,preallocation=metadata"),
        ("lazy.qcow2", "4M", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k,refcount_bits=1"),
        ("overlay.qcow2", "9M", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2"),
        ("disk.raw", "3M", "-f", "raw"),
    ):
        qemu_img("create", "-q", *options, tmp_path / name, size)
        made.append(tmp_path / name)
    (tmp_path / "odd.raw").write_bytes(b"x" * 1000)
    return [*made, tmp_path / "odd.raw"]


def _as_of(version: str, value: Any) -> Any:
    """7.2 does not tell of children, nor of what is special about a file."""
    if isinstance(value, list):
        return [_as_of(version, each) for each in value]
    if isinstance(value, dict) and version == "host":
        return {name: _as_of(version, each) for name, each in value.items() if name != "children"}
    return value


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_info_for_programs_is_qemu_imgs(images: list[Path], version: str) -> None:
    for path in images:
        expected = json.loads(qemu_img("info", "--output=json", path, version=version))
        ours = json.loads(in_process("image", "info", "--json", path).stdout)
        assert _as_of(version, ours) == _as_of(version, expected)
    chain = json.loads(
        qemu_img(
            "info", "--output=json", "--backing-chain", images[0].parent / "overlay.qcow2", version=version
        )
    )
    ours = json.loads(
        in_process("image", "info", "--json", "--backing-chain", images[0].parent / "overlay.qcow2").stdout
    )
    assert len(chain) == 2
    assert _as_of(version, ours) == _as_of(version, chain)


def test_info_for_people_is_that_of_qemu_img_10(images: list[Path]) -> None:
    for path in images:
        expected = qemu_img("info", path, version="10.0")
        assert in_process("image", "info", path).stdout == expected
    overlay = images[0].parent / "overlay.qcow2"
    expected = qemu_img("info", "--backing-chain", overlay, version="10.0")
    assert in_process("image", "info", "--backing-chain", overlay).stdout == expected


def test_the_list_of_snapshots_is_that_of_qemu_img_10(image: Path) -> None:
    assert stillframe("image", "snapshot", "list", image).stdout == ""
    for tag in ("one", "x" * 40, "with blanks"):
        qemu_img("snapshot", "-c", tag, image)
    expected = qemu_img("snapshot", "-l", image, version="10.0")
    assert stillframe("image", "snapshot", "list", image).stdout == expected
    qemu_img("snapshot", "-c", "with ünicode", image)
    listed = json.loads(stillframe("image", "snapshot", "list", "--json", image).stdout)
    assert listed == json.loads(qemu_img("info", "--output=json", image))["snapshots"]


def test_states_of_machines_are_listed_with_their_sizes(tmp_path: Path) -> None:
    for name in ("fx-v2", "fx-v3", "fx-v3-zstd"):
        path = tmp_path / f"{name}.qcow2"
        path.write_bytes(gzip.decompress((FIXTURES / f"{name}.qcow2.gz").read_bytes()))
        listed = in_process("image", "snapshot", "list", path).stdout
        assert listed == qemu_img("snapshot", "-l", path, version="10.0")
        assert "1.08 KiB" in listed


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_check_is_qemu_imgs(images: list[Path], version: str) -> None:
    for path in images:
        code = 0 if path.suffix == ".qcow2" else 63
        outcome = in_process("image", "check", "--json", path)
        assert outcome.code == code
        expected = qemu_img("check", "--output=json", path, version=version, code=code)
        if code == 0:
            assert json.loads(outcome.stdout) == json.loads(expected)
            human = in_process("image", "check", path).stdout
            assert human == qemu_img("check", path, version=version)


@pytest.mark.usefixtures("every_qemu")
def test_check_tells_leaks_from_corruption_and_repairs_both(image: Path, tmp_path: Path) -> None:
    qemu_img("snapshot", "-c", "one", image)
    clean = image.read_bytes().ljust(20 << 16, b"\0")
    refcount_block = int.from_bytes(clean[0x10000:0x10008], "big")

    def with_refcount(cluster: int, count: int) -> Path:
        damaged = bytearray(clean)
        damaged[refcount_block + 2 * cluster : refcount_block + 2 * cluster + 2] = count.to_bytes(2, "big")
        path = tmp_path / "damaged.qcow2"
        path.write_bytes(damaged)
        return path

    for cluster, count, code, how in ((19, 1, 3, "leaks"), (0, 0, 2, "all"), (5, 0, 2, "all")):
        path = with_refcount(cluster, count)
        expected = json.loads(qemu_img("check", "--output=json", path, code=code))
        outcome = in_process("image", "check", "--json", path)
        assert outcome.code == code
        assert json.loads(outcome.stdout) == expected
        assert path.read_bytes() == with_refcount(cluster, count).read_bytes()
        repaired = in_process("image", "check", "--repair", how, path)
        assert repaired.code == 0, repaired
        assert "inconsistencies were found and repaired" in repaired.stdout
        assert "No errors" in qemu_img("check", path)
        assert "pattern" not in qemu_io(path, "read -P 1 0 64k").lower()


@pytest.mark.usefixtures("every_qemu")
def test_what_is_created_is_what_qemu_img_creates(tmp_path: Path) -> None:
    for number, (ours, theirs, size) in enumerate(
        (
            ([], [], "10M"),
            (["-f", "raw"], ["-f", "raw"], "5000"),
            (["-o", "compat=0.10"], ["-o", "compat=0.10"], "1.5K"),
            (["-o", "cluster_size=4k,refcount_bits=64"], ["-o", "cluster_size=4k,refcount_bits=64"], "1T"),
            (["-o", "lazy_refcounts=on"], ["-o", "lazy_refcounts=on"], "0"),
            (["-o", "compression_type=zstd"], ["-o", "compression_type=zstd"], "3M"),
        )
    ):
        first, second = tmp_path / f"{number}.ours", tmp_path / f"{number}.theirs"
        made = in_process("image", "create", *ours, first, size)
        assert made.code == 0
        qemu_img("create", "-q", *(theirs if "-f" in theirs else ["-f", "qcow2", *theirs]), second, size)
        found = [json.loads(qemu_img("info", "--output=json", path)) for path in (first, second)]
        for each in found:
            del each["filename"], each["actual-size"]
            # Of the file beneath, which 7.2 does not tell of; how long it is, is not part of the format.
            each.pop("children", None)
        assert found[0] == found[1]
        assert f"({found[0]['virtual-size']} bytes)" in made.stdout
        if "-f" not in ours:
            assert "No errors" in qemu_img("check", first)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
@pytest.mark.parametrize(
    "options",
    [
        "",
        ",cluster_size=512",
        ",refcount_bits=1,cluster_size=4k",
        ",compat=0.10",
        ",cluster_size=2M",
    ],
)
def test_a_preallocated_image_has_every_cluster_in_its_place(
    options: str, version: str, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for how in ("metadata", "falloc", "full"):
        words = ("-o", f"preallocation={how}{options}")
        assert in_process("image", "create", "-q", "--force", *words, ours, "21M").code == 0
        qemu_img("create", "-q", "-f", "qcow2", *words, theirs, "21M", version=version)
        found = [
            json.loads(qemu_img("check", "--output=json", path, version=version)) for path in (ours, theirs)
        ]
        ends = [each.pop("image-end-offset") for each in found if each.pop("filename")]
        assert ends[0] <= ends[1]
        assert found[0] == found[1]
        taken = ours.stat().st_blocks * 512
        assert (taken < 14 << 20) if how == "metadata" else (taken > 21 << 20)
        qemu_img("compare", ours, theirs, version=version)
    qemu_io(ours, "write -P 1 1M 19M")
    assert "No errors" in qemu_img("check", ours, version=version)


def test_a_preallocated_image_of_many_tables_is_clean(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    assert in_process("image", "create", "-q", "-o", "preallocation=metadata", path, "1T").code == 0
    said = json.loads(qemu_img("check", "--output=json", path))
    assert said["allocated-clusters"] == said["total-clusters"] == 1 << 24
    assert "fragmented-clusters" not in said
    assert path.stat().st_blocks * 512 < 200 << 20


@pytest.mark.usefixtures("every_qemu")
@pytest.mark.parametrize("options", ["", ",data_file_raw=on", ",preallocation=metadata"])
def test_a_disk_can_have_a_data_file_of_its_own(options: str, tmp_path: Path) -> None:
    path, source, copy = tmp_path / "disk.qcow2", tmp_path / "source.raw", tmp_path / "copy.raw"
    source.write_bytes(bytes(range(1, 201)) * 5000 + bytes(48576))
    made = in_process("image", "create", "-q", "-o", f"data_file={tmp_path}/disk.data{options}", path, "1M")
    assert made.code == 0, made
    assert (tmp_path / "disk.data").stat().st_size == 1 << 20
    assert in_process("image", "convert", "-n", "-f", "raw", source, path).code == 0
    qemu_img("compare", source, path)
    assert "No errors" in qemu_img("check", path)
    assert in_process("image", "convert", path, copy).code == 0
    assert copy.read_bytes()[: 1000000 + 48576] == source.read_bytes()
    ours = json.loads(in_process("image", "map", "--json", path).stdout)
    theirs = json.loads(qemu_img("map", "--output=json", path))
    assert [{"compressed": False} | each for each in theirs] == ours
    refused = in_process("image", "convert", "-c", "-n", "-f", "raw", source, path)
    assert_one_sentence(refused, "external data file cannot be compressed")


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_an_image_is_described_without_its_data_file(version: str, tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", path, "1M", version=version)
    with_it = in_process("image", "info", "--json", path).stdout
    shown = json.loads(qemu_img("info", "--output=json", path, version=version))
    assert json.loads(with_it)["format-specific"] == shown["format-specific"]
    data.unlink()
    for words in (
        ("info", "--json"),
        ("info", "--json", "--backing-chain"),
        ("snapshot", "list"),
        ("check",),
    ):
        assert in_process("image", *words, path).code == 0, words
    assert in_process("image", "info", "--json", path).stdout == with_it
    for words in (("map", path), ("resize", path, "2M"), ("convert", path, tmp_path / "copy.raw")):
        assert_one_sentence(
            in_process("image", *words), f"Could not open '{data}': No such file or directory"
        )
    assert [each.name for each in tmp_path.iterdir()] == ["disk.qcow2"]


def test_a_data_file_elsewhere_is_written_only_where_it_is_named(tmp_path: Path) -> None:
    images, disks = tmp_path / "images", tmp_path / "disks"
    images.mkdir()
    disks.mkdir()
    path, data, source = images / "disk.qcow2", disks / "disk.data", tmp_path / "source.raw"
    source.write_bytes(b"\5" * (1 << 20))
    assert in_process("image", "create", "-q", "-o", f"data_file={data}", path, "1M").code == 0
    into = ("convert", "-n", "-f", "raw", source, path)
    for words in (into, ("resize", path, "2M")):
        refused = in_process("image", *words)
        assert_one_sentence(refused, str(data), "no file in the image's own directory", "--data-file")
    assert data.read_bytes() == bytes(1 << 20)
    assert in_process("image", "convert", "--data-file", data, *into[1:]).code == 0
    assert in_process("image", "resize", "--data-file", data, path, "2M").code == 0
    assert "verification failed" not in qemu_io(path, "read -P 5 0 1M", "read -P 0 1M 1M")
    assert "No errors" in qemu_img("check", path)
    for what in ("create", "apply", "delete"):
        refused = in_process("image", "snapshot", what, path, "tag")
        assert_one_sentence(refused, "has a data file of its own, and such an image cannot keep snapshots")
    wrong = in_process("image", "convert", "--data-file", data, source, tmp_path / "copy")
    assert_one_sentence(wrong, "--data-file", code=2)
    assert_one_sentence(in_process("image", "resize", "--data-file", data, source, "2M"), "qcow2")


@pytest.mark.usefixtures("every_qemu")
def test_extended_l2_goes_with_backing_files_preallocation_compression_and_snapshots(image: Path) -> None:
    over, packed = image.with_name("over.qcow2"), image.with_name("packed.qcow2")
    wanted = "extended_l2=on,preallocation=metadata"
    made = in_process("image", "create", "-q", "-o", wanted, "-b", "disk.qcow2", "-F", "qcow2", over)
    assert made.code == 0, made
    assert "Images are identical" in qemu_img("compare", image, over)
    assert in_process("image", "snapshot", "create", over, "before").code == 0
    assert "failed" not in qemu_io(
        over, "write -P 2 2k 2k", "read -P 1 0 2k", "read -P 2 2k 2k", "read -P 1 4k 60k"
    )
    assert "No errors" in qemu_img("check", over)
    assert in_process("image", "convert", "-c", "-O", "qcow2", "-o", "extended_l2=on", over, packed).code == 0
    shown = json.loads(qemu_img("info", "--output=json", packed))
    assert shown["format-specific"]["data"]["extended-l2"] is True
    assert "Images are identical" in qemu_img("compare", over, packed)
    assert "compressed clusters" in qemu_img("check", packed)
    assert "failed" not in qemu_io(
        packed, "write -P 3 4k 2k", "read -P 2 2k 2k", "read -P 3 4k 2k", "read -P 1 6k 58k"
    )
    assert "No errors" in qemu_img("check", packed)
    assert in_process("image", "snapshot", "apply", over, "before").code == 0
    assert "Images are identical" in qemu_img("compare", image, over)
    assert in_process("image", "snapshot", "delete", over, "before").code == 0
    assert "No errors" in qemu_img("check", over)
    assert_one_sentence(
        in_process("image", "create", "-o", "extended_l2=on,cluster_size=8k", image.with_name("no"), "1M"),
        "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
    )


@pytest.mark.parametrize("how", ["falloc", "full"])
def test_space_is_taken_for_a_raw_image_where_asked(how: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    assert in_process("image", "create", "-f", "raw", "-o", f"preallocation={how}", path, "3M").code == 0
    assert path.read_bytes() == bytes(3 << 20)
    assert path.stat().st_blocks * 512 >= 3 << 20


def test_an_overlay_takes_the_size_of_what_it_stands_on(image: Path) -> None:
    outcome = stillframe(
        "image", "create", "-q", "-b", "disk.qcow2", "-F", "qcow2", image.parent / "over.qcow2"
    )
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "pattern" not in qemu_io(image.parent / "over.qcow2", "read -P 1 0 64k").lower()
    assert (
        json.loads(qemu_img("info", "--output=json", image.parent / "over.qcow2"))["virtual-size"] == 8 << 20
    )


@pytest.mark.usefixtures("every_qemu")
def test_a_snapshot_keeps_the_disk_and_brings_it_back(image: Path) -> None:
    assert stillframe("image", "snapshot", "create", image, "ones").code == 0
    qemu_io(image, "write -P 2 0 64k", "write -P 3 1M 64k")
    assert stillframe("image", "snapshot", "create", image, "twos").code == 0
    assert "No errors" in qemu_img("check", image)
    assert stillframe("image", "snapshot", "apply", image, "ones").code == 0
    assert "pattern" not in qemu_io(image, "read -P 1 0 64k", "read -P 0 1M 64k").lower()
    assert stillframe("image", "snapshot", "delete", image, "ones").code == 0
    assert stillframe("image", "snapshot", "apply", image, "twos").code == 0
    assert "pattern" not in qemu_io(image, "read -P 2 0 64k", "read -P 3 1M 64k").lower()
    assert stillframe("image", "snapshot", "delete", image, "twos").code == 0
    assert "No errors" in qemu_img("check", image)
    assert stillframe("image", "snapshot", "list", image).stdout == ""


@pytest.mark.usefixtures("every_qemu")
def test_stock_tools_list_apply_and_delete_our_snapshots_and_we_theirs(image: Path) -> None:
    stillframe("image", "snapshot", "create", image, "ours")
    qemu_io(image, "write -P 2 0 64k")
    qemu_img("snapshot", "-c", "theirs", image)
    names = [
        each["name"] for each in json.loads(stillframe("image", "snapshot", "list", "--json", image).stdout)
    ]
    assert names == ["ours", "theirs"]
    qemu_img("snapshot", "-a", "ours", image)
    assert "pattern" not in qemu_io(image, "read -P 1 0 64k").lower()
    assert stillframe("image", "snapshot", "apply", image, "theirs").code == 0
    assert "pattern" not in qemu_io(image, "read -P 2 0 64k").lower()
    qemu_img("snapshot", "-d", "ours", image)
    assert stillframe("image", "snapshot", "delete", image, "theirs").code == 0
    assert "No errors" in qemu_img("check", image)


def test_tags_match_by_name_and_ids_only_where_asked(image: Path) -> None:
    for tag in ("first", "1"):
        assert in_process("image", "snapshot", "create", image, tag).code == 0
    qemu_img("snapshot", "-c", "first", image)
    # By name "1" is the second snapshot; the first one has that id.
    assert in_process("image", "snapshot", "delete", image, "1").code == 0
    assert_one_sentence(in_process("image", "snapshot", "delete", image, "1"), "tag '1'", "disk.qcow2")
    assert_one_sentence(
        in_process("image", "snapshot", "apply", image, "first"), "2 snapshots", "1, 3", "--id"
    )
    assert in_process("image", "snapshot", "delete", "--id", image, "3").code == 0
    assert in_process("image", "snapshot", "apply", image, "first").code == 0
    assert_one_sentence(in_process("image", "snapshot", "apply", "--id", image, "first"), "id 'first'")
    listed = json.loads(in_process("image", "snapshot", "list", "--json", image).stdout)
    assert [(each["id"], each["name"]) for each in listed] == [("1", "first")]


def test_a_refused_snapshot_changes_no_byte(image: Path) -> None:
    in_process("image", "snapshot", "create", image, "one")
    before = image.read_bytes()
    for words, expected in (
        (("create", image, "one"), "already exists"),
        (("create", image, ""), "empty"),
        (("create", image, "x" * 256), "255"),
        (("create", image, "ü" * 128), "255"),
        (("apply", image, "nope"), "does not exist"),
        (("delete", image, "nope"), "does not exist"),
        (("delete", "--id", image, "7"), "does not exist"),
    ):
        assert_one_sentence(in_process("image", "snapshot", *words), expected)
    assert image.read_bytes() == before
    assert in_process("image", "snapshot", "create", image, "x" * 255).code == 0


def test_escapes_in_a_tag_do_not_reach_the_terminal(image: Path) -> None:
    qemu_img("snapshot", "-c", "\x1b[31mred\nline", image)
    outcome = stillframe("image", "snapshot", "list", image)
    assert "\x1b" not in outcome.stdout
    assert len(outcome.stdout.splitlines()) == 3


@pytest.mark.usefixtures("every_qemu")
def test_an_image_in_use_is_refused_and_can_be_looked_at(image: Path) -> None:
    process = subprocess.Popen(
        [peer("qemu-io"), str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("length\n")
    process.stdin.flush()
    process.stdout.readline()
    try:
        for words in (("info",), ("check",), ("snapshot", "list")):
            refused = in_process("image", *words, image)
            assert_one_sentence(refused, 'Failed to get shared "write" lock', f"[{image}]")
            assert in_process("image", *words, "--force-share", image).code == 0
        for words in (("create", image, "x"), ("apply", image, "x"), ("delete", image, "x")):
            refused = in_process("image", "snapshot", *words)
            assert_one_sentence(refused, 'Failed to get "write" lock', f"[{image}]")
        refused = in_process("image", "create", "--force", image, "1M")
        assert_one_sentence(refused, 'Failed to get "write" lock', f"[{image}]")
    finally:
        process.communicate("quit\n")
    assert "pattern" not in qemu_io(image, "read -P 1 0 64k").lower()


def test_help_needs_no_subcommand_and_names_them_all() -> None:
    outcome = in_process("--help")
    assert outcome.code == 0
    for word in ("image", "doctor", "completion", "EXAMPLES", "EXIT CODES", "130"):
        assert word in outcome.stdout
    for words in (("image",), ("image", "create"), ("image", "check"), ("image", "snapshot")):
        outcome = in_process(*words, "--help")
        assert outcome.code == 0
        assert "EXAMPLES" in outcome.stdout
    assert in_process("--version").stdout.startswith("stillframe ")


def test_info_imports_no_heavy_library(image: Path) -> None:
    program = (
        "import sys; from stillframe.cli.main import main\n"
        f"sys.argv = ['stillframe', 'image', 'info', {str(image)!r}]\n"
        "try: main()\n"
        "finally: print(sorted({'numpy', 'rich', 'unicorn', 'asyncio', 'msgspec', 'ctypes'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(shell: str) -> None:
    outcome = in_process("completion", shell)
    assert outcome.code == 0
    assert "_STILLFRAME_COMPLETE" in outcome.stdout


def test_a_reader_that_has_seen_enough_is_no_traceback(image: Path) -> None:
    run = subprocess.run(
        f"{sys.executable} -m stillframe image info {image} | true",
        shell=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr == ""
