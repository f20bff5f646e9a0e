"""The pytest plugin: `--qemu PROGRAM`, and fixtures that start machines with it."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from stillframe.testing.machine import Machine

OURS = shlex.join([sys.executable, "-m", "stillframe.cli.drop_in"])
"""The command that starts a machine of ours."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which machines are tested."""
    parser.addoption(
        "--qemu",
        action="append",
        default=[],
        metavar="PROGRAM",
        help="test snapshots with this program, too (repeatable); stillframe-qemu always",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of `qemu_program` once for each program, where the fixture is not replaced by one of the tests' own."""
    replaced = metafunc._arg2fixturedefs.get("qemu_program", ())
    if "qemu_program" in metafunc.fixturenames and len(replaced) == 1:
        metafunc.parametrize("qemu_program", [OURS, *metafunc.config.getoption("--qemu")], indirect=True)


@pytest.fixture
def qemu_program(request: pytest.FixtureRequest) -> str:
    """The command that starts the machine under test."""
    return str(request.param)


@pytest.fixture
def start_machine(qemu_program: str) -> Iterator[Callable[..., Machine]]:
    """Starts a machine of the program under test, as `Machine` does; all end with the test."""
    with ExitStack() as stack:
        yield lambda *words, **options: stack.enter_context(
            Machine(shlex.split(qemu_program), *words, **options)
        )
