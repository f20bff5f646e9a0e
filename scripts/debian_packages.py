"""Packages of a Debian suite and architecture other than the host's, fetched and unpacked beside it, without root.

`apt-get` does the work, with all its state in a directory of ours. The mirror is the one that the host's own apt is configured
for: the source whose path ends in `debian`. Used by scripts/debian-guest and scripts/debian-qemu.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SUITE = "trixie"
ROOT = Path(__file__).resolve().parent.parent


class Failure(Exception):
    """What could not be done, in one sentence for the person who ran the script."""


def say(text: str) -> None:
    """Progress, on the error output: the output proper is for programs."""
    print(text, file=sys.stderr, flush=True)


def run(*words: str | Path, doing: str, **more: str) -> str:
    """A program's output; the end of its error output is part of the failure."""
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
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [
            f"exit status {done.returncode}"
        ]
        raise Failure(f"{doing} failed: {last[0].strip()}")
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

    def update(self) -> None:
        """Fetch the suite's list of packages, once a run."""
        if self._updated:
            return
        uri, options = _mirror()
        (self._directory / "etc").mkdir(parents=True, exist_ok=True)
        (self._directory / "etc" / "sources.list").write_text(f"deb {options}{uri} {SUITE} main\n")
        say(f"fetching the package lists of {SUITE} {self.architecture}")
        self._apt("apt-get", "update", "--error-on=any", doing=f"Fetching the package lists of {SUITE}")
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

    def unpack(self, packages: Iterable[str], into: Path) -> dict[str, str]:
        """Download packages and unpack them over each other.

        :return: the version of each.
        """
        self.update()
        names = sorted(packages)
        versions: dict[str, str] = {}
        say(f"downloading {len(names)} packages of {SUITE} {self.architecture}")
        with tempfile.TemporaryDirectory(dir=self._directory.parent, prefix=".download-") as scratch:
            here = os.getcwd()
            os.chdir(scratch)
            try:
                self._apt("apt-get", "download", *names, doing=f"Downloading packages of {SUITE}")
            finally:
                os.chdir(here)
            for archive in sorted(Path(scratch).glob("*.deb")):
                fields = run("dpkg-deb", "--show", archive, doing=f"Reading {archive.name}").split()
                versions[fields[0]] = fields[1]
                run("dpkg-deb", "--extract", archive, into, doing=f"Unpacking {archive.name}")
        return versions


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
