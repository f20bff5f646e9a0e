"""Which commands of a real QEMU's get through to it, where one runs the guest: each was looked at, none takes the disks away."""

import re

import pytest

from monitor.harness import Lines
from stillframe.errors import CommandNotFound
from stillframe.machine.engines.qemu.passing import is_passed, refuse_typed
from stillframe.monitor import hmp
from stillframe.monitor.schema import COMMANDS

REVIEWED = """
    add-fd add_client announce-self balloon calc-dirty-rate cancel-vcpu-dirty-limit change-vnc-password chardev-add chardev-change
    chardev-remove chardev-send-break client_migrate_info closefd cxl-add-dynamic-capacity cxl-inject-correctable-error
    cxl-inject-dram-event cxl-inject-general-media-event cxl-inject-memory-module-event cxl-inject-poison
    cxl-inject-uncorrectable-errors cxl-release-dynamic-capacity device-list-properties device-sync-config device_add device_del
    display-reload display-update dump-guest-memory dumpdtb expire_password getfd inject-nmi input-send-event memsave netdev_add
    netdev_del object-add object-del pmemsave qom-get qom-list qom-list-properties qom-list-types qom-set remove-fd replay-break
    replay-delete-break replay-seek request-ebpf ringbuf-read ringbuf-write rtc-reset-reinjection screendump send-key set-action
    set-numa-node set-vcpu-dirty-limit set_link set_password sev-inject-launch-secret system_wakeup trace-event-get-state
    trace-event-set-state watchdog-set-action x-colo-lost-heartbeat x-exit-preconfig xen-colo-do-checkpoint xen-event-inject
    xen-event-list xen-load-devices-state xen-save-devices-state xen-set-global-dirty-log xen-set-replication
"""
"""Beside those that only ask. One that is not here belongs here, or with those that passing.py keeps back: can it put another node
beneath a device, have QEMU write elsewhere what the guest writes, or write into a disk behind it?"""

HARMLESS_TO_DISKS = {
    "block_set_io_throttle": "how fast",
    "block-latency-histogram-set": "what is counted",
    "block-set-write-threshold": "what is told",
    "blockdev-open-tray": "the medium stays where it is",
    "blockdev-close-tray": "as above",
    "x-debug-query-block-graph": "asks",
}

TAKE_DISKS_AWAY = """
    block-commit block-dirty-bitmap-add block-dirty-bitmap-clear block-dirty-bitmap-disable block-dirty-bitmap-enable
    block-dirty-bitmap-merge block-dirty-bitmap-remove block-job-change block-stream block_resize blockdev-change-medium
    blockdev-insert-medium blockdev-mirror blockdev-remove-medium blockdev-reopen blockdev-set-active blockdev-snapshot
    blockdev-snapshot-sync change-backing-file drive-backup drive-mirror eject x-blockdev-amend x-blockdev-change
    x-blockdev-set-iothread
"""

REVIEWED_TYPED = """
    announce_self balloon block_set_io_throttle boot_set calc_dirty_rate cancel_vcpu_dirty_limit change chardev-add chardev-change
    chardev-remove chardev-send-break client_migrate_info closefd cpu device_add device_del dump-guest-memory dumpdtb
    exit_preconfig expire_password gdbserver getfd gpa2hpa gpa2hva gva2gpa hostfwd_add hostfwd_remove i log logfile mce memsave
    mouse_button mouse_move mouse_set netdev_add netdev_del nmi o object_add object_del one-insn-per-tb pcie_aer_inject_error
    pmemsave print qemu-io qom-get qom-list qom-set replay_break replay_delete_break replay_seek ringbuf_read ringbuf_write
    screendump sendkey set_link set_password set_vcpu_dirty_limit singlestep stopcapture sum sync-profile system_wakeup
    trace-event watchdog_action wavcapture x x_colo_lost_heartbeat xen-event-inject xen-event-list xp
"""
"""Of the human monitor. `qemu-io` writes through our exports, so snapshots have it; of `change` only `change vnc` gets through."""


def test_every_command_that_gets_through_to_a_qemu_was_looked_at(real: Lines) -> None:
    names = {each["name"] for each in real.execute("query-commands")}
    ours = {name for name, command in COMMANDS.items() if not command.of_program}
    passed = {name for name in names - ours if is_passed(name)}
    assert {name for name in passed if not re.match("(x-)?query-", name)} <= {
        *REVIEWED.split(),
        *HARMLESS_TO_DISKS,
    }
    # It is a real one that was asked.
    assert {"device_add", "blockdev-open-tray", "query-blockstats"} <= passed
    assert "blockdev-snapshot-sync" in names


def test_every_line_that_gets_through_to_a_qemu_was_looked_at(real: Lines) -> None:
    names = {name.split("|")[0] for name in re.findall(r"^[a-z][\w|-]*", real.hmp("help"), re.MULTILINE)}
    assert {name for name in names - {*hmp.COMMANDS} if is_passed(name)} <= {*REVIEWED_TYPED.split()}
    assert {"qemu-io", "snapshot_blkdev", "drive_add", "commit"} <= names


@pytest.mark.parametrize("name", TAKE_DISKS_AWAY.split())
def test_no_snapshot_misses_writes_because_of(name: str) -> None:
    assert not is_passed(name)


def test_a_disk_command_that_nobody_has_looked_at_does_not_get_through() -> None:
    assert not is_passed("blockdev-of-tomorrow")


def test_a_vnc_displays_password_can_be_changed_and_a_drives_medium_not() -> None:
    refuse_typed("change", ["vnc", "password"], lambda name: False)
    for words in (["cd0", "other.iso"], ["-f", "cd0", "other.iso"]):
        with pytest.raises(CommandNotFound):
            refuse_typed("change", words, lambda name: False)
