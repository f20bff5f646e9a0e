"""The command line on machines that run: ours, and a real QEMU."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers import QEMU_VERSIONS, peer
from running import PATIENCE, STILLFRAME, RunningMachine, stillframe, until_it_greets


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    return directory


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "root.qcow2"
    stillframe("image", "create", str(path), "64M", check=True)
    return path


def node(image: Path, name: str = "root") -> tuple[str, str]:
    return "--blockdev", f"driver=qcow2,node-name={name},file.driver=file,file.filename={image}"


@pytest.fixture
def box(image: Path, tmp_path: Path) -> Iterator[str]:
    """A machine with the bundled guest, one qcow2 disk, a raw flash and a name."""
    flash = tmp_path / "vars.raw"
    with flash.open("wb") as file:
        file.truncate(32 << 20)
    run = stillframe(
        *("run", "--name", "box", "--detach", "--memory", "64M", "--kernel", "bundled"),
        *("--console", f"log:{tmp_path / 'console'}", *node(image), "--device", "virtio-blk,drive=root"),
        *(
            "--blockdev",
            f"driver=raw,node-name=vars,file.driver=file,file.filename={flash}",
            "--flash",
            "vars",
        ),
    )
    assert run.returncode == 0, run.stderr
    yield "box"
    stillframe("quit", "box")


def test_save_list_load_delete_without_naming_nodes_says_what_was_left_out(box: str) -> None:
    saved = stillframe("save", box, "one")
    assert saved.returncode == 0, saved.stderr
    assert saved.stdout.startswith("Saved 'one' on root")
    assert "left out: 'vars': raw images keep no snapshots" in saved.stderr
    assert "\n  state: whole (the machine stands on no snapshot" in saved.stdout
    again = json.loads(stillframe("save", box, "two", "--json", check=True).stdout)
    assert {each["what"] for each in again["job"]["choices"]} == {"memory", "changes", "state"}
    assert {"what": "state", "chosen": "continued", "why": "the machine stands on 'one'"} in again["job"][
        "choices"
    ]
    stillframe("delete", box, "two", check=True)
    listed = json.loads(stillframe("list", box, "--json", check=True).stdout)
    assert [(each["tag"], each["vmstate"]) for each in listed] == [("one", "root")]
    assert stillframe("load", box, "one").returncode == 0
    assert stillframe("load", box, "one", "--eager").returncode == 0
    assert stillframe("delete", box, "one").returncode == 0
    assert json.loads(stillframe("list", box, "--json", check=True).stdout) == []
    assert json.loads(stillframe("jobs", box, "--json", check=True).stdout) == []


def test_refusals_name_the_thing_and_leave_the_guest_running(box: str) -> None:
    stillframe("save", box, "one", check=True)
    again = stillframe("save", box, "one")
    assert (again.returncode, again.stderr.splitlines()[-1]) != (0, "")
    assert "Snapshot 'one' already exists" in again.stderr
    missing = stillframe("load", box, "nothing")
    assert missing.returncode == 1
    assert "There is no snapshot 'nothing'" in missing.stderr
    assert "There are: one." in missing.stderr
    raw = stillframe("save", box, "two", "--devices", "root,vars", "--vmstate", "root")
    assert raw.returncode == 1
    assert "'vars'" in raw.stderr
    assert json.loads(stillframe("qmp", box, "query-status", check=True).stdout)["status"] == "running"


def test_a_tag_with_brackets_is_saved_and_shown_as_it_was_typed(box: str) -> None:
    terminal, end = os.openpty()
    saving = subprocess.Popen(
        [*STILLFRAME, "save", box, "[/red]x"], stdout=subprocess.PIPE, stderr=end, text=True
    )
    os.close(end)
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as reader, contextlib.suppress(OSError):
        # A terminal nobody writes to any more ends with EIO.
        while data := reader.read(4096):
            shown += data
    told, _ = saving.communicate(timeout=60)
    assert (saving.returncode, b"Traceback" in shown) == (0, False), shown
    assert b"Saving [/red]x" in shown
    assert told.startswith("Saved '[/red]x' on root")


@pytest.mark.parametrize("listed", ["", ",", "root,", ",root"])
def test_an_empty_name_among_the_devices_is_refused_and_not_taken_for_all_of_them(
    box: str, listed: str
) -> None:
    refused = stillframe("save", box, "one", "--devices", listed)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--devices" in refused.stderr
    assert json.loads(stillframe("list", box, "--json", check=True).stdout) == []


def test_an_empty_job_id_is_refused_and_not_replaced(box: str) -> None:
    refused = stillframe("save", box, "one", "--job-id", "")
    assert refused.returncode == 1
    assert "Invalid job ID ''" in refused.stderr


def test_a_tag_that_is_not_text_is_called_so(box: str) -> None:
    refused = stillframe("save", box, os.fsdecode(b"one\xff"))
    assert refused.returncode == 1
    assert "not text in UTF-8" in refused.stderr
    assert json.loads(stillframe("list", box, "--json", check=True).stdout) == []


def test_a_tag_cannot_steer_the_terminal(box: str) -> None:
    saved = stillframe("save", box, "\x1b[31mred", check=True)
    assert "\x1b" not in saved.stdout
    assert "\\x1b[31mred" in saved.stdout


def test_a_machine_that_nobody_could_speak_with_is_not_left_in_the_background() -> None:
    refused = stillframe("run", "--machine", "none", "--detach")
    assert refused.returncode == 1
    assert "--name" in refused.stderr


def test_a_port_that_is_taken_is_refused_in_one_sentence_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        refused = stillframe("run", "--machine", "none", "--qmp", address, "--allow-local-users")
    assert refused.returncode == 1
    assert f"Could not listen at '{address}': Address already in use\n" in refused.stderr
    assert "another port" in refused.stderr


def test_cancelling_what_is_not_there_is_refused(box: str) -> None:
    done = stillframe("cancel", box, "nosuch")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "stillframe: Job not found")


def test_stop_and_cont(box: str) -> None:
    for word, state in (("stop", "paused"), ("cont", "running")):
        stillframe(word, box, check=True)
        assert json.loads(stillframe("qmp", box, "query-status", check=True).stdout)["status"] == state


def test_qmp_takes_key_value_pairs_json_and_a_pipe(box: str) -> None:
    words = ("job-id=j", "tag=t", "vmstate=root", 'devices=["root"]')
    assert stillframe("qmp", box, "snapshot-save", *words).stdout == "{}\n"
    request = json.dumps({"execute": "query-jobs"})
    deadline = time.monotonic() + PATIENCE
    while json.loads(stillframe("qmp", box, request, check=True).stdout)[0]["status"] != "concluded":
        assert time.monotonic() < deadline
    piped = subprocess.run(
        [*STILLFRAME, "qmp", box],
        input="query-name\njob-dismiss id=j\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert piped.returncode == 0, piped.stderr
    assert '"name": "box"' in piped.stdout


def test_a_name_that_is_taken_is_refused_and_the_first_machine_goes_on(box: str) -> None:
    second = stillframe("run", "--name", box, "--machine", "none", "--console", "none")
    assert second.returncode == 1
    assert "Traceback" not in second.stderr
    assert "box.sock" in second.stderr
    assert stillframe("qmp", box, "query-status").returncode == 0


def test_sockets_are_for_their_user_alone(box: str, runtime: Path) -> None:
    directory = runtime / "stillframe"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "box.sock").stat().st_mode) == 0o600


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_save_leaves_nothing_or_all_of_it_and_no_job(
    box: str, number: signal.Signals
) -> None:
    for delay in (0.15, 0.25, 0.3, 0.35):
        saving = subprocess.Popen(
            [*STILLFRAME, "save", box, "cut"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            saving.wait(delay)
        except subprocess.TimeoutExpired:
            saving.send_signal(number)
        told, errors = saving.communicate(timeout=60)
        tags = [each["tag"] for each in json.loads(stillframe("list", box, "--json", check=True).stdout)]
        assert tags == (["cut"] if told.startswith("Saved 'cut'") else []), errors
        # Killed by it: it came before the save had begun.
        assert saving.returncode in (0, 130, -number), errors
        assert saving.returncode < 0 or "Traceback" not in errors
        assert json.loads(stillframe("jobs", box, "--json", check=True).stdout) == []
        if tags:
            stillframe("delete", box, "cut", check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_save_is_cancelled_and_says_so(box: str, number: signal.Signals) -> None:
    saving = subprocess.Popen(
        [*STILLFRAME, "save", box, "cut", "--speed", "1", "--job-id", "j"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE
    while not json.loads(stillframe("jobs", box, "--json", check=True).stdout):
        assert time.monotonic() < deadline
    saving.send_signal(number)
    _, told = saving.communicate(timeout=60)
    assert saving.returncode == 130
    assert "stillframe: job 'j' ended: Operation canceled; nothing of it is left\n" in told
    assert told.endswith("stillframe: interrupted\n")
    assert json.loads(stillframe("jobs", box, "--json", check=True).stdout) == []
    assert json.loads(stillframe("list", box, "--json", check=True).stdout) == []


def test_a_machine_that_is_quit_during_a_save_says_what_is_left_of_it(box: str, image: Path) -> None:
    saving = subprocess.Popen(
        [*STILLFRAME, "save", box, "cut", "--speed", "1", "--job-id", "j"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE
    while not json.loads(stillframe("jobs", box, "--json", check=True).stdout):
        assert time.monotonic() < deadline
    stillframe("quit", box, check=True)
    _, told = saving.communicate(timeout=60)
    assert saving.returncode == 1
    assert "The machine ended during 'snapshot-save' (job 'j')" in told
    assert "nothing of it is left" in told
    assert "cut" not in stillframe("image", "snapshot", "list", str(image), check=True).stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_machine_cleanly(number: signal.Signals, image: Path, runtime: Path) -> None:
    machine = subprocess.Popen(
        [*STILLFRAME, "run", "--name", "box", "--machine", "none", "--console", "none", *node(image)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = runtime / "stillframe" / "box.sock"
    until_it_greets(path, machine)
    machine.send_signal(number)
    _, errors = machine.communicate(timeout=PATIENCE)
    assert (machine.returncode, errors) == (0, "")
    assert not path.exists()
    assert stillframe("image", "check", str(image)).returncode == 0


def test_a_monitor_on_tcp_is_refused_unless_open_to_local_users_is_wanted(image: Path) -> None:
    words = ("run", "--machine", "none", "--console", "none", *node(image))
    plain = stillframe(*words, "--qmp", "tcp:127.0.0.1:0")
    assert plain.returncode == 1
    assert "--allow-local-users" in plain.stderr
    outside = stillframe(*words, "--qmp", "tcp:0.0.0.0:0", "--allow-local-users")
    assert outside.returncode == 1
    assert "loopback" in outside.stderr


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_the_same_commands_work_on_a_real_qemu(version: str, image: Path, tmp_path: Path) -> None:
    path = tmp_path / "qemu.sock"
    program = peer("qemu-system-x86_64", version)
    qemu = subprocess.Popen(
        [
            *(program, "-machine", "pc", "-m", "16", "-nodefaults", "-display", "none", "-S"),
            *("-blockdev", node(image)[1]),
            *("-device", "virtio-blk-pci,drive=root", "-qmp", f"unix:{path},server=on,wait=off"),
        ]
    )
    try:
        until_it_greets(path, qemu)
        address = ("--qmp", f"unix:{path}")
        for words, begins in (
            (("save", *address, "one"), "Saved 'one' on root"),
            (("load", *address, "one"), "Loaded 'one' on root"),
            (("load", *address, "one", "--eager"), "Loaded 'one' on root"),
            (("delete", *address, "one"), "Deleted 'one' on root"),
        ):
            done = stillframe(*words)
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(begins)
        assert stillframe("quit", *address).returncode == 0
        assert qemu.wait(PATIENCE) == 0
    finally:
        qemu.kill()
        qemu.wait()


def wrong_inputs(tmp_path: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    """By what is wrong: the command line, and what its refusal has to name."""
    text, taken = tmp_path / "text", tmp_path / "taken"
    elf = ("run", "--kernel")
    good = tmp_path / "root.qcow2"
    return {
        "missing kernel": ((*elf, str(tmp_path / "none")), "none"),
        "kernel is a directory": ((*elf, str(tmp_path)), str(tmp_path)),
        "kernel for another machine": ((*elf, os.path.realpath(sys.executable)), "X86"),
        "kernel is text": ((*elf, str(text)), str(text)),
        "too little memory": ((*elf, "bundled", "--memory", "1M"), "memory"),
        "memory is no size": ((*elf, "bundled", "--memory", "much"), "much"),
        "no kernel": (("run",), "--kernel"),
        "unknown node": ((*elf, "bundled", "--device", "virtio-blk,drive=root"), "root"),
        "unknown device": ((*elf, "bundled", "--device", "floppy"), "floppy"),
        "missing image": (("run", "--machine", "none", *node(tmp_path / "gone")), "gone"),
        "directory as image": (("run", "--machine", "none", *node(tmp_path)), str(tmp_path)),
        "not qcow2": (("run", "--machine", "none", *node(text)), "qcow2"),
        "unknown option": (
            ("run", "--machine", "none", "--blockdev", "driver=null-co,node-name=n,colour=red"),
            "colour",
        ),
        "socket path is a file": (
            ("run", "--machine", "none", "--qmp", f"unix:{taken}", *node(good)),
            str(taken),
        ),
        "socket path without directory": (
            ("run", "--machine", "none", "--qmp", f"unix:{tmp_path / 'no' / 'way'}"),
            "way",
        ),
        "not an address": (("run", "--machine", "none", "--qmp", "carrier-pigeon"), "carrier-pigeon"),
        "no such machine": (("save", "nobody", "tag"), "nobody"),
        "nobody listens": (("list", "--qmp", f"unix:{tmp_path / 'silence'}"), "silence"),
        "not a monitor's name": (("list", "a/b"), "a/b"),
        "unknown engine": ((*elf, "bundled", "--engine", "steam"), "steam"),
        "unknown board": ((*elf, "bundled", "--machine", "sail"), "sail"),
    }


@pytest.mark.parametrize("case", sorted(wrong_inputs(Path())))
def test_wrong_input_gets_one_sentence_that_names_the_thing(case: str, image: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not an image\n" * 1000)
    (tmp_path / "taken").write_text("")
    words, named = wrong_inputs(tmp_path)[case]
    if words[0] == "run":
        words = (*words, "--console", "none")
    done = stillframe(*words)
    assert done.returncode in (1, 2), (done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert lines, "it says nothing"
    assert named in lines[0] or named in done.stderr, done.stderr
    assert len(lines) <= 3, done.stderr
    assert lines[-2 if len(lines) > 1 else -1].startswith("stillframe"), done.stderr


def test_an_image_without_permission_is_refused_by_name(image: Path) -> None:
    without_override: list[str] = []
    if os.getuid() == 0:
        # Root may open what it wants, unless these are taken from it.
        os.chown(image, 65534, 65534)
        without_override = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    os.chmod(image, 0o600 if without_override else 0)
    done = subprocess.run(
        [*without_override, *STILLFRAME, "run", "--machine", "none", "--console", "none", *node(image)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_machine_leaves_a_name_that_can_be_used_again(image: Path, runtime: Path) -> None:
    words = [*STILLFRAME, "run", "--name", "box", "--machine", "none", "--console", "none", *node(image)]
    path = runtime / "stillframe" / "box.sock"
    for _ in range(2):
        machine = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        until_it_greets(path, machine)
        machine.kill()
        machine.wait()
        assert path.exists()


def test_a_long_socket_path_works(image: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    path = deep / "monitor.sock"
    machine = subprocess.Popen(
        [*STILLFRAME, "run", "--machine", "none", "--console", "none", "--qmp", f"unix:{path}", *node(image)],
        stdin=subprocess.DEVNULL,
    )
    try:
        until_it_greets(path, machine)
        with pytest.raises(OSError, match="AF_UNIX path too long"):
            socket.socket(socket.AF_UNIX).connect(str(path))
        assert stillframe("quit", "--qmp", f"unix:{path}").returncode == 0
        assert machine.wait(PATIENCE) == 0
    finally:
        machine.kill()
        machine.wait()


def test_each_device_of_a_node_that_is_only_read_is_listed(tmp_path: Path) -> None:
    words = ["--memory", "16M", "--kernel", "bundled", "--paused"]
    words += ["--blockdev", "driver=null-co,node-name=shared,size=1048576,read-only=on"]
    for name in ("one", "two"):
        words += ["--device", f"virtio-blk,drive=shared,id={name}"]
    with RunningMachine(tmp_path, *words) as machine:
        assert [each["qdev"] for each in machine.execute("query-block")] == ["one", "two"]
        machine.quit()
