"""`stillframe-qemu` beside the real `qemu-system-riscv64`: the same command line, the same refusal, the same exit status."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peers import ROOT, peer
from running import PATIENCE, STILLFRAME, connected
from stillframe.cli.drop_in_options import OPTIONS, Wishes, read_wishes
from stillframe.cli.drop_in_words import BadOption, Option, key_values, split_words
from stillframe.testing import plain

GUEST = ROOT / "src" / "stillframe" / "data" / "guest.elf"
OURS = [sys.executable, "-m", "stillframe.cli.drop_in"]


def refusal(program: list[str], words: list[str]) -> tuple[int, list[str]]:
    """The exit status, and what standard error says but for the program's name and the chatter of QEMU's modules."""
    run = subprocess.run(
        [*program, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    lines = [line for line in run.stderr.splitlines() if not line.startswith("qemu: module")]
    return run.returncode, [
        line.removeprefix("stillframe-qemu").removeprefix("qemu-system-riscv64") for line in lines
    ]


REFUSED = [
    "-foo",
    "-kernel",
    "-machine nosuch",
    "-machine virt,foo=on",
    "-machine none,accel=kvm",
    "-accel kvm",
    "-m abc",
    "-m 1G,foo=1",
    "-machine none -smp 2",
    "-smp foo=1",
    "-machine virt -cpu nosuch",
    "-uuid abc",
    "-uuid 550e8400e29b41d4a716446655440000",
    "-icount shift=11",
    "-name a,foo=1",
    "-machine none -blockdev driver=nosuch,node-name=a",
    "-machine none -blockdev driver=null-co",
    '-machine none -blockdev {"driver":"null-co"',
    "-machine none -blockdev null-co,node-name=a -blockdev null-co,node-name=a",
    "-machine none -drive if=none,file=/nosuch,id=a",
    "-machine none -drive if=nosuch",
    "-machine virt -drive if=ide,file=/dev/null,format=raw",
    "-machine virt /nosuch.img",
    "-machine virt -drive if=virtio",
    "-machine virt -drive if=pflash",
    "-machine virt -drive if=none,id=a -device virtio-blk-device,drive=a",
    "-machine none -drive if=none,id=a -drive if=none,id=a",
    "-machine none -drive if=none,id=1a",
    "-machine none -drive if=none,id=a -blockdev null-co,node-name=a",
    "-machine none -drive if=none,id=a,format=qcow2",
    "-machine virt -device nosuch",
    "-machine virt -device virtio-blk-device",
    "-machine virt -device virtio-blk-device,drive=nosuch",
    "-machine virt -device virtio-rng-device,foo=1",
    "-machine none -device virtio-rng-device",
    "-machine none -qmp foo",
    "-machine none -monitor foo",
    "-machine none -chardev foo,id=a",
    "-machine none -chardev stdio",
    "-machine none -chardev null,id=a,foo=1",
    "-machine none -chardev pty,id=a,foo=1",
    "-machine none -chardev socket,id=a,fd=99,server=on",
    "-machine none -chardev socket,id=a,fd=x,server=on",
    "-machine none -chardev socket,id=a,fd=3,path=x",
    "-machine none,dump-guest-core=foo",
    "-machine virt -device virtio-rng-device,bootindex=1",
    "-object foo,id=a",
    "-object rng-builtin",
    "-object rng-random,id=a,foo=1",
    "-object rng-random,id=a,filename=/nosuch",
    "-machine virt -device virtio-rng-device,rng=nosuch",
    "-machine virt -object secret,id=a,data=x -device virtio-rng-device,rng=a",
    "-machine virt -blockdev null-co,node-name=n -device virtio-blk-device,drive=n,write-cache=foo",
    "-machine none -add-fd foo=1",
    "-machine none -add-fd set=1",
    "-machine none -add-fd set=1,fd=99",
    "-machine none -add-fd set=x,fd=0",
    "-machine none -add-fd set=0,fd=2",
    "-machine none -chardev file,id=a,path=/dev/fdset/7 -serial chardev:a",
    "-machine none -chardev file,id=a,path=/tmp/x,append=foo",
    "-machine none,mem-merge=foo",
    "-object secret",
    "-object secret,id=a",
    "-object secret,id=a,file=/nosuch",
    "-object secret,id=a,data=x,foo=1",
    "-object secret,id=a,data=x -object secret,id=a,data=x",
    "-audiodev foo,id=a",
    "-audiodev none",
    "-audiodev none,id=a,foo=1",
    "-rtc foo=1",
    "-boot foo=1",
    "-boot strict=foo",
    "-overcommit foo=1",
    "-msg foo=1",
    "-msg timestamp=foo",
    "-machine none -chardev null,id=a -chardev null,id=a",
    "-machine none -mon foo",
    "-machine none -chardev null,id=a -mon a,mode=foo",
    "-machine none -chardev null,id=a -mon a -mon a",
    "-machine virt -serial foo",
    "-machine virt -append x",
    "-machine none -loadvm nope",
    "-machine none -pidfile /nosuch/pid",
    "-machine none -daemonize -monitor stdio",
]


@pytest.mark.parametrize("line", REFUSED)
def test_what_we_do_not_have_is_refused_in_qemus_words(line: str) -> None:
    words = [*line.split(), "-display", "none"]
    if line == "-kernel":
        words = ["-display", "none", "-kernel"]
    ours = refusal(OURS, words)
    assert ours == refusal([peer("qemu-system-riscv64", "10.0")], words)
    assert ours[0] == 1


def test_the_human_monitor_looks_on_the_wire_as_qemus() -> None:
    typed = b"info status\nnosuch\n\nhelp stop\n\x7fsx\x7f\x1b[A\nquit\n"
    words = ["-machine", "none", "-display", "none", "-monitor", "stdio"]
    ours = subprocess.run([*OURS, *words], input=typed, capture_output=True, timeout=60, check=True)
    real = [peer("qemu-system-riscv64", "10.0"), *words]
    theirs = subprocess.run(
        real, input=typed.replace(b"\x1b[A", b""), capture_output=True, timeout=60, check=True
    )
    assert ours.stdout == theirs.stdout


def told(folder: Path, words: list[str], *requests: str) -> tuple[list[str], list[str]]:
    """What ours and QEMU, each in a copy of a folder, answer to commands, or to lines for people; names that were made up are
    all one.
    """
    sent = "".join(
        json.dumps(
            {"execute": request}
            if request.startswith("query-")
            else json.loads(request)
            if request.startswith("{")
            else {"execute": "human-monitor-command", "arguments": {"command-line": request}}
        )
        for request in requests
    )
    sent = f'{{"execute": "qmp_capabilities"}}{sent}{{"execute": "quit"}}'
    found = []
    for number, program in enumerate((OURS, [peer("qemu-system-riscv64", "10.0")])):
        place = shutil.copytree(folder, folder.parent / f"{folder.name}-{number}")
        run = subprocess.run(
            [*program, *words, "-nodefaults", "-display", "none", "-qmp", "stdio"],
            cwd=place,
            input=sent,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        found.append(
            [
                re.sub(r"#block\d+", "#block", line)
                for line in run.stdout.splitlines()[1:]
                if "return" in line or "error" in line
            ]
        )
    ours, theirs = found
    return ours, theirs


def test_the_uuid_is_told_as_qemu_tells_it(tmp_path: Path) -> None:
    words = ["-machine", "none", "-uuid", "550E8400-e29b-41d4-A716-446655440000"]
    ours, theirs = told(tmp_path, words, "query-uuid", "info uuid")
    assert ours == theirs
    assert '"550e8400-e29b-41d4-a716-446655440000"' in ours[1]


def test_drives_full_and_empty_are_told_as_qemu_tells_them(tmp_path: Path) -> None:
    for name in ("base.raw", "other.raw"):
        subprocess.run([peer("qemu-img"), "create", "-q", tmp_path / name, "1M"], check=True)
    for below, name in (("base.raw -F raw", "mid"), ("mid.qcow2 -F qcow2", "top")):
        line = f"create -q -f qcow2 -b {below} {name}.qcow2".split()
        subprocess.run([peer("qemu-img"), *line], cwd=tmp_path, check=True)
    words = [
        *("-machine", "virt", "-S", "-bios", "none"),
        *("-blockdev", "raw,file.driver=file,file.filename=other.raw,node-name=n"),
        *("-drive", "if=none,id=d0,file=top.qcow2,format=qcow2"),
        *("-drive", "if=none,id=cd0"),
        *("-drive", "if=none,id=ro,file=mid.qcow2,format=qcow2,readonly=on"),
        *("-device", "virtio-blk-device,drive=d0,id=v0", "-device", "virtio-blk-device,drive=n,id=v1"),
    ]
    lines = ["", "-n", "-v", "-n -v", "d0", "cd0", "n", "-v n", "-nv", "-v -n", "nope", "-x", "a b", '"a']
    internal = '{"execute": "blockdev-snapshot-%sinternal-sync", "arguments": {"device": "%s", "name": "%s"}}'
    requests = [
        "query-block",
        *(f"info block {line}" for line in lines),
        *(internal % ("", device, "s") for device in ("d0", "d0", "cd0", "ro", "n", "nope")),
        *(internal % ("delete-", device, "x") for device in ("d0", "cd0", "n")),
        "snapshot_blkdev_internal d0 s",
        "info block -v d0",
        '{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "cd0"}}',
        "savevm everything",
        "delvm everything",
        "loadvm s",
        "info snapshots",
    ]
    ours, theirs = told(tmp_path, words, *requests)
    for request, one, other in zip(requests, ours[1:], theirs[1:], strict=False):
        one, other = (
            re.sub(r"\d{4}-\d\d-\d\d [\d:]+ +[\d:.]+|disk size: \w+", "", text) for text in (one, other)
        )
        assert plain(json.loads(one)) == plain(json.loads(other)), request
    assert len(ours) == len(theirs)


def test_savevm_takes_the_nodes_that_qemu_leaves_out_where_there_is_a_drive(tmp_path: Path) -> None:
    for name in ("a", "b"):
        line = ["create", "-q", "-f", "qcow2", tmp_path / f"{name}.qcow2", "1M"]
        subprocess.run([peer("qemu-img"), *line], check=True)
    words = [
        *("-machine", "none", "-drive", "if=none,id=d0,file=a.qcow2,format=qcow2"),
        *("-blockdev", "qcow2,node-name=b,file.driver=file,file.filename=b.qcow2"),
    ]
    found = told(tmp_path, words, "savevm all", "query-named-block-nodes")
    assert [answers[1] for answers in found] == ['{"return": ""}'] * 2
    ours, theirs = (
        {node["node-name"] for node in json.loads(answers[2])["return"] if "snapshots" in node["image"]}
        for answers in found
    )
    assert ours == {"#block", "b"}
    assert theirs == {"#block"}


def test_a_daemon_listens_writes_its_number_and_begins_with_a_snapshot(tmp_path: Path) -> None:
    image, qmp, pidfile = tmp_path / "a,b.qcow2", tmp_path / "qmp", tmp_path / "pid"
    subprocess.run([*STILLFRAME, "image", "create", str(image), "1M"], check=True, capture_output=True)
    machine = [
        *("-machine", "virt,accel=kvm:tcg", "-m", "16", "-nodefaults", "-nographic", "-no-user-config"),
        *("-drive", f"if=none,id=d0,file={str(image).replace(',', ',,')},format=qcow2,readonly=off"),
        *("--device", "virtio-blk-device,drive=d0,id=vb0", "-daemonize", "-pidfile", str(pidfile)),
        *("-chardev", f"socket,id=c,path={qmp},server=on,wait=off", "-mon", "chardev=c,mode=control"),
    ]

    def talk(*commands: str) -> list[object]:
        with connected(qmp, None) as monitor:
            monitor.settimeout(PATIENCE)
            lines = monitor.makefile("rb")
            assert b"QMP" in lines.readline()
            answers = []
            for command in ("qmp_capabilities", *commands):
                name, _, words = command.partition(" ")
                arguments = {"arguments": {"command-line": words}} if words else {}
                monitor.sendall(json.dumps({"execute": name, **arguments}).encode())
                while "return" not in (message := json.loads(lines.readline())):
                    assert "event" in message, message
                answers.append(message["return"])
            return answers[1:]

    def gone(pid: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while pidfile.exists():
            assert time.monotonic() < deadline, f"process {pid} is still there"
            time.sleep(0.01)

    subprocess.run([*OURS, *machine], check=True, timeout=60)
    pid = int(pidfile.read_text())
    os.kill(pid, 0)
    status, saved, disks, _ = talk("query-status", "human-monitor-command savevm one", "query-block", "quit")
    assert (status, saved) == ({"status": "running", "running": True}, "")
    assert [disk["device"] for disk in disks] == ["d0"]
    gone(pid)
    subprocess.run([*OURS, *machine, "-loadvm", "one", "-S"], check=True, timeout=60)
    pid = int(pidfile.read_text())
    assert talk("query-status", "quit")[0] == {"status": "prelaunch", "running": False}
    gone(pid)


def listening(path: Path) -> socket.socket:
    """A manager's own socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


