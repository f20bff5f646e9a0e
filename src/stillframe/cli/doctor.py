"""`stillframe doctor`: what this host can do, and what to do about what it cannot.

Every check tries the thing itself where that is possible (opens the device, takes the lock, punches the hole) instead of reading a
version number. A check never changes the host.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

Verdict = Literal["ok", "limited", "missing"]

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_UFFD_API_IOCTL = 0xC018AA3F
_UFFD_API = 0xAA
_UFFD_USER_MODE_ONLY = 1
_USERFAULTFD_IOC_NEW = 0xAA00
_UFFD_FEATURE_WP_ASYNC = 1 << 15


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    :param needed_for: what a user loses where the verdict is not "ok".
    :param remedy: what to do about it; empty where there is nothing to do.
    """

    name: str
    verdict: Verdict
    detail: str
    needed_for: str
    remedy: str = ""


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding(
        "python",
        "ok" if good else "missing",
        platform.python_version(),
        "everything",
        "" if good else "Install Python 3.11 or newer.",
    )


def _engine() -> Finding:
    needs = "--engine unicorn: running riscv64 guests in this process"
    try:
        import unicorn  # noqa: F401
    except (ImportError, OSError) as error:
        return Finding(
            "engine unicorn", "missing", str(error), needs, "Install it: pip install unicorn==2.1.4"
        )
    from importlib.metadata import version

    return Finding("engine unicorn", "ok", f"version {version('unicorn')}", needs)


