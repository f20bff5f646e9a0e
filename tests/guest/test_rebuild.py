"""The guest that is shipped is the guest whose source is here."""

import re
import shutil
import subprocess
from pathlib import Path

from guest.consoles import GUEST
from peers import ROOT, missing


def toolchain() -> dict[str, str]:
    """The settings in guest/TOOLCHAIN."""
    text = (ROOT / "guest" / "TOOLCHAIN").read_text().replace("\\\n", "")
    return dict(re.findall(r"^(\w+) := (.*)$", text, re.MULTILINE))


def first_line(program: str) -> str:
    return subprocess.run(
        [program, "--version"], stdout=subprocess.PIPE, check=True, text=True
    ).stdout.splitlines()[0]


def test_the_named_compiler_makes_the_shipped_bytes_in_any_folder(tmp_path: Path) -> None:
    named = toolchain()
    install = f"apt-get install {named['PACKAGES']}"
    for tool, version in (("CC", "CC_VERSION"), ("LD", "LD_VERSION")):
        if shutil.which(named[tool]) is None:
            missing(named[tool], install)
        if first_line(named[tool]) != named[version]:
            missing(f"{named[tool]} of the version in guest/TOOLCHAIN", install)
    elsewhere = tmp_path / "a clone of ours" / "guest"
    shutil.copytree(ROOT / "guest", elsewhere)
    words = ["make", "--silent", "-C", str(elsewhere), "OUT=../guest.elf", "BUILD=../objects"]
    subprocess.run(words, check=True)
    assert (elsewhere.parent / "guest.elf").read_bytes() == GUEST.read_bytes()


def test_the_shipped_guest_is_small_and_stripped() -> None:
    elf = GUEST.read_bytes()
    assert elf.startswith(b"\x7fELF\x02\x01\x01")
    assert len(elf) < 64 << 10
    assert b".symtab" not in elf
    assert str(ROOT).encode() not in elf
