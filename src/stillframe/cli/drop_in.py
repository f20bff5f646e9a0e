"""`stillframe-qemu`: a machine by QEMU's own command line, for programs that start a QEMU and know no other.

What our machine does not have is refused in QEMU's words; docs/differences.md says where it differs.
"""

import contextlib
import datetime
import os
import resource
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stillframe import __version__
from stillframe.cli.drop_in_options import OPTIONS, Drive, Wishes, read_wishes
from stillframe.cli.drop_in_parameters import PARAMETERS
from stillframe.cli.drop_in_words import BadOption, Option, split_words
from stillframe.cli.run_options import DeviceOptions, RunOptions
from stillframe.cli.serve import serve, start_detached
from stillframe.data import idle_firmware
from stillframe.errors import InvalidRequest, StillframeError
from stillframe.machine.catalogue import BOARDS, CPU_MODELS, DEVICES

if TYPE_CHECKING:
    from stillframe.block.graph import BlockGraph
    from stillframe.block.options import NodeOptions

PROGRAM = "stillframe-qemu"
_MODULE = "stillframe.cli.drop_in"
_QCOW2 = b"QFI\xfb"


def main() -> None:
    """The program; ends the process."""
    words, wishes = sys.argv[1:], Wishes()
    try:
        code = _run(words, wishes)
    except StillframeError as error:
        if wishes.timestamps:
            now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
            print(now.isoformat(timespec="microseconds"), end="Z ", file=sys.stderr)
        for line in str(error).splitlines():
            # QEMU's hints are lines of their own, without the program's name.
            hint = line.startswith(("Use -", "Optional suffix", "and exabytes", "Identifiers consist"))
            print(line if hint else f"{PROGRAM}: {line}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 1
    sys.stdout.flush()
    sys.exit(code)


def _run(words: list[str], wishes: Wishes) -> int:
    read_wishes(split_words(words, {name: bool(known.usage) for name, known in OPTIONS.items()}), wishes)
    if wishes.questions:
        print(_answer(wishes.questions[0]))
        return 0
    options = _run_options(wishes)
    if wishes.daemonize:
        for option in wishes.on_stdio():
            raise option.refused("cannot use stdio with -daemonize")
        undetached = [word for word in words if word.lstrip("-") != "daemonize"]
        return start_detached(_MODULE, undetached, wishes.descriptors())
    for descriptor in wishes.descriptors():
        os.set_inheritable(descriptor, False)
    if not wishes.dump_guest_core:
        # No dump at all has no memory of the guest.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with _pidfile(wishes):
        return serve(options, lambda graph: _add_nodes(graph, wishes), command_line=PARAMETERS)


def _answer(question: str) -> str:
    lists = {
        "accel": ["Accelerators supported in QEMU binary:", "tcg"],
        "cpu": ["Available CPUs:", *(f"  {model}" for model in sorted(CPU_MODELS))],
        "device": [f'name "{name}", bus virtio-bus' for name in DEVICES],
        "machine": ["Supported machines are:", *(f"{each.name:20} {each.text}" for each in BOARDS.values())],
    }
    version = f"QEMU emulator version 10.0.13 (stillframe-{__version__})"
    if question == "version":
        return version
    if question == "help":
        lines = [f"{f'-{name} {known.usage}':48} {known.text}" for name, known in OPTIONS.items()]
        return "\n".join([version, f"usage: {PROGRAM} [options] [disk_image]", "", *lines])
    return "\n".join(lists[question])


def _run_options(wishes: Wishes) -> RunOptions:
    disks = []
    for device in wishes.devices:
        if device.options.kind == "virtio-blk-device":
            policy = next((d.policy for d in wishes.drives if d.name == device.options.options["drive"]), {})
            disks.append(DeviceOptions("virtio-blk", {**policy, **device.options.options}))
    disks += [
        DeviceOptions("virtio-blk", {**drive.policy, "drive": drive.name})
        for drive in wishes.drives
        if drive.bus == "virtio"
    ]
    for option, path in (("kernel", wishes.kernel), ("bios", wishes.bios)):
        if path is not None and not path.exists():
            raise BadOption(
                f"could not load kernel '{path}'"
                if option == "kernel"
                else f'Unable to find the RISC-V BIOS "{path}"'
            )
    if wishes.initrd is not None and not wishes.initrd.exists():
        raise BadOption(f"could not load ramdisk '{wishes.initrd}'")
    entropy = [device for device in wishes.devices if device.options.kind == "virtio-rng-device"]
    nothing = wishes.board == "virt" and wishes.kernel is None and wishes.bios is None
    return RunOptions(
        name=wishes.name,
        uuid=wishes.uuid,
        board=wishes.board,
        memory=wishes.memory,
        kernel=wishes.kernel,
        initrd=wishes.initrd,
        append=wishes.append,
        # nothing-to-run-waits
        bios=idle_firmware() if nothing else wishes.bios,
        blockdevs=(),
        devices=tuple(disks),
        flash=tuple(wishes.flash[key] for key in sorted(wishes.flash)),
        monitors=wishes.places(),
        allow_local_users=True,
        console=wishes.console(),
        icount=wishes.icount,
        paused=wishes.paused,
        keep_after_shutdown=wishes.keep_after_shutdown,
        engine="unicorn",
        qemu="",
        agent=False,
        devices_as_given=(),
        reconnect=0,
        words=(),
        entropy=bool(entropy),
        entropy_id=next((device.options.options.get("id") for device in entropy), None),
        loadvm=wishes.loadvm,
    )


def _add_nodes(graph: "BlockGraph", wishes: Wishes) -> None:
    """Open what `-blockdev` and `-drive` say, and look for what `-device` names. :raise BadOption: in QEMU's words."""
    from stillframe.block.options import parse_options

    for option in wishes.blockdevs:
        with _naming(option):
            graph.blockdev_add(_node_options(option.value))
    for drive in wishes.drives:
        with _naming(drive.option):
            if not drive.node:
                graph.drive_add(drive.name, None)
                continue
            words = _with_driver(drive)
            text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in words.items())
            try:
                parsed = parse_options(text)
            except InvalidRequest as error:
                if str(error) == f"Parameter 'driver' does not accept value '{words['driver']}'":
                    raise InvalidRequest(f"Unknown driver '{words['driver']}'") from error
                if str(error) == "Parameter 'file' is missing":
                    raise InvalidRequest('A block device must be specified for "file"') from error
                raise
            graph.drive_add(drive.name, parsed)
    for device in wishes.devices:
        name = device.options.options.get("drive")
        if name is not None:
            with _naming(device.option):
                if name in [drive for drive, node in graph.drives() if node is None]:
                    raise InvalidRequest("Device needs media, but drive is empty")
                try:
                    graph.find(name)
                except StillframeError:
                    raise InvalidRequest(
                        f"Property '{device.options.kind}.drive' can't find value '{name}'"
                    ) from None