KERNEL = (*("-machine", "virt", "-m", "64", "-nodefaults", "-display", "none"), *("-kernel", str(GUEST)))


def read_until(source: Callable[[], bytes], wanted: bytes) -> bytes:
    """:param source: what has come since the last call. Fails after `PATIENCE`."""
    data, deadline = b"", time.monotonic() + PATIENCE
    while wanted not in data:
        assert time.monotonic() < deadline, data
        data += source()
    return data


def test_a_manager_hands_over_the_sockets_that_it_listens_at(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "qmp") as monitor,
        listening(tmp_path / "serial") as serial,
        listening(tmp_path / "spare") as spare,
    ):
        numbers = {"m": monitor.fileno(), "s": serial.fileno(), "spare": spare.fileno()}
        places = [f"socket,id={name},fd={fd},server=on,wait=off" for name, fd in numbers.items()]
        words = [word for place in places for word in ("-chardev", place)]
        words += ["-mon", "chardev=m,mode=control", "-serial", "chardev:s", "-append", "mb=2", "-daemonize"]
        subprocess.run([*OURS, *KERNEL, *words], check=True, timeout=PATIENCE, pass_fds=numbers.values())
    with connected(tmp_path / "qmp", None) as client, connected(tmp_path / "serial", None) as console:
        console.settimeout(PATIENCE)
        read_until(lambda: console.recv(4096), b"HB 2 ")
        client.settimeout(PATIENCE)
        client.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-chardev"}{"execute":"quit"}')
        said = read_until(lambda: client.recv(4096), b"SHUTDOWN")
    shown = {"s": f"unix:{tmp_path}/serial,server=on", "m": f"unix:{tmp_path}/qmp,server=on"}
    replies = [json.loads(line) for line in said.splitlines()]
    [chardevs] = [each["return"] for each in replies if each.get("return")]
    assert {each["label"]: each["filename"] for each in chardevs} == shown


