"""Where the kernel gives no userfaultfd, or one that serves our own threads alone: the same snapshots, and what is done instead is
said by name.

A seccomp filter stands for the user without rights: it refuses the device, and the system call, always or but for user mode.
"""

import ctypes
import json
import platform
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2.images import LONG
from snapshots.hosts import new_image, qemu_img_check

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls have other numbers")

_USERFAULTFD, _IOCTL = 323, 16
_NEW = 0xAA00
"""The request to /dev/userfaultfd."""
_LOAD, _IS, _HAS, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _FIRST, _SECOND = 0, 16, 24
_ALLOW, _NOT_PERMITTED = 0x7FFF0000, 0x00050001
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2


def refusing(unless_flag: int) -> Callable[[], None]:
    """To be called in a new process: no userfaultfd from the device, nor from the system call without this flag."""
    program = (
        (_LOAD, 0, 0, _NUMBER),
        (_IS, 3, 0, _USERFAULTFD),
        (_IS, 0, 4, _IOCTL),
        (_LOAD, 0, 0, _SECOND),
        (_IS, 3, 2, _NEW),
        (_LOAD, 0, 0, _FIRST),
        (_HAS, 0, 1, unless_flag),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _NOT_PERMITTED),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    libc = ctypes.CDLL(None, use_errno=True)

    def refuse() -> None:
        header = struct.pack("@HP", len(program), ctypes.addressof(code))
        if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, header, 0, 0):
            raise OSError(ctypes.get_errno(), "no seccomp filter")

    return refuse


ALWAYS = refusing(unless_flag=1 << 31)
BUT_FOR_USER_MODE = refusing(unless_flag=1)

_SNAPSHOTS = """
import json, logging, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from snapshots.hosts import opened
from snapshots.test_lazy import Bench, During
from stillframe.snapshots.context import Unwatched
def chose(self, what, chosen, why=""):
    print(f"{what}: {chosen} ({why})", file=sys.stderr)
Unwatched.chose = During.chose = chose
logging.basicConfig(level=logging.INFO)
with opened(Path(sys.argv[1]), "root") as node:
    bench = Bench(node)
    bench.save("a")
    a = bench.content()
    bench.pages[100:110] = 7
    bench.save("b")
    b = bench.content()
    how = bench.ground._tracking.how
    same = []
    for tag, content in (("a", a), ("b", b), ("a", a)):
        bench.scramble(5)
        bench.stranger()
        context = During(bench, lambda: None)
        bench.load(tag, context)
        same.append(bench.content() == content)
    bench.pages[200] = 9
    bench.save("c")
    c = bench.content()
    bench.scramble(6)
    bench.load("c")
    same.append(bench.content() == c)
    bench.ground.close()
print(json.dumps({"same": same, "how": how, "left": context.left}))
"""


def snapshots(folder: Path, refuse: Callable[[], None]) -> tuple[dict[str, object], str]:
    """Saves, continued and whole, and loads. :return: how it went, and the ways that were chosen."""
    image = new_image(folder / "root.qcow2", 1 << 20)
    path = [str(Path(__file__).parent.parent), *sys.path]
    ended = subprocess.run(
        [sys.executable, "-c", _SNAPSHOTS, str(image), *path],
        preexec_fn=refuse,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    qemu_img_check(image)
    return json.loads(ended.stdout), ended.stderr


def doctor(refuse: Callable[[], None]) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "stillframe", "doctor"], preexec_fn=refuse, capture_output=True, text=True
    )
    return " ".join((ended.stdout + ended.stderr).split())


def test_without_userfaultfd_all_is_read_first_and_changes_are_found_by_hashes(tmp_path: Path) -> None:
    found, log = snapshots(tmp_path, ALWAYS)
    assert found["same"] == [True] * 4
    assert found["how"] == "xxh3"
    assert found["left"] == -1, "the guest ran before all was there"
    assert "changes: xxh3 (" in log
    assert "memory: eager (pages cannot be fetched" in log
    assert "(Operation not permitted)" in log
    assert "missing userfaultfd" in doctor(ALWAYS)


def test_a_userfaultfd_for_our_own_threads_is_enough(tmp_path: Path) -> None:
    found, log = snapshots(tmp_path, BUT_FOR_USER_MODE)
    assert found["same"] == [True] * 4
    if "memory: eager" in log:
        pytest.skip("this host has no userfaultfd that tracks writes")
    assert found["how"] == "kernel"
    assert found["left"] > 1
    assert "ok userfaultfd system call, user mode only" in doctor(BUT_FOR_USER_MODE)


if LONG:

    @pytest.mark.parametrize("refuse", [ALWAYS, BUT_FOR_USER_MODE], ids=["never", "user mode only"])
    def test_a_running_guest_is_saved_and_loaded_all_the_same(
        refuse: Callable[[], None], tmp_path: Path
    ) -> None:
        """Its devices read and write memory that may still be missing."""
        work = "from storm import storm; storm(Path(sys.argv[1]), random.Random(1), 10.0, print)"
        begin = "import random, sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]"
        words = [sys.executable, "-c", f"{begin}; {work}", tmp_path, Path(__file__).parent.parent, *sys.path]
        subprocess.run(words, preexec_fn=refuse, check=True)
