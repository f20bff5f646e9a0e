"""What the documents say is so: command lines parse, links lead somewhere, what is named exists."""

import json
import re
import select
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from monitor.harness import Client, served
from peers import peer
from stillframe.block.options import parse_options
from stillframe.cli import control, qmp, snapshot
from stillframe.cli.main import cli
from stillframe.cli.run_options import monitor_places, parse_console, parse_device, parse_memory
from stillframe.machine.engines.qemu.command_line import drive_of, refuse_words

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "stillframe"
DOCUMENTS = [ROOT / "README.md", ROOT / "guest" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def leaves(command: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command of the command line, groups too, by its words."""
    yield " ".join(path), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from leaves(below, (*path, name))


def shown_blocks(text: str) -> list[str]:
    """Command lines in indented blocks and in backquotes, one a line, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line.strip() for line in joined.splitlines() if re.match(r"( {4}|  )\S", line)]
    inline = [" ".join(found.split()) for found in re.findall(r"(?<!`)`(stillframe [^`]+)`(?!`)", text)]
    return [line for line in lines + inline if re.search(r"(^|[|(;]\s*)stillframe\s", line)]


def shown() -> list[tuple[str, str]]:
    """Where, and what."""
    found = [
        (str(path.relative_to(ROOT)), line) for path in DOCUMENTS for line in shown_blocks(path.read_text())
    ]
    for name, command in leaves():
        for line in shown_blocks((command.epilog or "").partition("EXAMPLES")[2]):
            found.append((f"{name or 'stillframe'} --help", line))
    return found


def words_of(line: str) -> list[list[str]]:
    """The arguments of each `stillframe` in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = []
    current: list[str] | None = []
    for word in [*lexer, ";"]:
        if re.fullmatch(r"[|&;<>()]+", word):
            if current and current[0] == "stillframe":
                found.append(current[1:])
            current = [] if "<" not in word and ">" not in word else None
        elif current is not None:
            current.append(word)
        inner = re.search(r"\$\((stillframe [^)]*)\)", word)
        if inner:
            found.append(shlex.split(inner[1])[1:])
    return found


class Reached(Exception):
    """A command was understood and would begin its work now."""


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Commands stop where they would begin; the values that they were given."""
    given: list[dict[str, Any]] = []

    def reached(*_: Any, **values: Any) -> None:
        given.append(values)
        raise Reached

    for module in (control, snapshot, qmp):
        monkeypatch.setattr(module, "converse", reached)
    for _, command in leaves():
        if isinstance(command, click.Group) or any(option.name == "address" for option in command.params):
            # The latter read their words themselves, and then converse.
            continue
        monkeypatch.setattr(command, "callback", reached)
    return given


@pytest.mark.parametrize(("where", "line"), shown(), ids=lambda text: text[:60])
def test_every_command_line_that_is_shown_is_understood(
    where: str, line: str, nothing_runs: list[dict[str, Any]]
) -> None:
    commands = words_of(line)
    assert commands, line
    for words in commands:
        if words == ["image"] or words[-1] in ("--help", "--version"):
            continue
        with pytest.raises(Reached):
            cli.main(words, prog_name="stillframe", standalone_mode=False)
        if words[0] == "run":
            options = nothing_runs[-1]
            parse_memory(options["memory"])
            console = parse_console(options["console"] or "none")
            monitor_places(None, options["addresses"], console)
            if options["engine"] == "qemu":
                refuse_words(options["words"])
                drives = {drive_of(text) for text in options["devices"]} - {None}
            else:
                drives = {parse_device(text).options["drive"] for text in options["devices"]}
            nodes = {parse_options(text).node_name for text in options["blockdevs"]}
            assert drives <= nodes


def test_what_would_not_be_understood_is_noticed(nothing_runs: list[dict[str, Any]]) -> None:
    for line in (
        "stillframe save box",
        "stillframe save box a b",
        "stillframe run --kernal x",
        "stillframe sav",
    ):
        for words in words_of(line):
            with pytest.raises(click.UsageError):
                cli.main(words, prog_name="stillframe", standalone_mode=False)


def test_every_command_shows_examples() -> None:
    without = [name for name, command in leaves() if "EXAMPLES" not in (command.epilog or "")]
    below = {"image snapshot create", "image snapshot apply", "image snapshot delete", "image snapshot list"}
    assert set(without) <= below


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), f"{path.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, (
                link
            )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_is_there(path: Path) -> None:
    for name in re.findall(r"`((?:src|tests|scripts|docs|guest|bench)/[\w./-]*)`", path.read_text()):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_that_a_document_names_is_one(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z][a-z-]*)", path.read_text(), re.MULTILINE)) <= targets