def test_a_manager_hands_over_the_file_that_the_guest_writes_to(tmp_path: Path) -> None:
    path = tmp_path / "serial.log"
    path.write_text("before\n")
    with path.open("ab") as file:
        words = ["-add-fd", f"set=7,fd={file.fileno()}", "-chardev", "file,id=s,path=/dev/fdset/7,append=on"]
        words += ["-serial", "chardev:s", "-append", "mb=2"]
        machine = subprocess.Popen([*OURS, *KERNEL, *words], pass_fds=[file.fileno()])
    try:
        with path.open("rb") as reader:
            assert read_until(reader.read, b"HB 2 ").startswith(b"before\n")
    finally:
        machine.terminate()
        machine.wait(PATIENCE)


def wished(*words: str) -> Wishes:
    """What a command line asks for."""
    wishes = Wishes()
    read_wishes(split_words(words, {name: bool(known.usage) for name, known in OPTIONS.items()}), wishes)
    return wishes


def test_a_character_device_serves_one_only(tmp_path: Path) -> None:
    shared = wished("-chardev", "null,id=a", "-serial", "chardev:a", "-mon", "a")
    with pytest.raises(BadOption, match="-serial chardev:a: chardev 'a' is already in use"):
        shared.console()
    with listening(tmp_path / "qmp") as sock:
        place = f"fd={sock.fileno()},server=on,wait=off"
        with pytest.raises(BadOption, match=f"File descriptor '{sock.fileno()}' is in use"):
            wished("-chardev", f"socket,id=a,{place}", "-qmp", f"unix:{place}")