def _qemu() -> Finding:
    needs = "comparing with a real QEMU; controlling one with `--qmp ADDRESS` needs none here"
    found = [name for name in ("qemu-system-x86_64", "qemu-system-riscv64", "qemu-img") if shutil.which(name)]
    if not found:
        return Finding(
            "qemu",
            "missing",
            "no qemu-system-* or qemu-img in PATH",
            needs,
            "On Debian: apt-get install qemu-utils qemu-system-x86 qemu-system-misc",
        )
    run = subprocess.run(
        [found[0], "--version"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    words = run.stdout.splitlines()[0] if run.stdout else "no version told"
    return Finding("qemu", "ok", f"{', '.join(found)}; {words}", needs)


def _qemu_engine(program: str) -> Finding:
    """What `run --engine qemu` would find."""
    from stillframe.cli.doctor_qemu import ask_qemu

    needs = "--engine qemu: saving while the guest runs, loads whose memory comes on demand"
    try:
        found = ask_qemu(program)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return Finding(
            "engine qemu", "missing", f"{program}: {why}", needs, "Name a QEMU, 7.2 or newer: --qemu PROGRAM"
        )
    words = f"{program} {found.version}"
    if tuple(map(int, found.version.split("."))) < (7, 2):
        return Finding("engine qemu", "missing", words, needs, "Install QEMU 7.2 or newer.")
    lacks = []
    if found.no_tracking:
        lacks.append(
            f"memory is sent before the pause, and what changes meanwhile in it ({found.no_tracking})"
        )
    if found.no_fetching:
        lacks.append(f"loads read all of the memory first ({found.no_fetching})")
    if lacks:
        return Finding(
            "engine qemu",
            "limited",
            f"{words}; {'; '.join(lacks)}",
            needs,
            "Let QEMU's user have userfaultfd: open /dev/userfaultfd to it, or as root: sysctl vm.unprivileged_userfaultfd=1",
        )
    return Finding("engine qemu", "ok", f"{words}; tracks what a guest writes, fetches missing pages", needs)


def _kvm() -> Finding:
    needs = "speed of guests of this host's own architecture under QEMU; the unicorn engine does not use it"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = "Join the group of /dev/kvm: adduser $USER kvm" if error.errno == errno.EACCES else ""
        return Finding("kvm", "missing", f"/dev/kvm: {os.strerror(error.errno or 0)}", needs, remedy)
    return Finding("kvm", "ok", "/dev/kvm can be opened", needs)


@contextmanager
def _sleeping_child() -> Iterator[int]:
    """The number of a process with our memory as it is now, which ends with the block."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        yield pid
    finally:
        os.close(writer)
        os.waitpid(pid, 0)


def _live_save() -> Finding:
    """A sleeping child, read as a save reads the one that keeps its memory."""
    needs = "saving while the guest runs; else it stands still while its memory is copied"
    libc = ctypes.CDLL(None, use_errno=True)
    here, there = ctypes.create_string_buffer(b"before", 6), ctypes.create_string_buffer(6)
    with _sleeping_child() as pid:
        here.raw = b"after "
        ranges = [(ctypes.c_void_p * 2)(ctypes.addressof(each), 6) for each in (there, here)]
        count = libc.process_vm_readv(pid, ranges[0], 1, ranges[1], 1, 0)
        why = os.strerror(ctypes.get_errno())
    if count != 6 or there.raw != b"before":
        return Finding(
            "live save",
            "limited",
            f"a child's memory cannot be read: {why}",
            needs,
            "Allow process_vm_readv.",
        )
    return Finding("live save", "ok", "a forked child keeps the memory of the instant", needs)


def _userfaultfd() -> Finding:
    needs = (
        "knowing which pages changed since the last snapshot, else all are hashed at each save; loads whose memory "
        "comes on demand, else it is read before the guest goes on"
    )
    how, fd = _open_userfaultfd()
    if fd is None:
        return Finding("userfaultfd", "missing", how, needs, "As root: sysctl vm.unprivileged_userfaultfd=1")
    try:
        answer = bytearray(struct.pack("=QQQ", _UFFD_API, 0, 0))
        fcntl.ioctl(fd, _UFFD_API_IOCTL, answer)
        features = struct.unpack("=QQQ", answer)[1]
    except OSError as error:
        return Finding("userfaultfd", "missing", f"{how}, then {error.strerror}", needs)
    finally:
        os.close(fd)
    if not features & _UFFD_FEATURE_WP_ASYNC:
        return Finding(
            "userfaultfd", "limited", f"{how}; no asynchronous tracking", needs, "Use Linux 6.7 or newer."
        )
    return Finding("userfaultfd", "ok", f"{how}; pages on demand, changes tracked", needs)


def _huge_pages() -> Finding:
    """A child's memory, put together as a QEMU's is before a save."""
    from stillframe.machine.engines.qemu.huge_pages import fold_other

    needs = "the shortest pause of a save with --engine qemu; else it grows with the guest's memory"
    remedy = why = ""
    try:
        with mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            # Small pages, in a range that is to have huge ones.
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            for at in range(0, len(memory), mmap.PAGESIZE):
                memory[at] = 1
            memory.madvise(mmap.MADV_HUGEPAGE)
            with _sleeping_child() as pid:
                fold_other(pid, lambda: None)
                if not _in_huge_pages(pid):
                    why = "the kernel gives none"
    except OSError as error:
        why = os.strerror(error.errno or 0)
        if error.errno == errno.EPERM:
            remedy = "Run it as root, or with the capability CAP_SYS_NICE."
        elif error.errno == errno.ENOTTY:
            remedy = "Use Linux 6.7 or newer."
    if why:
        return Finding("huge pages", "limited", f"a QEMU's memory stays in small ones: {why}", needs, remedy)
    return Finding("huge pages", "ok", "a QEMU's memory is put into them before a save", needs)


def _in_huge_pages(pid: int) -> bool:
    """Whether some of its memory is."""
    found = Path(f"/proc/{pid}/smaps_rollup").read_text().partition("AnonHugePages:")[2].split()
    return bool(found) and found[0] != "0"


def _open_userfaultfd() -> tuple[str, int | None]:
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            return "/dev/userfaultfd", fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(device)
    except OSError as error:
        why = f"/dev/userfaultfd: {os.strerror(error.errno or 0)}"
    number = _SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        return why, None
    libc = ctypes.CDLL(None, use_errno=True)
    for flags, words in ((0, "system call"), (_UFFD_USER_MODE_ONLY, "system call, user mode only")):
        fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | flags)
        if fd >= 0:
            return words, fd
    return why, None


def _file_system() -> Finding:
    needs = "images in the current directory: locks against two users, space given back"
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(bytes(65536))
            file.flush()
            locks = _has_ofd_locks(file.fileno())
            holes = _can_punch(file.fileno())
    except OSError as error:
        return Finding(
            "file system",
            "missing",
            f"cannot write to {Path.cwd()}: {error.strerror}",
            needs,
            "Change to a directory that you may write to.",
        )
    lacks = [word for word, has in (("locks", locks), ("hole punching", holes)) if not has]
    if lacks:
        return Finding(
            "file system", "limited", f"no {' and no '.join(lacks)}", needs, "Keep images on a local disk."
        )
    return Finding("file system", "ok", "locks and hole punching work", needs)


def _has_ofd_locks(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack("@hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))
    except OSError:
        return False
    return True


def _can_punch(fd: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    return bool(libc.fallocate(fd, 3, 0, 4096) == 0)


def _sockets() -> Finding:
    needs = "`run --name`: where a machine's monitor is found by its name"
    directory = os.environ.get("XDG_RUNTIME_DIR")
    if not directory:
        return Finding(
            "socket directory",
            "limited",
            "XDG_RUNTIME_DIR is not set; a private directory under the temporary one is used",
            needs,
            "Log in through a session that sets it, or give `--qmp unix:PATH`.",
        )
    try:
        owner = os.stat(directory).st_uid
    except OSError as error:
        return Finding(
            "socket directory", "missing", f"{directory}: {error.strerror}", needs, "Unset XDG_RUNTIME_DIR."
        )
    if owner != os.getuid():
        return Finding(
            "socket directory",
            "missing",
            f"{directory} belongs to user {owner}",
            needs,
            "Unset XDG_RUNTIME_DIR.",
        )
    return Finding("socket directory", "ok", directory, needs)


def _shared_memory() -> Finding:
    needs = "writes that a guest has not flushed, if the process that writes its image is killed"
    directory = Path(f"/dev/shm/stillframe-{os.geteuid()}")
    problem = ""
    try:
        if directory.is_symlink() or directory.exists():
            about = directory.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
                problem = f"{directory} is not a directory of this user's alone"
        elif not os.access("/dev/shm", os.W_OK):
            problem = "/dev/shm cannot be written to"
        if not problem and shutil.disk_usage("/dev/shm").free < 4 << 20:
            problem = "/dev/shm is full"
    except OSError as error:
        problem = f"/dev/shm: {error.strerror}"
    if problem:
        return Finding("shared memory", "limited", problem, needs, "Make room in /dev/shm for this user.")
    return Finding("shared memory", "ok", "/dev/shm", needs)


def _memory() -> Finding:
    needs = "guests' memory, and as much again while a snapshot is loaded"
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) << 10
    gib = available / (1 << 30)
    verdict: Verdict = "ok" if available >= 1 << 30 else "limited"
    return Finding(
        "memory",
        verdict,
        f"{gib:.1f} GiB available",
        needs,
        "" if verdict == "ok" else "Close something, or use small guests.",
    )


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _engine,
    _memory,
    _shared_memory,
    _file_system,
    _sockets,
    _live_save,
    _userfaultfd,
    _huge_pages,
    _kvm,
    _qemu,
)


@click.command(
    epilog="""\b
EXAMPLES
  stillframe doctor
  stillframe doctor --json
  stillframe doctor --qemu /opt/qemu/bin/qemu-system-aarch64

\b
EXIT CODES
  0  guests can be run and snapshotted here
  1  something that is needed for that is missing"""
)
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of findings.")
@click.option(
    "--qemu",
    default="qemu-system-x86_64",
    show_default=True,
    metavar="PROGRAM",
    help="The QEMU to ask for what `run --engine qemu` would do.",
)
def doctor(as_json: bool, qemu: str) -> None:
    """What this host can do, and what to do about what it cannot."""
    findings = [*(check() for check in CHECKS), _qemu_engine(qemu)]
    if as_json:
        import json

        click.echo(json.dumps([asdict(finding) for finding in findings], indent=4))
    else:
        for finding in findings:
            click.echo(f"{finding.verdict:<8} {finding.name:<17} {finding.detail}")
            if finding.verdict != "ok":
                click.echo(f"{'':<9}{'':<18}for: {finding.needed_for}")
                if finding.remedy:
                    click.echo(f"{'':<9}{'':<18}do:  {finding.remedy}")
    needed = {"python", "engine unicorn", "file system"}
    if any(finding.verdict == "missing" and finding.name in needed for finding in findings):
        raise SystemExit(1)
