"""Memory beside the guest's own: refused where the host has it not, or a control group does not leave it."""

from pathlib import Path

import pytest

from stillframe.errors import Refused
from stillframe.snapshots.room import refuse_without_room

MIB = 1 << 20


def host(directory: Path, available: int, groups: str, mounts: str) -> Path:
    """A /proc. :param available: MiB."""
    proc = directory / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {available << 10} kB\n")
    (proc / "self/cgroup").write_text(groups)
    (proc / "self/mountinfo").write_text(mounts)
    return proc


def second(directory: Path, limits: dict[str, tuple[str, int, int]], root: str = "/") -> Path:
    """A host of 1000 MiB with version 2. :param limits: by the group: the limit, MiB in use, MiB of them in the page cache."""
    top = directory / "cgroup"
    for group, (limit, usage, cache) in limits.items():
        path = top / group
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text(f"{usage * MIB}\n")
        stat = (
            f"anon 5\nactive_file {cache * MIB // 2}\ninactive_file {cache * MIB // 2}\nslab_reclaimable 0\n"
        )
        (path / "memory.stat").write_text(stat)
    mounts = (
        f"23 1 0:3 / / rw - ext4 /dev/vda rw\n31 23 0:28 {root} {top} rw,nosuid shared:9 - cgroup2 none rw\n"
    )
    return host(directory, 1000, f"4:cpu:/\n0::{root.rstrip('/')}/box/guest\n", mounts)


def most(proc: Path) -> tuple[int, str]:
    """MiB of the largest load that is not refused, and what the refusal of the next one says."""
    for number in range(2000):
        try:
            refuse_without_room((number + 1) * MIB, proc=proc)
        except Refused as error:
            return number, str(error)
    return 2000, ""


def test_host_of_the_tests_has_some_memory_and_not_all_of_it() -> None:
    refuse_without_room(1)
    with pytest.raises(Refused, match=r"beside the guest's own, .* MiB") as refused:
        refuse_without_room(1 << 60)
    assert refused.value.remedy


def test_load_that_the_host_has_no_memory_for_is_refused(tmp_path: Path) -> None:
    assert most(host(tmp_path, 700, "", "")) == (
        700,
        "A load needs up to 701 MiB of memory beside the guest's own, the host has 700 MiB",
    )


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"box/guest": (str(600 * MIB), 200, 0)}, 400),
        ({"box/guest": (str(600 * MIB), 200, 50)}, 450),
        ({"box/guest": ("max", 200, 0), "box": (str(500 * MIB), 300, 0)}, 200),
        ({"box/guest": (str(100 * MIB), 100, 0), "box": (str(500 * MIB), 300, 0)}, 0),
        ({"box/guest": (str(9000 * MIB), 0, 0)}, 1000),
        ({"box/guest": ("max", 200, 0)}, 1000),
    ],
)
def test_limit_of_our_control_group_and_of_those_above_it_counts(
    limits: dict[str, tuple[str, int, int]], left: int, tmp_path: Path
) -> None:
    found, why = most(second(tmp_path, limits))
    assert (found, "control group" in why) == (left, left < 1000)


def test_group_that_is_mounted_as_the_topmost_counts_in_a_container(tmp_path: Path) -> None:
    assert most(second(tmp_path, {".": (str(300 * MIB), 100, 0)}, root="/box/guest"))[0] == 200
    (tmp_path / "proc/self/cgroup").write_text("0::/../../elsewhere\n")
    assert most(tmp_path / "proc")[0] == 200


def test_first_version_of_control_groups_counts(tmp_path: Path) -> None:
    group = tmp_path / "memory/box"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{400 * MIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{250 * MIB}\n")
    (group / "memory.stat").write_text(f"cache {40 * MIB}\ntotal_inactive_file {40 * MIB}\n")
    mounts = f"35 31 0:32 / {group.parent} rw,relatime - cgroup cgroup rw,memory\n41 31 0:38 / /u rw - cgroup2 c rw\n"
    proc = host(tmp_path, 1000, "9:name=systemd:/\n4:memory:/box\n0::/\n", mounts)
    found, why = most(proc)
    assert (found, str(group) in why) == (190, True)
