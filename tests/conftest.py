"""Shared by all tests: which QEMU a test is held against (see peers.py), and nothing of one family of tests alone."""

import shutil
import signal
from collections.abc import Iterator
from zlib import crc32

import pytest

from peers import QEMU_VERSIONS, installed_versions, using

pytest_plugins = ["stillframe.testing.plugin"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in what a shell starts in the background. Programs that tests start and interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=QEMU_VERSIONS)
def every_qemu(request: pytest.FixtureRequest) -> str:
    """Runs a test once with every QEMU; `peer` gives that one's programs."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_qemu(request: pytest.FixtureRequest) -> Iterator[None]:
    """The QEMU that `peer` means: the test's parameter, else one that its name decides, the same in every run."""
    case = getattr(request.node, "callspec", None)
    given = {case.params.get("every_qemu"), case.params.get("version")} if case else set()
    chosen = [version for version in QEMU_VERSIONS if version in given]
    if not chosen:
        choice = installed_versions()
        # Not the node's id: pytest-xdist adds to it.
        chosen = [choice[crc32(f"{request.path.name} {request.node.name}".encode()) % len(choice)]]
    with using(chosen[0]):
        yield


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that passes keeps no directories: they are more than ten gigabytes, and a day's runs filled the host.

    Not those of each test at its end, as pytest can do: another file would have the inode of one that a test has abandoned without
    closing it, and would wait for its record of unflushed writes.
    """
    factory = getattr(session.config, "_tmp_path_factory", None)
    if (
        exitstatus == pytest.ExitCode.OK
        and factory is not None
        and not hasattr(session.config, "workerinput")
    ):
        kept = session.config.getoption("basetemp") or factory._basetemp
        if kept is not None:
            shutil.rmtree(kept, ignore_errors=True)
