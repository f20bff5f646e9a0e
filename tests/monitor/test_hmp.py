"""The human monitor beside QEMU's: the same lines, the same text."""

import pytest

from monitor.harness import Client, Lines
from stillframe.block.listing import snapshot_table
from stillframe.block.node import SnapshotInfo
from stillframe.monitor.hmp import COMMANDS, INFO
from stillframe.text import format_size

LINES = [
    "",
    "foo",
    "foo bar",
    "foo/bar",
    "/",
    "stop/x",
    "savevm/ a b",
    "Info status",
    "info foo",
    "info jobs",
    "info status",
    "  info   status  ",
    "info status x",
    "info name",
    "info name x",
    "info snapshots",
    "info snapshots x",
    "info block",
    "info replay",
    "info uuid",
    "help foo",
    "help loadvm",
    "help delvm",
    "help help",
    "? stop",
    "help stop extra",
    "help info status",
    "help info name",
    "help info snapshots",
    "help system_reset",
    "savevm",
    "savevm a",
    "savevm a b",
    "savevm 'a",
    'savevm "a b" c',
    'savevm "a\\"b"',
    'savevm "a\\x"',
    "loadvm",
    "delvm",
    "delvm a",
    "delvm a b",
    "q x",
    "stop x",
    "system_reset x",
    "snapshot_blkdev_internal",
    "snapshot_blkdev_internal a",
    "snapshot_blkdev_internal a b",
    "snapshot_delete_blkdev_internal a",
    "snapshot_delete_blkdev_internal a b",
    "snapshot_delete_blkdev_internal a b c d",
    "stop",
    "info status",
    "c",
    "info status",
]


def test_the_same_lines_get_the_same_text_as_from_a_real_qemu(real: Lines, client: Client) -> None:
    for line in LINES:
        assert client.hmp(line) == real.hmp(line), line


def test_a_load_that_cannot_be_leaves_the_guest_running(client: Client) -> None:
    # QEMU's stands still afterwards; the text is the same.
    assert client.hmp("loadvm a") == "Error: no block device can store vmstate for snapshot\r\n"
    assert client.hmp("info status") == "VM status: running\r\n"


def test_help_lists_every_command_and_info_every_subject(client: Client) -> None:
    help_text, info_text = client.hmp("help"), client.hmp("info")
    for name in COMMANDS:
        assert name in help_text
        assert client.hmp(f"help {name}").split()[0] in (
            f"{name}",
            *(line.split()[0] for line in help_text.splitlines()),
            "info",
        )
    for name in INFO:
        assert f"info {name} " in info_text
    assert client.hmp("help info") == info_text


def test_there_is_one_processor_for_the_human_monitor(client: Client) -> None:
    reply = client.execute("human-monitor-command", command_line="info status", cpu_index=1)
    assert reply["desc"] == "Parameter 'cpu-index' expects a CPU number"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (875168, "855 KiB"),
        (4152361, "3.96 MiB"),
        (1 << 40, "1 TiB"),
    ],
)
def test_sizes_have_three_digits_and_a_binary_unit(size: int, text: str) -> None:
    assert format_size(size) == text


def test_the_table_of_snapshots_is_qemus(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = SnapshotInfo("1", "s1", 875168, 1795373519, 0, 100_000_000, None, 1 << 20)
    head, row = snapshot_table([snapshot], with_ids=False)
    assert head == "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
    assert row[:34] == "--      s1                855 KiB "
    assert row[53:] == "  0000:00:00.100         --"
    assert len(row) == len(head)