def _node_options(text: str) -> "NodeOptions":
    """What `-blockdev` says: JSON as lenient as a monitor's, or dotted keys."""
    from stillframe.block.options import parse_options, read_options
    from stillframe.monitor.wire import Decoder

    if not text.startswith("{"):
        return parse_options(text)
    for value in Decoder().feed(text.encode(errors="surrogateescape")):
        if isinstance(value, StillframeError):
            raise value
        return read_options(value)
    raise InvalidRequest("JSON parse error, premature EOI")


def _with_driver(drive: Drive) -> dict[str, str]:
    """The node's options, with a format that was not given found in the image.

    :raise InvalidRequest: it has none that a guest could not have written there (raw-is-said).
    """
    words = dict(drive.node)
    if "driver" in words:
        return words
    filename = words.get("file.filename", words.get("filename"))
    if filename is None:
        raise InvalidRequest("Must specify either driver or file")
    try:
        with open(filename, "rb") as file:
            found = file.read(len(_QCOW2))
    except OSError as error:
        raise InvalidRequest(f"Could not open '{filename}': {error.strerror}") from error
    if found != _QCOW2:
        raise InvalidRequest(
            f"Image format was not specified for '{filename}' and it is not qcow2: give format=raw"
        )
    return {"driver": "qcow2", **words}


@contextlib.contextmanager
def _naming(option: Option) -> Iterator[None]:
    """Errors inside name the option."""
    try:
        yield
    except StillframeError as error:
        raise option.refused(str(error)) from error


@contextlib.contextmanager
def _pidfile(wishes: Wishes) -> Iterator[None]:
    if wishes.pidfile is None:
        yield
        return
    path = wishes.pidfile.absolute()
    try:
        path.write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise BadOption(
            f"cannot create PID file: Could not create '{wishes.pidfile}': {error.strerror}"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