def test_the_serial_port_is_not_at_a_port_that_every_user_reaches() -> None:
    with socket.socket() as sock:
        words = ("-chardev", f"socket,id=a,fd={sock.fileno()},server=on", "-serial", "chardev:a")
        with pytest.raises(BadOption, match="could not connect serial device"):
            wished(*words).console()


def test_of_a_set_the_descriptor_is_taken_that_can_be_written_to_and_a_daemon_is_handed_all(
    tmp_path: Path,
) -> None:
    readable, writable = os.pipe()
    with open(readable, "rb"), open(writable, "wb"), listening(tmp_path / "unused") as unused:
        both = ("-add-fd", f"fd={readable},set=2", "-add-fd", f"fd={writable},set=2")
        spare = ("-chardev", f"socket,id=b,fd={unused.fileno()},server=on")
        wishes = wished(*both, *spare, "-chardev", "file,id=a,path=/dev/fdset/2", "-serial", "chardev:a")
        assert wishes.console().fd == writable
        assert sorted(wishes.descriptors()) == sorted([readable, writable, unused.fileno()])
        with pytest.raises(BadOption, match="Could not open '/dev/fdset/2': Permission denied"):
            wished(*both[:2], "-serial", "file:/dev/fdset/2")


def test_a_port_that_was_not_chosen_is_told() -> None:
    words = ["-machine", "none", "-display", "none", "-qmp", "tcp:127.0.0.1:0,server=on,wait=off"]
    run = subprocess.run(
        [*OURS, *words, "-qmp", "stdio"],
        input='{"execute":"qmp_capabilities"}{"execute":"query-chardev"}{"execute":"quit"}',
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert re.search(r"tcp:127\.0\.0\.1:[1-9]\d*,server=on", run.stdout)


def test_commas_are_doubled_inside_values_and_a_key_alone_is_a_switch() -> None:
    option = Option("drive", "a,,b.img,if=none,server,nowait,x=,,,y=1")
    assert key_values(option, "file") == {
        "file": "a,b.img",
        "if": "none",
        "server": "on",
        "wait": "off",
        "x": ",",
        "y": "1",
    }
