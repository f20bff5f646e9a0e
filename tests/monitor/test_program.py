"""What the program says that it has, beside what the real `qemu-system-riscv64` says of the same things: never more than QEMU
has, and never by another name.
"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from peers import peer
from stillframe.testing import Machine

Answers = dict[str, dict[str, Any]]

# Known, so that libvirt survives; abstract, since there is none of them here.
NOT_HERE = "memory-backend-file"


@pytest.fixture(scope="module")
def ours() -> Iterator[Machine]:
    with Machine([sys.executable, "-m", "stillframe.cli.drop_in"], "-machine", "none") as machine:
        yield machine


@pytest.fixture(scope="module")
def theirs() -> Iterator[Machine]:
    with Machine([peer("qemu-system-riscv64", "10.0")], "-machine", "none") as machine:
        yield machine


def by_name(entries: list[dict[str, Any]], key: str = "name") -> Answers:
    return {entry[key]: entry for entry in entries}


@pytest.mark.parametrize(
    "wanted", [{}, {"abstract": True}, {"implements": "virtio-device"}, {"implements": "x"}]
)
def test_our_types_are_types_of_qemus_with_the_same_parents(
    ours: Machine, theirs: Machine, wanted: dict[str, Any]
) -> None:
    mine = by_name(ours.execute("qom-list-types", **wanted))
    mine.pop(NOT_HERE, None)
    real = by_name(theirs.execute("qom-list-types", **wanted))
    assert mine == {name: real.get(name) for name in mine}
    assert bool(mine) == bool(real)


@pytest.mark.parametrize("query", ["device-list-properties", "qom-list-properties"])
def test_what_can_be_set_is_called_as_qemu_calls_it_and_what_is_not_there_is_refused_alike(
    ours: Machine, theirs: Machine, query: str
) -> None:
    kinds = by_name(ours.execute("qom-list-types", abstract=True))
    for name in [*kinds, "nosuch"]:
        mine, real = (each.execute(query, typename=name) for each in (ours, theirs))
        if isinstance(mine, dict) or isinstance(real, dict):
            assert mine == real, name
            continue
        known = by_name(real)
        assert mine == [known.get(each["name"]) for each in mine], name


def test_a_manager_finds_the_board_virt_with_one_processor_and_no_kvm(ours: Machine, theirs: Machine) -> None:
    mine, real = (by_name(each.execute("query-machines")) for each in (ours, theirs))
    assert mine.keys() == {"virt", "none"}
    assert mine["virt"]["cpu-max"] == 1
    assert mine["virt"]["default-cpu-type"] == real["virt"]["default-cpu-type"]
    assert mine["none"].items() <= real["none"].items()
    for query in ("query-target", "query-kvm"):
        assert ours.execute(query) == theirs.execute(query)


def test_the_command_lines_parameters_are_qemus_by_name_and_type(ours: Machine, theirs: Machine) -> None:
    query = "query-command-line-options"
    mine, real = (by_name(each.execute(query), "option") for each in (ours, theirs))
    assert {"machine", "chardev", "drive", "mon"} <= mine.keys()
    for option, entry in mine.items():
        known = by_name(real[option]["parameters"])
        for parameter in entry["parameters"]:
            assert known[parameter["name"]]["type"] == parameter["type"], option
        assert ours.execute(query, option=option) == [entry]
    assert ours.execute(query, option="nosuch") == theirs.execute(query, option="nosuch")
