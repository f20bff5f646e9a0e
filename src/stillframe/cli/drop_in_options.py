"""What a command line of QEMU's asks for, as far as our machine has the thing; the rest is refused in QEMU's words."""

import fcntl
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from stillframe.cli.drop_in_chardevs import Chardev, backend, character
from stillframe.cli.drop_in_parameters import PARAMETERS, refuse_unknown
from stillframe.cli.drop_in_settings import check_audio, check_boot, check_setting, read_object, switch_of
from stillframe.cli.drop_in_words import BadOption, Option, key_values, size, switch
from stillframe.cli.run_options import ConsoleOptions, DeviceOptions, MonitorPlace
from stillframe.machine.catalogue import BOARDS, CPU_MODELS, DEVICES
from stillframe.monitor.addresses import FdAddress, StdioAddress

_DRIVE_WORDS = frozenset(
    {"if", "id", "file", "format", "driver", "readonly", "media", "unit", "index", "werror", "rerror"}
)
_MAX_SHIFT = 10
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, slots=True)
class Drive:
    """A `-drive`.

    :param name: the drive's, beside its node's.
    :param bus: "none", "virtio" or "pflash".
    :param node: the node's options, by their dotted keys; none for an empty drive.
    :param policy: "werror" and "rerror", where given.
    :param option: as it was given, for errors.
    """

    name: str
    bus: str
    node: Mapping[str, str]
    policy: Mapping[str, str]
    option: Option


@dataclass(frozen=True, slots=True)
class Device:
    """A `-device`. :param options: its kind and its keys. :param option: as it was given."""

    options: DeviceOptions
    option: Option


@dataclass(slots=True)
class Wishes:
    """All that was asked for, in the order in which it was asked."""

    board: str = "virt"
    memory: int = 128 << 20
    name: str | None = None
    uuid: str | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    bios: Path | None = None
    blockdevs: list[Option] = field(default_factory=list)
    drives: list[Drive] = field(default_factory=list)
    flash: dict[str, str] = field(default_factory=dict)
    devices: list[Device] = field(default_factory=list)
    chardevs: dict[str, Chardev] = field(default_factory=dict)
    monitors: list[tuple[Option, str, Chardev | str]] = field(default_factory=list)
    serial: tuple[Option, Chardev | str] | None = None
    processors: int = 1
    icount: int | None = None
    loadvm: str | None = None
    pidfile: Path | None = None
    paused: bool = False
    daemonize: bool = False
    nographic: bool = False
    bare: bool = False
    keep_after_shutdown: bool = False
    dump_guest_core: bool = True
    timestamps: bool = False
    objects: dict[str, str] = field(default_factory=dict)
    fd_sets: dict[str, list[int]] = field(default_factory=dict)
    sockets: list[int] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    def descriptors(self) -> tuple[int, ...]:
        """Those that were handed over, whether anything uses them or not."""
        return (*self.sockets, *chain.from_iterable(self.fd_sets.values()))

    def places(self) -> tuple[MonitorPlace, ...]:
        """Where monitors are to listen. :raise BadOption: at a character device that there is not, or at another's."""
        found, used = [], set[str]()
        for number, (option, mode, chardev) in enumerate(self.monitors):
            device = self._chardev(chardev)
            if device is None:
                raise option.refused(f'chardev "{chardev}" not found')
            if device.kind == "pty":
                raise option.refused("a monitor at a pty is not there")
            if isinstance(chardev, str):
                if chardev in used:
                    raise option.refused(f"chardev '{chardev}' is already in use")
                used.add(chardev)
            if device.address is not None:
                label = chardev if isinstance(chardev, str) else f"compat_monitor{number}"
                found.append(MonitorPlace(device.address, mode, device.waits, label))
        return tuple(found)

    def on_stdio(self) -> tuple[Option, ...]:
        """The options that use standard input and output."""
        users = [(option, chardev) for option, _, chardev in self.monitors]
        if self.serial is not None:
            users.append(self.serial)
        found = ((option, self._chardev(chardev)) for option, chardev in users)
        return tuple(option for option, device in found if device is not None and device.kind == "stdio")

    def console(self) -> ConsoleOptions:
        """The serial port's other end. :raise BadOption: one that there is not, or a monitor's."""
        if self.serial is None:
            usual = self.nographic and not self.bare and not self.daemonize
            taken = any(isinstance(place.address, StdioAddress) for place in self.places())
            return ConsoleOptions("stdio" if usual and not taken else "none")
        option, chardev = self.serial
        device = self._chardev(chardev)
        if device is None or device.kind == "tcp":
            raise option.refused(f"could not connect serial device to character backend '{option.value}'")
        if isinstance(chardev, str) and chardev in [each for _, _, each in self.monitors]:
            raise option.refused(f"chardev '{chardev}' is already in use")
        return ConsoleOptions(
            {"file": "log", "null": "none", "fd": "unix"}.get(device.kind, device.kind),
            device.path,
            chardev if isinstance(chardev, str) else "serial0",
            device.address.fd if isinstance(device.address, FdAddress) else device.fd,
        )

    def _chardev(self, chardev: Chardev | str) -> Chardev | None:
        return self.chardevs.get(chardev) if isinstance(chardev, str) else chardev


