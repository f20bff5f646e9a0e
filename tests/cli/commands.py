"""The command line as a user runs it: a process."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillframe.cli.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


def stillframe(
    *arguments: str | Path, cwd: Path | None = None, preexec: Callable[[], None] | None = None
) -> Outcome:
    """Run `stillframe` to its end."""
    run = subprocess.run(
        [sys.executable, "-m", "stillframe", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        preexec_fn=preexec,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        timeout=60,
    )
    return Outcome(run.returncode, run.stdout, run.stderr)


def in_process(*arguments: str | Path) -> Outcome:
    """The same without a process of its own, ten times as fast, for the many ways to be wrong."""
    stdout, stderr = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["stillframe", *map(str, arguments)]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    return Outcome(int(str(ended.value.code)), stdout.getvalue(), stderr.getvalue())


def assert_one_sentence(outcome: Outcome, *names: str, code: int = 1) -> None:
    """A refusal as it should be: what, and what to do; no traceback, nothing on standard output."""
    assert outcome.code == code, outcome
    assert outcome.stdout == ""
    first, *rest = outcome.stderr.splitlines()
    assert first.startswith("stillframe: ")
    assert len(rest) <= 2
    assert all(line.startswith("  ") for line in rest)
    for name in names:
        assert name in outcome.stderr, (name, outcome.stderr)
