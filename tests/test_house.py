"""The house keeps its own rules: who may import whom, how large a room is, under which licences it may be given away."""

import ast
import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "stillframe"

BLOCK = {"errors", "events", "sockets", "text"}
MACHINE = BLOCK | {"block", "vmstate"}
SNAPSHOTS = MACHINE | {"machine", "jobs"}
MONITOR = SNAPSHOTS | {"snapshots", "__version__"}
WIRE = {"errors", "text", "client", "data", "monitor.addresses", "__version__"}
"""What is needed to speak with a machine, and to say what came of it."""

MAY_IMPORT = {
    "errors": set(),
    "events": set(),
    "data": set(),
    "text": set(),
    "sockets": {"errors"},
    "jobs": {"errors", "events"},
    "block": BLOCK,
    "vmstate": BLOCK | {"block"},
    "machine": MACHINE,
    "snapshots": SNAPSHOTS,
    "monitor": MONITOR,
    "client": {"errors", "monitor.addresses"},
    "cli": WIRE,
    "cli.image": WIRE | {"block"},
    "cli.image_compare": WIRE | {"block"},
    "cli.image_convert": WIRE | {"block"},
    "cli.image_create": WIRE | {"block"},
    "cli.image_map": WIRE | {"block"},
    "cli.image_open": WIRE | {"block"},
    "cli.image_recover": WIRE | {"block", "snapshots.recovery", "snapshots.selection"},
    "cli.image_resize": WIRE | {"block"},
    "cli.image_serve": WIRE | {"block", "events", "sockets"},
    "cli.image_snapshot": WIRE | {"block", "snapshots.group", "snapshots.selection"},
    "cli.demo": WIRE | {"block.create"},
    "cli.doctor": WIRE | {"machine.engines.qemu.huge_pages"},
    "cli.drop_in": WIRE | {"block", "machine.catalogue", "monitor.wire"},
    "cli.drop_in_options": WIRE | {"machine.catalogue"},
    "cli.run": WIRE | {"block", "machine", "monitor"},
    "cli.serve": WIRE | MONITOR | {"monitor"},
    "cli.run_options": WIRE,
    "cli.run_qemu": WIRE | {"block", "machine", "monitor.addresses"},
    "cli.terminal": WIRE | {"machine.console"},
    "testing": set(),
    "__init__": {"client"},
    "__main__": {"cli.main"},
}
"""Room, or module where it may more than its room: the rooms and modules it may import; always its own room, too."""

MODULES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """What a module imports of ours, without the first name: at its top, in functions and for types alike."""
    found: set[str] = set()
    for item in ast.walk(ast.parse(path.read_text())):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        elif isinstance(item, ast.ImportFrom):
            assert not item.level, f"{path}: a relative import hides where its arrow points"
            names = {alias.name for alias in item.names}
            found |= (
                {f"stillframe.{name}" for name in names}
                if item.module == "stillframe"
                else {item.module or ""}
            )
    return {name.removeprefix("stillframe.") for name in found if name.startswith("stillframe.")}


def within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def refused_imports(module: str, imports: set[str]) -> set[str]:
    room = module.split(".")[0]
    allowed = MAY_IMPORT.get(module, MAY_IMPORT.get(room))
    assert allowed is not None, f"nothing says what {room} may import; docs/architecture.md draws the house"
    return {name for name in imports if not any(within(name, place) for place in allowed | {room})}


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_point_down_the_house(path: Path) -> None:
    assert refused_imports(module_of(path), imports_of(path)) == set()


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("block.file", "import stillframe.jobs"),
        ("block.file", "from stillframe import machine"),
        ("jobs", "def late():\n    from stillframe.block.node import Node"),
        ("machine.machine", "if TYPE_CHECKING:\n    from stillframe.snapshots.save import save"),
        ("client", "from stillframe.monitor.session import Session"),
        ("cli.save", "from stillframe.machine.machine import Machine"),
        ("cli.image", "from stillframe.machine.machine import Machine"),
        ("cli.demo", "from stillframe.block.graph import BlockGraph"),
    ],
)
def test_an_import_that_points_up_is_seen_wherever_it_stands(module: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(code)
    assert refused_imports(module, imports_of(path))


def test_the_arrows_of_the_house_make_no_circle() -> None:
    rooms = {
        name: {each.split(".")[0] for each in MAY_IMPORT[name]} for name in MAY_IMPORT if "." not in name
    }
    while rooms:
        free = {name for name, below in rooms.items() if not below & rooms.keys() - {name}}
        assert free, f"circle: {sorted(rooms)}"
        rooms = {name: below for name, below in rooms.items() if name not in free}


def test_no_module_needs_another_that_needs_it() -> None:
    """As modules are loaded: what is imported inside functions and for types alone is not."""
    needs: dict[str, set[str]] = {}
    for path in MODULES:
        top = ast.parse(path.read_text()).body
        names = {item.module for item in top if isinstance(item, ast.ImportFrom) and item.module}
        names |= {alias.name for item in top if isinstance(item, ast.Import) for alias in item.names}
        needs[f"stillframe.{module_of(path)}"] = names
    while needs:
        free = {name for name, below in needs.items() if not below & needs.keys() - {name}}
        assert free, f"circle: {sorted(needs)}"
        needs = {name: below for name, below in needs.items() if name not in free}


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_every_room_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 550
    if path.name != "__init__.py" or path.stat().st_size:
        assert ast.get_docstring(ast.parse(path.read_text())), (
            "a module says in its first line what it is for"
        )


GPL_COMPATIBLE = re.compile(
    r"MIT|BSD|PSF|Python Software Foundation|LGPL|GPL-?2|GPLv2|GNU General Public License v2|0BSD|Zlib|public domain|CC0|unlicense",
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