def _machine(wishes: Wishes, option: Option) -> None:
    for key, value in key_values(option, "type").items():
        if key == "type":
            if value in ("help", "?"):
                wishes.questions.append("machine")
            elif value not in BOARDS:
                raise BadOption(
                    f'unsupported machine type: "{value}"\nUse -machine help to list supported machines'
                )
            wishes.board = value
        elif key == "accel":
            _accelerator(value.split(":"), "")
        elif key in ("pflash0", "pflash1"):
            wishes.flash[key] = value
        elif key == "dump-guest-core":
            wishes.dump_guest_core = switch_of(key, value)
        elif key not in ("usb", "mem-merge") or switch_of(key, value):
            raise BadOption(f"Property '{wishes.board}-machine.{key}' not found")


def _accel(wishes: Wishes, option: Option) -> None:
    words = key_values(option, "accel")
    if words.get("accel") in ("help", "?"):
        wishes.questions.append("accel")
        return
    _accelerator([words.pop("accel", "")], f"{option.text}: ")
    for key in words.keys() - {"thread", "tb-size", "one-insn-per-tb"}:
        raise option.refused(f"Property 'tcg-accel.{key}' not found")


def _accelerator(names: list[str], prefix: str) -> None:
    if "tcg" not in names:
        raise BadOption(f"{prefix}invalid accelerator {names[0]}")


def _memory(wishes: Wishes, option: Option) -> None:
    words = key_values(option, "size")
    refuse_unknown(option, "memory", words)
    wishes.memory = size(option, "size", words.get("size", "0")) or 128 << 20


def _smp(wishes: Wishes, option: Option) -> None:
    words = key_values(option, "cpus")
    for key in words:
        if key not in PARAMETERS["smp-opts"]:
            raise BadOption(f"Parameter 'smp.{key}' is unexpected")
    for key, value in words.items():
        if not value.isdigit():
            raise BadOption(f"Parameter 'smp.{key}' expects integer")
        wishes.processors = max(wishes.processors, int(value))


def _cpu(wishes: Wishes, option: Option) -> None:
    model, _, rest = option.value.partition(",")
    if model in ("help", "?"):
        wishes.questions.append("cpu")
    elif model not in CPU_MODELS:
        raise BadOption(f"unable to find CPU model '{model}'")
    elif rest:
        key = rest.partition("=")[0]
        raise BadOption(
            f"can't apply global {model}-riscv-cpu.{rest}: Property '{model}-riscv-cpu.{key}' not found"
        )


def _icount(wishes: Wishes, option: Option) -> None:
    words = key_values(option, "shift")
    refuse_unknown(option, "icount", words)
    shift = words.get("shift", "")
    if not shift.isdigit() or int(shift) > _MAX_SHIFT:
        raise option.refused("icount: Invalid shift value")
    wishes.icount = int(shift)


def _name(wishes: Wishes, option: Option) -> None:
    words = key_values(option, "guest")
    refuse_unknown(option, "name", words)
    wishes.name = words.get("guest", wishes.name)


def _uuid(wishes: Wishes, option: Option) -> None:
    if not _UUID.fullmatch(option.value):
        raise option.refused("failed to parse UUID string: wrong format")
    wishes.uuid = option.value.lower()


