"""The house keeps its own rules: who may import whom, how large a room is, under which licences it may be given away."""

import ast
import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "stillframe"

LEVELS = {
    "errors": 0,
    "events": 0,
    "sockets": 0,
    "jobs": 1,
    "block": 1,
    "vmstate": 2,
    "machine": 3,
    "snapshots": 4,
    "monitor": 5,
    "client": 6,
    "testing": 6,
    "cli": 7,
}
MAY_NOT = {
    ("jobs", "block"),
    ("block", "jobs"),
    ("vmstate", "jobs"),
    ("machine", "jobs"),
    ("client", "snapshots"),
}

MODULES = sorted(SOURCE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for item in ast.walk(ast.parse(path.read_text())):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module and not item.level:
            found.add(item.module)
    return {name for name in found if name.startswith("stillframe.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down_the_house(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if parts[0] not in LEVELS:
        return
    for name in imports_of(path):
        below = room(name)
        if below not in LEVELS:
            continue
        assert LEVELS[below] <= LEVELS[parts[0]], f"{'.'.join(parts)} imports {name}"
        assert (parts[0], below) not in MAY_NOT, f"{'.'.join(parts)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_room_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 550
    if path.name != "__init__.py" or path.stat().st_size:
        assert ast.get_docstring(ast.parse(path.read_text())), (
            "a module says in its first line what it is for"
        )


GPL_COMPATIBLE = re.compile(
    r"MIT|BSD|PSF|Python Software Foundation|LGPL|GPL-?2|GPLv2|GNU General Public License v2|0BSD|Zlib|public domain|unlicense",
    re.IGNORECASE,
)


def runtime_dependencies() -> list[str]:
    project = tomllib.loads((SOURCE.parent.parent / "pyproject.toml").read_text())["project"]
    return [re.split(r"[<>=!~ ]", line, maxsplit=1)[0] for line in project["dependencies"]]


@pytest.mark.parametrize("name", runtime_dependencies())
def test_every_dependency_may_be_given_away_with_gpl2_code(name: str) -> None:
    data = metadata(name)
    said = [data.get("License-Expression") or "", data.get("License") or ""]
    said += [line for line in data.get_all("Classifier") or [] if line.startswith("License ::")]
    assert GPL_COMPATIBLE.search(" ".join(said)), f"{name} says of its licence: {said}"


def test_nothing_committed_names_a_path_of_a_machine_or_a_registry() -> None:
    root = SOURCE.parent.parent
    telling = re.compile(r"/work/|\.\./shared|\.\./\.library|deb\.debian\.org|pypi\.org|registry\.npmjs")
    for folder in ("src", "docs", "scripts", "guest", "bench", "tests"):
        for path in (root / folder).rglob("*"):
            if path.suffix not in {".py", ".md", ".c", ".h", ".S", ".ld", ""} or not path.is_file():
                continue
            if path == Path(__file__).resolve() or "data" in path.parts or "__pycache__" in path.parts:
                continue
            found = telling.search(path.read_bytes().decode("utf-8", "replace"))
            assert found is None, f"{path.relative_to(root)} names {found and found.group()}"
