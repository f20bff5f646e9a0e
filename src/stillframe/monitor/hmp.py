"""The human monitor: lines of words in, lines of text out, in the words of QEMU's.

A line is a command's name and its words, divided by white space; a word in double quotes may hold blanks, and
\\n \\r \\\\ \\' \\" as escapes. Errors are printed as `Error: ...`. Lines end in CR LF.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from stillframe.block.listing import snapshot_table
from stillframe.errors import CommandNotFound, NotFound, StillframeError, Unsupported
from stillframe.jobs import JobContext
from stillframe.machine.run_state import RunState
from stillframe.monitor.host import Host
from stillframe.monitor.human_block import info_block, info_block_jobs
from stillframe.monitor.session import VERSION

Action = Callable[[Host, Sequence[str]], str]


@dataclass(frozen=True, slots=True)
class HumanCommand:
    """A command of the human monitor.

    :param names: the first is the command's, the others stand for it.
    :param words: what it takes, as (what is expected, whether it may be missing).
    :param flags: what may stand before them, in this order, as "-n"; those that do are among the words.
    :param usage: the words as `help` shows them.
    :param text: what it does.
    """

    names: tuple[str, ...]
    action: Action
    usage: str
    text: str
    words: tuple[tuple[str, bool], ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def help_line(self) -> str:
        """Its line in `help`."""
        return f"{'|'.join(self.names)} {self.usage} -- {self.text}\r\n"


class _BadWords(Exception):
    """The words do not fit the command; what QEMU says of it."""


def run(host: Host, line: str) -> str:
    """Run one line, and return what it prints."""
    if not line.strip():
        return ""
    name, rest = _name(line)
    commands, prefix = COMMANDS, ""
    if name == "info":
        sub, after = _name(rest)
        if not sub:
            return _help(INFO, "info ")
        commands, prefix, name, rest = INFO, "info ", sub, after
    command = commands.get(name)
    if command is None:
        passed = _passed(host, line)
        return f"unknown command: '{prefix}{name}'\r\n" if passed is None else passed
    try:
        words = _words(command, rest)
    except _BadWords as error:
        return f'{"|".join(command.names)}: {error}\r\nTry "help {prefix}{name}" for more information\r\n'
    try:
        return command.action(host, words)
    except StillframeError as error:
        return f"Error: {error}\r\n"


def _passed(host: Host, line: str) -> str | None:
    """What whoever runs the guest prints, where that is not us."""
    other = host.machine.other_monitor
    if other is None:
        return None
    name, rest = _name(line)
    try:
        return other.execute_typed(name, _all_words(rest), line)
    except CommandNotFound:
        return None
    except Unsupported as error:
        return f"Error: {error}\r\n"


def _name(text: str) -> tuple[str, str]:
    """A command's name and what follows; QEMU's ends at a slash as well, as in `x/4i`."""
    found = re.match(r"\s*([^\s/]*)(.*)", text, re.DOTALL)
    return (found[1], found[2]) if found else ("", "")


def _first(line: str) -> tuple[str, str]:
    parts = line.split(None, 1)
    return (parts[0] if parts else ""), (parts[1] if len(parts) > 1 else "")


_ESCAPES: Final = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


def _word(text: str) -> tuple[str | None, str]:
    """The first word and what follows; None for one that its quotes do not end, or with an unknown escape."""
    text = text.lstrip()
    if not text.startswith('"'):
        return _first(text)
    characters: list[str] = []
    position = 1
    while position < len(text):
        character = text[position]
        if character == '"':
            return "".join(characters), text[position + 1 :]
        if character == "\\":
            position += 1
            escaped = _ESCAPES.get(text[position : position + 1])
            if escaped is None:
                return None, ""
            character = escaped
        characters.append(character)
        position += 1
    return None, ""


def _all_words(rest: str) -> list[str]:
    """Up to one that cannot be read, where QEMU stops, too."""
    words = []
    while rest.strip():
        word, rest = _word(rest)
        if word is None:
            break
        words.append(word)
    return words


def _words(command: HumanCommand, rest: str) -> list[str]:
    words = []
    for flag in command.flags:
        rest = rest.lstrip()
        if rest.startswith(flag):
            words.append(flag)
            rest = rest.removeprefix(flag)
        elif rest.startswith("-") and rest[:2] not in command.flags:
            raise _BadWords(f"unsupported option {rest[:2]}")
    for expected, optional in command.words:
        if not rest.strip():
            if optional:
                break
            raise _BadWords(f"{expected} expected")
        word, rest = _word(rest)
        if word is None:
            raise _BadWords(f"{expected} expected")
        words.append(word)
    if rest.strip() and command.names[0] != "help":
        raise _BadWords("extraneous characters at the end of line")
    return words


def _help(commands: Mapping[str, HumanCommand], prefix: str = "") -> str:
    return "".join(f"{prefix}{command.help_line}" for command in dict.fromkeys(commands.values()))


# Snapshots


def _info_snapshots(host: Host, words: Sequence[str]) -> str:
    try:
        listing = host.snapshots.listing()
    except NotFound as error:
        return f"{error}\r\n"
    if listing.empty:
        return "There is no snapshot available.\r\n"
    lines = ["List of snapshots present on all disks:"]
    lines += snapshot_table(listing.common, with_ids=False) if listing.common else ["None"]
    for name, snapshots in listing.partial:
        lines += ["", f"List of partial (non-loadable) snapshots on '{name}':"]
        lines += snapshot_table(snapshots)
    return "".join(f"{line}\r\n" for line in lines)


def _in_turn(host: Host, kind: str, body: Callable[[JobContext], object]) -> str:
    def work(context: JobContext) -> None:
        body(context)

    host.jobs.run_internal(kind, work, queue=host.snapshots.queue)
    return ""


def _savevm(host: Host, words: Sequence[str]) -> str:
    tag = words[0] if words else None
    return _in_turn(host, "savevm", lambda context: host.snapshots.save_everything(context, tag))


def _loadvm(host: Host, words: Sequence[str]) -> str:
    return _in_turn(host, "loadvm", lambda context: host.snapshots.load_everything(context, words[0]))


def _delvm(host: Host, words: Sequence[str]) -> str:
    return _in_turn(host, "delvm", lambda context: host.snapshots.delete_everywhere(context, words[0]))


def _snapshot_internal(host: Host, words: Sequence[str]) -> str:
    return _in_turn(host, "internal", lambda context: host.snapshots.create_internal(*words))


def _snapshot_delete_internal(host: Host, words: Sequence[str]) -> str:
    id = words[2] if len(words) > 2 else None
    return _in_turn(
        host, "internal", lambda context: host.snapshots.delete_internal(words[0], id=id, name=words[1])
    )


# The rest


def _info_status(host: Host, words: Sequence[str]) -> str:
    state = host.machine.run_state
    if state is RunState.RUNNING:
        return "VM status: running\r\n"
    why = "" if state is RunState.PAUSED else f" ({state.value})"
    return f"VM status: paused{why}\r\n"


def _info_name(host: Host, words: Sequence[str]) -> str:
    return "" if host.name is None else f"{host.name}\r\n"


def _info_uuid(host: Host, words: Sequence[str]) -> str:
    return f"{host.uuid()}\r\n"


def _info_replay(host: Host, words: Sequence[str]) -> str:
    return "Record/replay is not active\r\n"


def _info_version(host: Host, words: Sequence[str]) -> str:
    qemu = VERSION.qemu
    return f"{qemu.major}.{qemu.minor}.{qemu.micro}{VERSION.package}\r\n"


def _stop(host: Host, words: Sequence[str]) -> str:
    host.machine.stop()
    return ""


def _cont(host: Host, words: Sequence[str]) -> str:
    host.machine.cont()
    return ""


def _quit(host: Host, words: Sequence[str]) -> str:
    host.end()
    return ""


def _system_reset(host: Host, words: Sequence[str]) -> str:
    host.machine.reset()
    return ""


def _system_powerdown(host: Host, words: Sequence[str]) -> str:
    host.machine.powerdown()
    return ""


def _show_help(host: Host, words: Sequence[str]) -> str:
    if not words:
        return _help(COMMANDS)
    commands, prefix, name = COMMANDS, "", words[0]
    if name == "info":
        if len(words) == 1:
            return _help(INFO, "info ")
        commands, prefix, name = INFO, "info ", words[1]
    command = commands.get(name)
    return f"{prefix}{command.help_line}" if command else f"unknown command: '{prefix}{name}'\r\n"


_STRING: Final = ("string", False)
_MAYBE: Final = ("string", True)
_DEVICE: Final = ("block device name", False)
_MAYBE_DEVICE: Final = ("block device name", True)


def _table(*commands: HumanCommand) -> dict[str, HumanCommand]:
    return {name: command for command in commands for name in command.names}


INFO: Final = _table(
    HumanCommand(
        ("block",),
        info_block,
        "[-n] [-v] [device]",
        "show one or all drives and devices; -n: nodes; -v: their images, too",
        (_MAYBE_DEVICE,),
        ("-n", "-v"),
    ),
    HumanCommand(("block-jobs",), info_block_jobs, "", "show how far block jobs are"),
    HumanCommand(("name",), _info_name, "", "show the current VM name"),
    HumanCommand(("snapshots",), _info_snapshots, "", "show the currently saved VM snapshots"),
    HumanCommand(("status",), _info_status, "", "show the current VM status (running|paused)"),
    HumanCommand(("replay",), _info_replay, "", "show record and replay: there is none"),
    HumanCommand(("uuid",), _info_uuid, "", "show the current VM UUID"),
    HumanCommand(
        ("version",), _info_version, "", "show the version of QEMU that is spoken, and who speaks it"
    ),
)
"""The commands after `info`."""

COMMANDS: Final = _table(
    HumanCommand(("cont", "c"), _cont, "", "resume emulation"),
    HumanCommand(("delvm",), _delvm, "tag", "delete a VM snapshot from its tag", (_STRING,)),
    HumanCommand(("help", "?"), _show_help, "[cmd]", "show the help", (_MAYBE, _MAYBE)),
    HumanCommand(
        ("info",),
        lambda host, words: _help(INFO, "info "),
        "[subcommand]",
        "show various information about the system state",
    ),
    HumanCommand(("loadvm",), _loadvm, "tag", "restore a VM snapshot from its tag", (_STRING,)),
    HumanCommand(("quit", "q"), _quit, "", "quit the emulator"),
    HumanCommand(
        ("savevm",),
        _savevm,
        "tag",
        "save a VM snapshot; without a tag its name is made of the time",
        (_MAYBE,),
    ),
    HumanCommand(
        ("snapshot_blkdev_internal",),
        _snapshot_internal,
        "device name",
        "take an internal snapshot of device",
        (_DEVICE, _STRING),
    ),
    HumanCommand(
        ("snapshot_delete_blkdev_internal",),
        _snapshot_delete_internal,
        "device name [id]",
        "delete an internal snapshot of device",
        (_DEVICE, _STRING, _MAYBE),
    ),
    HumanCommand(("stop", "s"), _stop, "", "stop emulation"),
    HumanCommand(("system_powerdown",), _system_powerdown, "", "send system power down event"),
    HumanCommand(("system_reset",), _system_reset, "", "reset the system"),
)
"""All commands by their names."""