def _drive(wishes: Wishes, option: Option) -> None:
    words = key_values(option, "file")
    bus = words.get("if", "virtio")
    if bus not in ("none", "virtio", "pflash"):
        if bus in ("ide", "scsi", "floppy", "mtd", "sd", "xen"):
            raise option.refused(f"machine type does not support if={bus},bus=0,unit=0")
        raise option.refused(f"unsupported bus type '{bus}'")
    driver = words.get("format") or words.get("driver")
    node = {key: value for key, value in words.items() if key not in _DRIVE_WORDS}
    if driver is not None:
        node = {"driver": driver, **node}
    if "file" in words:
        node |= {"file.driver": "file", "file.filename": words["file"]}
    if not node:
        _refuse_empty(option, bus)
    elif "readonly" in words and switch(option, "read-only", words["readonly"]):
        node["read-only"] = "on"
    if bus == "pflash":
        bank = words.get(
            "unit", words.get("index", str(sum(drive.bus == "pflash" for drive in wishes.drives)))
        )
        wishes.flash[f"pflash{bank}"] = name = words.get("id", f"pflash{bank}")
    else:
        name = words.get("id", f"{bus}{sum(drive.bus == bus for drive in wishes.drives)}")
    if not _IDENTIFIER.fullmatch(name):
        raise option.refused(
            "Parameter 'id' expects an identifier\n"
            "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
        )
    if "id" in words and any(drive.name == name for drive in wishes.drives):
        raise option.refused(f"Duplicate ID '{name}' for drive")
    policy = {key: value for key, value in words.items() if key in ("werror", "rerror")}
    wishes.drives.append(Drive(name, bus, node, policy, option))


def _refuse_empty(option: Option, bus: str) -> None:
    """A device of the guest's cannot be without a medium; a drive that waits for none can."""
    if bus == "virtio":
        raise option.refused("Device needs media, but drive is empty")
    if bus == "pflash":
        raise BadOption("can't get size of pflash0 block backend: No medium found")


def _disk_image(wishes: Wishes, option: Option) -> None:
    number = sum(drive.bus == "virtio" for drive in wishes.drives)
    node = {"file.driver": "file", "file.filename": option.value}
    wishes.drives.append(Drive(f"virtio{number}", "virtio", node, {}, option))


def _device(wishes: Wishes, option: Option) -> None:
    words = key_values(option, "driver")
    kind = words.pop("driver", "")
    if kind in ("help", "?"):
        wishes.questions.append("device")
        return
    if kind not in DEVICES:
        raise option.refused(f"'{kind}' is not a valid device model name")
    known = {"id", "bus", *(each.name for each in DEVICES[kind])}
    for key in words:
        if key not in known:
            raise option.refused(f"Property '{kind}.{key}' not found")
    if kind == "virtio-blk-device" and "drive" not in words:
        raise option.refused("drive property not set")
    if wishes.board == "none":
        raise option.refused(f"No 'virtio-bus' bus found for device '{kind}'")
    words.pop("bus", None)
    # no-boot-order
    if not words.pop("bootindex", "0").lstrip("-").isdecimal():
        raise option.refused("Parameter 'bootindex' expects an int64 value or range")
    if (cache := words.pop("write-cache", "on")) not in ("on", "auto"):
        raise option.refused(f"Parameter 'write-cache' does not accept value '{cache}'")
    if (source := words.pop("rng", None)) is not None:
        if source not in wishes.objects:
            raise option.refused(f"Device '{source}' not found")
        if not wishes.objects[source].startswith("rng-"):
            raise option.refused("Invalid parameter type for 'rng', expected: rng-backend")
    words = {
        key: value
        for key, value in words.items()
        if (key, value) not in (("werror", "auto"), ("rerror", "auto"))
    }
    wishes.devices.append(Device(DeviceOptions(kind, words), option))


def _chardev(wishes: Wishes, option: Option) -> None:
    words = key_values(option, "backend")
    kind = words.get("backend", "")
    name = words.pop("id", None)
    if name is None:
        raise option.refused("chardev: no id specified")
    if name in wishes.chardevs:
        raise option.refused(f"Duplicate ID '{name}' for chardev")
    wishes.chardevs[name] = _with_descriptor(wishes, option, backend(option, kind, words))


def _with_descriptor(wishes: Wishes, option: Option, device: Chardev) -> Chardev:
    """:raise BadOption: its descriptor is another device's, or there is none that fits."""
    if isinstance(device.address, FdAddress):
        # Who is done with a socket closes it: a second device would be at whatever has its number by then.
        if device.address.fd in wishes.sockets:
            raise option.refused(f"File descriptor '{device.address.fd}' is in use")
        wishes.sockets.append(device.address.fd)
    if device.kind == "file" and str(device.path).startswith("/dev/fdset/"):
        if str(device.path) not in wishes.fd_sets:
            raise option.refused(f"Could not open '{device.path}': No such file or directory")
        for fd in wishes.fd_sets[str(device.path)]:
            # Of a set QEMU takes the first that was opened in the way in which it would have opened the file.
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                return Chardev("file", fd=fd)
        raise option.refused(f"Could not open '{device.path}': Permission denied")
    return device


