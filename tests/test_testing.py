"""The examples of docs/testing.md run as they stand, and the plugin runs tests for each program."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from peers import peer
from stillframe.testing import Machine, NoAnswer
from stillframe.testing.plugin import OURS

EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "testing.md").read_text(), re.DOTALL
)


def test_the_examples_run_with_every_program(tmp_path: Path) -> None:
    tests = [each for each in EXAMPLES if "start_machine" in each]
    plain = [each for each in EXAMPLES if "start_machine" not in each]
    assert tests
    assert len(plain) == 3
    for example in plain:
        exec(example.replace('["stillframe-qemu"]', repr(OURS.split())), {})
    (tmp_path / "test_example.py").write_text("\n".join(tests))
    words = ["-q", "-p", "no:cacheprovider", "--qemu", peer("qemu-system-x86_64"), str(tmp_path)]
    plugin = ["-p", "stillframe.testing.plugin"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "2 passed" in run.stdout, run.stdout + run.stderr


def test_what_does_not_come_says_what_came() -> None:
    with Machine(OURS.split(), "-machine", "none") as machine:
        machine.execute("stop")
        machine.patience = 0.5
        with pytest.raises(NoAnswer, match=r"'RESUME'.* did not come.*STOP"):
            machine.event("RESUME")
        with pytest.raises(NoAnswer, match="RESUME was to come, and STOP came"):
            machine.events("RESUME")
