"""What the README says to type, typed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def commands(text: str) -> str:
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    programs, runtime = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    runtime.mkdir(mode=0o700)
    for name, module in (("stillframe", "stillframe"), ("stillframe-qemu", "stillframe.cli.drop_in")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(runtime)}


def shell(script: str, where: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-e", "-x", "-c", script],
        cwd=where,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands_of_the_readme_do_what_it_says(tmp_path: Path, environment: dict[str, str]) -> None:
    use = section("Use").split("From Python:")[0]
    output = shell(commands(use), tmp_path, environment)
    assert re.search(r"Saved 'before-upgrade' on root, .+ in ", output)
    assert "Loaded 'before-upgrade'" in output
    assert "Deleted 'before-upgrade'" in output


def test_the_python_of_the_readme_does_what_it_says(tmp_path: Path, environment: dict[str, str]) -> None:
    code = README.split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "example.py").write_text(code)
    start, _, _ = commands(section("Use").split("From Python:")[0]).partition("stillframe save")
    script = f"{start}\n{sys.executable} example.py\nstillframe list box\nstillframe quit box"
    output = shell(script, tmp_path, environment)
    assert "running" in output
    assert "before-upgrade" in output


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    named = re.findall(r"^    make (\w+)", section("Two commands"), re.MULTILINE)
    makefile = (Path(__file__).resolve().parent.parent / "Makefile").read_text()
    assert named == ["demo", "test"]
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