def _character(wishes: Wishes, option: Option) -> Chardev | str | None:
    found = character(option)
    return _with_descriptor(wishes, option, found) if isinstance(found, Chardev) else found


def _serial(wishes: Wishes, option: Option) -> None:
    found = _character(wishes, option)
    if wishes.serial is not None:
        raise option.refused("there is one serial port")
    wishes.serial = (option, Chardev("null") if found is None else found)


def _monitor_at(mode: str) -> Callable[[Wishes, Option], None]:
    def monitor(wishes: Wishes, option: Option) -> None:
        found = _character(wishes, option)
        if found is not None:
            wishes.monitors.append((option, mode, found))

    return monitor


def _mon(wishes: Wishes, option: Option) -> None:
    words = key_values(option, "chardev")
    mode = words.get("mode", "readline")
    if mode not in ("control", "readline"):
        raise option.refused(f"Parameter 'mode' does not accept value '{mode}'")
    refuse_unknown(option, "mon", words)
    if "chardev" not in words:
        raise option.refused("chardev is required")
    wishes.monitors.append((option, mode, words["chardev"]))


def _msg(wishes: Wishes, option: Option) -> None:
    words = key_values(option)
    refuse_unknown(option, "msg", words)
    wishes.timestamps = switch(option, "timestamp", words.get("timestamp", "off"))


def _object(wishes: Wishes, option: Option) -> None:
    identity, kind = read_object(option)
    if identity in wishes.objects:
        raise option.refused(f"Duplicate ID '{identity}' for object")
    wishes.objects[identity] = kind


def _add_fd(wishes: Wishes, option: Option) -> None:
    words = key_values(option)
    refuse_unknown(option, "add-fd", words)
    for key in ("fd", "set"):
        if not words.get(key, "0").isdecimal():
            raise option.refused(f"Parameter '{key}' expects a number")
    if "fd" not in words:
        raise option.refused("fd option is required and must be non-negative")
    fd = int(words["fd"])
    if fd <= 2:
        raise option.refused("fd cannot be a standard I/O stream")
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        raise option.refused("fd is not valid or already in use") from None
    wishes.fd_sets.setdefault(f"/dev/fdset/{int(words.get('set', '0'))}", []).append(fd)


def _none_only(wishes: Wishes, option: Option) -> None:
    """Options of things that we have none of, and that may be told so."""
    if option.value.partition(",")[0] != "none":
        what = {"display": "type"}.get(option.name, option.name)
        raise option.refused(f"Parameter '{what}' does not accept value '{option.value}'")


def _set(attribute: str, make: Callable[[str], object]) -> Callable[[Wishes, Option], None]:
    def keep(wishes: Wishes, option: Option) -> None:
        setattr(wishes, attribute, make(option.value))

    return keep


def _bios(wishes: Wishes, option: Option) -> None:
    wishes.bios = None if option.value in ("none", "default") else Path(option.value)


def _ask(question: str) -> Callable[[Wishes, Option], None]:
    return lambda wishes, option: wishes.questions.append(question)


@dataclass(frozen=True, slots=True)
class Known:
    """An option that there is.

    :param usage: what follows it; "" for nothing. :param text: what it does.
    """

    read: Callable[[Wishes, Option], None]
    usage: str
    text: str


def _yes(attribute: str) -> Callable[[Wishes, Option], None]:
    return _set(attribute, lambda _: True)


