"""Packages of a Debian suite and architecture other than the host's, fetched and unpacked beside it, without root.

apt does the work, with all its state in a directory of ours. The mirror is the one that the host's own apt is configured
for: the source whose path ends in `debian`. Used by scripts/debian-guest and scripts/debian-qemu.

Each set of packages is on record in debian-packages.json, by path on the mirror and SHA-256: what the tests were run with, and what
a mirror has even while its lists are being renewed. Where it has them no more, the newest of the suite are taken. `--newest` puts
those on record.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

SUITE = "trixie"
RECORD = Path(__file__).resolve().parent / "debian-packages.json"
_HELPER = "/usr/lib/apt/apt-helper"
_PAUSES = (5, 25)
"""Seconds before a fetch is tried again."""
ROOT = Path(__file__).resolve().parent.parent


class Failure(Exception):
    """What could not be done, in one sentence for the person who ran the script."""


def say(text: str) -> None:
    """Progress, on the error output: the output proper is for programs."""
    print(text, file=sys.stderr, flush=True)


def run(*words: str | Path, doing: str, **more: str) -> str:
    """A program's output; the end of its error output is part of the failure, and what apt did not get."""
    try:
        done = subprocess.run(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C", **more},
            check=False,
        )
    except FileNotFoundError:
        raise Failure(f"{doing} needs the program {words[0]}, which is not installed") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        missing = [line for line in lines if line.startswith("E: Failed to fetch")]
        last = (missing[:1] + lines[-1:]) or [f"exit status {done.returncode}"]
        raise Failure(f"{doing} failed: {last[0]}")
    return done.stdout


def recipe(*parts: str | bytes | Path) -> str:
    """A name for what is made from these; a path stands for the bytes of its file."""
    digest = hashlib.sha256()
    for part in parts:
        data = (
            part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        )
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only one at work in `directory`, which is made; others wait. Ctrl-C ends the wait."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run in {directory}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for half_made in directory.glob(".*-*"):
            shutil.rmtree(half_made, ignore_errors=True)
        yield


def made(target: Path, name: str, build: Callable[[Path], None]) -> Path:
    """`target` as `build` makes it, unless it is there already under the same `name`; whole or not at all.

    :param name: from `recipe`; kept in the file `recipe` in the directory.
    """
    stamp = target / "recipe"
    if stamp.is_file() and stamp.read_text() == name:
        return target
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        build(fresh)
        (fresh / "recipe").write_text(name)
        if target.exists():
            target.rename(Path(scratch) / "old")
        fresh.rename(target)
    return target


def _mirror() -> tuple[str, str]:
    """The host's Debian mirror, and the options of a source line that trusts it as the host does."""
    listed = run(
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI)\t$(SIGNED_BY)",
        "Created-By: Packages",
        doing="Reading the host's apt configuration",
    )
    for line in listed.splitlines():
        uri, _, signed_by = line.partition("\t")
        if uri.rstrip("/").rsplit("/", 1)[-1] == "debian":
            return uri, f"[signed-by={signed_by}] " if signed_by.startswith("/") else ""
    raise Failure(
        "The host's apt knows no source whose path ends in `debian`, so there is no Debian mirror to fetch from"
    )