def drawing() -> dict[Path, set[str]]:
    """The folders of the drawing in docs/architecture.md, and the modules that each names."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    lines = text[text.index("    src/stillframe/") :].partition("\n\n")[0].splitlines()
    open_folders = [(4, SOURCE)]
    found: dict[Path, set[str]] = {SOURCE: set()}
    for line in lines[1:]:
        indent = len(line) - len(line.lstrip())
        while open_folders[-1][0] >= indent:
            open_folders.pop()
        first = line.split()[0]
        if first.endswith("/"):
            open_folders.append((indent, open_folders[-1][1] / first))
            found[open_folders[-1][1]] = set()
        folder = open_folders[-1][1]
        found[folder] |= set(re.findall(r"(?<!/)\b\w+\.py\b", line))
    return found


def test_every_module_in_the_drawing_of_the_house_exists() -> None:
    for folder, names in drawing().items():
        assert folder.is_dir()
        for name in names:
            assert (folder / name).is_file(), f"{folder.relative_to(SOURCE)}/{name}"


def test_every_module_is_in_the_drawing_of_the_house() -> None:
    """By its name, or its folder is there as a whole."""
    drawn = drawing()
    as_a_whole = {SOURCE / name for name in ("cli", "client", "data", "jobs", "monitor/commands")}
    as_a_whole |= {SOURCE / "machine" / name for name in ("devices", "boards", "engines")}
    assert as_a_whole <= drawn.keys()
    for path in SOURCE.rglob("*.py"):
        if path.name in ("__init__.py", "__main__.py") or as_a_whole & set(path.parents):
            continue
        assert path.name in drawn.get(path.parent, ()), f"docs/architecture.md does not draw {path}"


def documented_differences() -> set[str]:
    texts = [(ROOT / "docs" / name).read_text() for name in ("differences.md", "monitor.md")]
    found = re.findall(r"^\| `([a-z0-9]+(?:-[a-z0-9]+)+)` \| [^|]+\| [^|]+\|", "\n".join(texts), re.MULTILINE)
    assert len(found) == len(set(found)), "two differences of one name"
    return set(found)


def test_every_difference_that_code_and_tests_name_is_documented() -> None:
    """They are named as a whole comment, in parentheses at the end of a clause, or before a docstring's colon."""
    named = re.compile(r'(?:^\s*# |\(|""")([a-z]+(?:-[a-z0-9]+)+)(?:\)[.:;,]|: |$)', re.MULTILINE)
    known = documented_differences()
    seen = set()
    for folder in (SOURCE, ROOT / "tests"):
        for path in folder.rglob("*.py"):
            for name in named.findall(path.read_text()):
                assert name in known, f"{path.relative_to(ROOT)} names {name}"
                seen.add(name)
    assert {"no-node-twice", "tags-match-by-name", "failed-load-keeps-running"} <= seen


def test_the_session_that_is_shown_goes_as_shown(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "monitor.md").read_text()
    shown = [
        (who, json.loads(said)) for who, said in re.findall(r"^    ([SC]): (\{.*\})$", text, re.MULTILINE)
    ]
    assert len(shown) > 5
    with served(tmp_path / "qmp.sock") as (_, address), Client(address) as client:
        for who, said in shown:
            if who == "C":
                client.send(said)
                continue
            found = client.message()
            while "event" in found and "event" not in said:
                # The job goes on by itself, on either side of the reply.
                found = client.message()
            if "timestamp" in said:
                assert found.keys() == said.keys()
                assert found["timestamp"].keys() == said["timestamp"].keys()
                del found["timestamp"], said["timestamp"]
            assert found == said


def test_the_bundled_guest_starts_on_qemu_as_its_manual_says(tmp_path: Path) -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / "docs" / "guest.md").read_text())
    line = next(line for line in text.splitlines() if line.startswith("    qemu-system-riscv64"))
    words = [peer("qemu-system-riscv64"), *shlex.split(line)[1:]]
    words = [str(ROOT / word) if word.startswith("src/") else word for word in words]
    subprocess.run(
        [peer("qemu-img"), "create", "-q", "-f", "qcow2", "root.qcow2", "16M"], check=True, cwd=tmp_path
    )
    process = subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        seen, deadline = b"", time.monotonic() + 60
        while not re.search(rb"HB 1 t=\d+ gap=\d+ bad=0 nonce=", seen):
            assert select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))[0], seen
            data = process.stdout.read1(4096)
            assert data, seen
            seen += data
        assert re.search(rb"boot 1 nonce=\w+ from=[\w,]+ memory=128 pattern=32 disks=1 flash=\d+ sbi=", seen)
        assert b"disk0: 32768 sectors, checked" in seen
    finally:
        process.kill()
        process.communicate()