OPTIONS: Mapping[str, Known] = {
    "h": Known(_ask("help"), "", "as -help"),
    "help": Known(_ask("help"), "", "show these lines"),
    "version": Known(_ask("version"), "", "show whose words are spoken, and who speaks"),
    "machine": Known(
        _machine, "[type=]name[,accel=tcg][,pflash0=node]", "the board; -machine help lists them"
    ),
    "M": Known(_machine, "name", "as -machine"),
    "cpu": Known(_cpu, "model", "the processor; -cpu help lists them"),
    "accel": Known(_accel, "[accel=]tcg", "what runs the guest's instructions"),
    "smp": Known(_smp, "[cpus=]n", "the number of processors: one"),
    "m": Known(_memory, "[size=]megs", "the guest's memory"),
    "name": Known(_name, "[guest=]name", "what the machine is called"),
    "uuid": Known(_uuid, "uuid", "the machine's UUID"),
    "device": Known(_device, "driver[,key=value...]", "a device; -device help lists them"),
    "blockdev": Known(lambda w, o: w.blockdevs.append(o), "options", "a node: JSON or dotted keys"),
    "drive": Known(
        _drive, "file=path,format=driver,if=none|virtio|pflash,id=name...", "a node by a name, or a disk"
    ),
    "display": Known(_none_only, "none", "there is no display"),
    "vga": Known(_none_only, "none", "there is no display"),
    "net": Known(_none_only, "none", "there is no network"),
    "nic": Known(_none_only, "none", "there is no network"),
    "parallel": Known(_none_only, "none", "there is no parallel port"),
    "audiodev": Known(lambda w, o: check_audio(o), "none,id=name", "there is no sound"),
    "nographic": Known(_yes("nographic"), "", "the console on standard input and output"),
    "kernel": Known(_set("kernel", Path), "file", "a riscv64 kernel"),
    "initrd": Known(_set("initrd", Path), "file", "its initial file system"),
    "append": Known(_set("append", str), "words", "its command line"),
    "bios": Known(_bios, "file", "firmware, started in S mode"),
    "chardev": Known(_chardev, "stdio|null|file|pty|socket,id=name...", "where characters go"),
    "qmp": Known(_monitor_at("control"), "place", "a monitor for programs"),
    "monitor": Known(_monitor_at("readline"), "place", "a monitor for people"),
    "mon": Known(_mon, "[chardev=]name[,mode=readline|control]", "a monitor at a -chardev"),
    "serial": Known(_serial, "place", "the guest's serial port"),
    "pidfile": Known(_set("pidfile", Path), "file", "where the process's number is written"),
    "daemonize": Known(_yes("daemonize"), "", "go on in the background"),
    "S": Known(_yes("paused"), "", "wait for `cont`"),
    "icount": Known(_icount, "[shift=]n", "time from the instructions counted"),
    "loadvm": Known(_set("loadvm", str), "tag", "begin with a snapshot"),
    "nodefaults": Known(_yes("bare"), "", "no devices that were not asked for"),
    "object": Known(_object, "rng-builtin|rng-random|secret,id=name...", "a source of entropy: the kernel"),
    "add-fd": Known(_add_fd, "fd=n,set=n", "a descriptor as the file /dev/fdset/n of a -chardev"),
    "rtc": Known(lambda w, o: check_setting(o), "base=utc", "the real-time clock: the host's, in UTC"),
    "overcommit": Known(lambda w, o: check_setting(o), "mem-lock=off", "memory is not locked"),
    "boot": Known(lambda w, o: check_boot(o), "strict=on|off", "accepted: nobody reads an order"),
    "msg": Known(_msg, "timestamp=on|off", "errors begin with the time"),
    "no-user-config": Known(lambda wishes, option: None, "", "accepted: there are no such files"),
    "no-shutdown": Known(_yes("keep_after_shutdown"), "", "stay when the guest powers itself off"),
}
"""Every option, by its name without dashes."""


_FIRST = ("msg", "machine", "M", "add-fd", "object")
"""How errors are said; then the board, of which a device says what it wants, and what others name."""


def read_wishes(options: tuple[Option, ...], wishes: Wishes) -> None:
    """:param wishes: what was asked for is put there, as far as it was read. :raise BadOption: in QEMU's words."""
    for option in sorted(options, key=lambda option: (*_FIRST, option.name).index(option.name)):
        if option.name == "":
            _disk_image(wishes, option)
        else:
            OPTIONS[option.name].read(wishes, option)
    if wishes.processors > 1:
        raise BadOption(
            f"Invalid SMP CPUs {wishes.processors}. The max CPUs supported by machine '{wishes.board}' is 1"
        )
    for given, name in ((wishes.initrd, "initrd"), (wishes.append, "append")):
        if given and wishes.kernel is None:
            raise BadOption(f"-{name} only allowed with -kernel option")
    if wishes.board == "none" and wishes.kernel is not None:
        raise BadOption("The -kernel parameter is not supported (use the generic 'loader' device instead).")