class Packages:
    """The packages of one architecture of the suite.

    :param directory: for apt's lists and the downloads.
    :param architecture: Debian's name of it, as "riscv64".
    """

    def __init__(self, directory: Path, architecture: str) -> None:
        self._directory = directory
        self.architecture = architecture
        self._updated = False

    def _apt(self, program: str, *words: str, doing: str, where: Path | None = None) -> str:
        base = self._directory
        for name in ("lists/partial", "archives/partial", "etc"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "status").touch()
        options = {
            "APT::Architecture": self.architecture,
            "APT::Architectures": self.architecture,
            "APT::Sandbox::User": "root",
            "APT::Get::List-Cleanup": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Dir::State": str(base),
            "Dir::State::Lists": str(base / "lists"),
            "Dir::State::status": str(base / "status"),
            "Dir::Cache": str(base),
            "Dir::Cache::archives": str(base / "archives"),
            "Dir::Etc::SourceList": str(base / "etc" / "sources.list"),
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
        }
        flags = [flag for key, value in options.items() for flag in ("-o", f"{key}={value}")]
        return run(program, "-q", *flags, *words, doing=doing)

    def _fetch(self, *words: str, doing: str) -> None:
        """`apt-get`, for what comes over the network: a mirror that is away for half a minute fails nothing."""
        for pause in (*_PAUSES, None):
            try:
                self._apt("apt-get", *words, doing=doing)
                return
            except Failure as failure:
                if pause is None:
                    raise
                say(f"{failure}; once more in {pause} seconds")
                time.sleep(pause)

    def update(self) -> None:
        """Fetch the suite's list of packages, once a run."""
        if self._updated:
            return
        uri, options = _mirror()
        (self._directory / "etc").mkdir(parents=True, exist_ok=True)
        (self._directory / "etc" / "sources.list").write_text(f"deb {options}{uri} {SUITE} main\n")
        say(f"fetching the package lists of {SUITE} {self.architecture}")
        self._fetch("update", "--error-on=any", doing=f"Fetching the package lists of {SUITE}")
        self._updated = True

    def depends(self, package: str) -> list[str]:
        """The packages that `package` depends on itself, the first of each choice."""
        self.update()
        text = self._apt("apt-cache", "depends", "--no-recommends", package, doing=f"Looking up {package}")
        kinds = ("Depends: ", "PreDepends: ")
        return [
            line.split(": ", 1)[1] for line in map(str.strip, text.splitlines()) if line.startswith(kinds)
        ]

    def closure(self, *packages: str) -> list[str]:
        """The packages and all that they need on an empty system, without recommendations."""
        self.update()
        text = self._apt(
            "apt-get",
            "install",
            "--simulate",
            "--no-install-recommends",
            *packages,
            doing=f"Resolving what {', '.join(packages)} needs",
        )
        return sorted({line.split()[1] for line in text.splitlines() if line.startswith("Inst ")})

    def record(self, name: str, find: Callable[[], Iterable[str]]) -> None:
        """Put the suite's newest packages of a set on record. :param find: which these are, by the suite's lists."""
        packages = sorted(find())
        self.update()
        listed = self._apt("apt-get", "download", "--print-uris", *packages, doing="Listing packages")
        uri, _ = _mirror()
        found = re.findall(r"^'(\S+)' \S+ \d+ SHA256:(\w+)$", listed, re.MULTILINE)
        if len(found) != len(packages):
            raise Failure(f"{SUITE} has not all of {', '.join(packages)}")
        files = {where.removeprefix(uri): digest for where, digest in found}
        RECORD.write_text(json.dumps({**_record(), name: files}, indent=1, sort_keys=True) + "\n")

    def unpack(self, name: str, find: Callable[[], Iterable[str]], into: Path) -> dict[str, str]:
        """Download a set of packages and unpack them over each other.

        :param name: the set's, on record. :param find: which these are, by the suite's lists.
        :return: the version of each.
        """
        versions: dict[str, str] = {}
        with tempfile.TemporaryDirectory(dir=self._directory.parent, prefix=".download-") as scratch:
            if not self._download_recorded(name, Path(scratch)):
                self._download(sorted(find()), Path(scratch))
            for archive in sorted(Path(scratch).glob("*.deb")):
                fields = run("dpkg-deb", "--show", archive, doing=f"Reading {archive.name}").split()
                versions[fields[0]] = fields[1]
                run("dpkg-deb", "--extract", archive, into, doing=f"Unpacking {archive.name}")
        return versions

    def _download_recorded(self, name: str, into: Path) -> bool:
        """Whether the mirror has all that is on record."""
        files = recorded(name)
        if not files or not Path(_HELPER).exists():
            return False
        say(f"downloading {len(files)} packages of {SUITE} {self.architecture}")
        uri, _ = _mirror()
        words = [
            word
            for path, digest in files.items()
            for word in (f"{uri}{path}", into / Path(path).name, f"SHA256:{digest}")
        ]
        try:
            options = ("-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3")
            run(_HELPER, *options, "download-file", *words, doing="Downloading packages")
        except Failure as failure:
            say(f"{failure}; looking for newer ones")
            for path in into.iterdir():
                path.unlink()
            return False
        return True

    def _download(self, packages: Sequence[str], into: Path) -> None:
        self.update()
        say(f"downloading {len(packages)} packages of {SUITE} {self.architecture}, the newest")
        here = os.getcwd()
        os.chdir(into)
        try:
            self._fetch("download", *packages, doing=f"Downloading packages of {SUITE}")
        finally:
            os.chdir(here)


def recorded(name: str) -> dict[str, str]:
    """A set on record: path on the mirror and SHA-256 of each package; empty where there is none."""
    return _record().get(name, {})


def _record() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return found


def main(work: Callable[[], None]) -> None:
    """Run a script: one sentence and status 1 where it fails, 130 on Ctrl-C."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            say(f"error: this needs Debian's {tool}, which is not installed here")
            sys.exit(1)
    try:
        work()
    except Failure as failure:
        say(f"error: {failure}")
        sys.exit(1)
    except OSError as error:
        say(f"error: {error.filename or 'the cache'}: {error.strerror}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; nothing half-made was left")
        sys.exit(130)
