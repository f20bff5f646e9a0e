"""The board `virt`: the memory map of QEMU's riscv64 `virt`, with one hart and the firmware built in.

    0x00100000  power off, reset (syscon)      0x10001000 + 0x1000 n  virtio slot n, 0 to 7    irq 1 + n
    0x00101000  RTC                  irq 11    0x20000000, 0x22000000  flash banks of 32 MiB
    0x00102000  generation id        irq 12    0x80000000  RAM
    0x0c000000  PLIC                           0x80200000  where a kernel usually goes
    0x10000000  UART                 irq 10

Drives take the slots from 0 on, the entropy device has the last. Kernel or firmware start in S mode with the hart's number in a0
and the device tree's address in a1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stillframe.block.node import Node as BlockNode
from stillframe.errors import InvalidRequest, LimitReached
from stillframe.events import EventBus
from stillframe.machine.boards.fdt import U64, Node
from stillframe.machine.clock import VirtualClock
from stillframe.machine.console import Console
from stillframe.machine.devices import Device, flash, rtc, vmgenid
from stillframe.machine.devices.flash import Flash
from stillframe.machine.devices.plic import SOURCES, Plic
from stillframe.machine.devices.rtc import Rtc
from stillframe.machine.devices.sbi import TICK_NS, Sbi
from stillframe.machine.devices.uart import Uart
from stillframe.machine.devices.virtio_blk import ID_LENGTH, ErrorPolicy, VirtioBlk
from stillframe.machine.devices.virtio_mmio import (
    REGION_SIZE,
    VirtioDevice,
    empty_slot_read,
    empty_slot_write,
)
from stillframe.machine.devices.virtio_rng import VirtioRng
from stillframe.machine.devices.vmgenid import VmGenerationId
from stillframe.machine.engines import Engine, EnvironmentCall, MmioRegion
from stillframe.machine.loader import Blob, Program, below, load_firmware, load_kernel, read_initrd
from stillframe.machine.machine import Board, Disk, Machine
from stillframe.machine.mailbox import Mailbox
from stillframe.machine.memory import GuestMemory, MemoryBlock

RAM_BASE, RAM_NAME = 0x8000_0000, "riscv_virt_board.ram"
FLASH_BASE, FLASH_BANKS = 0x2000_0000, 2
VIRTIO_BASE, VIRTIO_SLOTS, VIRTIO_IRQ = 0x1000_1000, 8, 1
_FINISHER, _RTC, _VMGENID, _PLIC, _UART = 0x10_0000, 0x10_1000, 0x10_2000, 0xC00_0000, 0x1000_0000
_UART_IRQ, _RTC_IRQ, _VMGENID_IRQ = 10, 11, 12
_PLIC_SIZE = 0x60_0000
_PAGE = 4096
_MINIMUM_RAM, _MAXIMUM_RAM = 4 << 20, 256 << 30
_TREE_ROOM = 64 << 10
_EXTERNAL, _MACHINE_EXTERNAL = 9, 11
_ISA = ("i", "m", "a", "f", "d", "c", "zicsr", "zifencei")
_POWER_OFF, _RESET = 0x5555, 0x7777


@dataclass(frozen=True, slots=True)
class Drive:
    """A virtio-blk device to be made; see `build.DriveConfig`."""

    node: BlockNode
    device_id: str | None = None
    serial: str = ""
    policy: ErrorPolicy = field(default_factory=ErrorPolicy)


@dataclass(frozen=True, slots=True)
class VirtConfig:
    """What is on the board; see `build.MachineConfig`."""

    name: str | None
    memory_size: int
    kernel: Path | None
    initrd: Path | None
    append: str
    bios: Path | None
    drives: tuple[Drive, ...]
    flash: tuple[BlockNode, ...]
    entropy: bool
    console: Console
    icount_shift: int | None
    exit_on_shutdown: bool


MakeEngine = Callable[[VirtualClock, EnvironmentCall], Engine]


def _refuse_what_does_not_fit(config: VirtConfig) -> None:
    if not _MINIMUM_RAM <= config.memory_size <= _MAXIMUM_RAM or config.memory_size % _PAGE:
        raise InvalidRequest(
            f"{config.memory_size} bytes of memory: the board takes {_MINIMUM_RAM >> 20} MiB to "
            f"{_MAXIMUM_RAM >> 30} GiB in whole pages of {_PAGE}"
        )
    if len(config.drives) > VIRTIO_SLOTS - 1:
        raise LimitReached(f"{len(config.drives)} drives: the board has room for {VIRTIO_SLOTS - 1}")
    if len(config.flash) > FLASH_BANKS:
        raise LimitReached(f"{len(config.flash)} flash nodes: the board has {FLASH_BANKS} banks")
    if config.kernel is None and config.bios is None:
        raise InvalidRequest("There is nothing to start", remedy="Give --kernel, or --bios.")
    if config.initrd is not None and config.kernel is None:
        raise InvalidRequest("An initrd without a kernel", remedy="Give --kernel too.")
    for drive in config.drives:
        if len(drive.serial.encode()) > ID_LENGTH:
            raise InvalidRequest(f"The serial '{drive.serial}' is longer than {ID_LENGTH} bytes")


class VirtBoard:
    """Everything on the board, wired. :param make_engine: gets clock and firmware.

    :raise Refused: the configuration does not fit, or a file is not what it is given as.
    """

    def __init__(self, config: VirtConfig, make_engine: MakeEngine, events: EventBus) -> None:
        _refuse_what_does_not_fit(config)
        self._config = config
        self._counted = config.icount_shift is not None
        self._machine: Machine | None = None
        self._program = self._load()
        self._initrd = b"" if config.initrd is None else read_initrd(config.initrd, config.memory_size)
        self.mailbox = Mailbox()
        self.clock = VirtualClock(icount_shift=config.icount_shift)
        banks = [
            MemoryBlock.allocate(
                f"virt.flash{bank}", FLASH_BASE + bank * flash.BANK_SIZE, flash.BANK_SIZE, is_ram=False
            )
            for bank in range(len(config.flash))
        ]
        ram = MemoryBlock.allocate(RAM_NAME, RAM_BASE, config.memory_size, is_ram=True)
        self.memory = GuestMemory((ram, *banks))
        self.plic = Plic(self._drive_external)
        self.uart = Uart(self._line(_UART_IRQ), config.console, self.mailbox)
        self.sbi = Sbi(
            self.memory,
            self.clock,
            transmit=self.uart.transmit,
            take_input=config.console.take,
            shut_down=lambda: self._of_machine().request_shutdown(),
            restart=lambda: self._of_machine().request_reset(),
        )
        self.rtc = Rtc(self._line(_RTC_IRQ), self.clock)
        self.vmgenid = VmGenerationId(lambda: self.plic.pulse(_VMGENID_IRQ), deterministic=self._counted)
        self.flash = [Flash(bank, banks[bank], node) for bank, node in enumerate(config.flash)]
        self.virtio = self._virtio(events)
        self.engine = make_engine(self.clock, self.sbi.call)
        self.sbi.attach(self.engine)
        self.engine.attach(self.memory, self._regions())
        self._images = self._place()

    def _of_machine(self) -> Machine:
        if self._machine is None:
            raise RuntimeError("the board runs before it is part of a machine")
        return self._machine

    def attach(self, machine: Machine) -> None:
        """What the guest asks of its machine goes there."""
        self._machine = machine

    def board(self) -> Board:
        """As the machine knows it."""
        disks = [
            Disk(f.section_name, f.node.node_name, firmware=True, writable=not f.node.read_only)
            for f in self.flash
        ]
        disks += [
            Disk(
                blk.device_id,
                blk.node.node_name,
                firmware=False,
                writable=not blk.node.read_only,
                io_status=blk.io_status,
            )
            for blk in self.virtio.values()
            if isinstance(blk, VirtioBlk)
        ]
        devices: Sequence[Device] = (
            self.sbi,
            self.plic,
            self.uart,
            *self.virtio.values(),
            self.rtc,
            self.vmgenid,
            *self.flash,
        )
        return Board("virt", devices=devices, disks=disks, power_on=self.power_on)

    def power_on(self) -> None:
        """Everything that is loaded goes to RAM, the processor to its entry; other RAM keeps what it has, as in QEMU."""
        for blob in self._images:
            self.memory.write(blob.address, blob.data)
        self.engine.reset(self._program.entry, (0, self._images[-1].address))

    # Wiring

    def _line(self, source: int) -> Callable[[bool], None]:
        return lambda raised: self.plic.set_line(source, raised)

    def _drive_external(self, raised: bool) -> None:
        engine: Engine | None = getattr(self, "engine", None)
        if engine is not None:
            engine.set_interrupt(_EXTERNAL, raised=raised)

    @staticmethod
    def _device_id(slot: int, drive: Drive) -> str:
        return drive.device_id or f"virtio-mmio-bus.{slot}"

    def _virtio(self, events: EventBus) -> dict[int, VirtioDevice]:
        devices: dict[int, VirtioDevice] = {}
        for slot, drive in enumerate(self._config.drives):
            devices[slot] = VirtioBlk(
                self.memory,
                self._line(VIRTIO_IRQ + slot),
                node=drive.node,
                device_id=self._device_id(slot, drive),
                serial=drive.serial,
                policy=drive.policy,
                mailbox=self.mailbox,
                events=events,
                stop=lambda state: self._of_machine().request_stop(state),
                synchronous=self._counted,
            )
        last = VIRTIO_SLOTS - 1
        if self._config.entropy:
            devices[last] = VirtioRng(self.memory, self._line(VIRTIO_IRQ + last), deterministic=self._counted)
        return devices

    def _finish(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and value & 0xFFFF == _POWER_OFF:
            self._of_machine().request_shutdown()
        elif offset == 0 and value & 0xFFFF == _RESET:
            self._of_machine().request_reset()

    def _regions(self) -> tuple[MmioRegion, ...]:
        regions = [
            MmioRegion(_FINISHER, _PAGE, lambda offset, size: 0, self._finish),
            MmioRegion(_RTC, rtc.REGION_SIZE, self.rtc.read, self.rtc.write),
            MmioRegion(_VMGENID, vmgenid.REGION_SIZE, self.vmgenid.read, self.vmgenid.write),
            MmioRegion(_PLIC, _PLIC_SIZE, self.plic.read, self.plic.write),
            MmioRegion(_UART, _PAGE, self.uart.read, self.uart.write),
        ]
        for slot in range(VIRTIO_SLOTS):
            device = self.virtio.get(slot)
            read, write = (
                (empty_slot_read, empty_slot_write) if device is None else (device.read, device.write)
            )
            regions.append(MmioRegion(VIRTIO_BASE + slot * REGION_SIZE, REGION_SIZE, read, write))
        regions += [MmioRegion(f.block.base, f.block.size, f.read, f.write) for f in self.flash]
        return tuple(regions)

    # What is loaded

    def _load(self) -> Program:
        config = self._config
        programs = []
        if config.bios is not None:
            programs.append(load_firmware(config.bios, RAM_BASE, config.memory_size))
        if config.kernel is not None:
            programs.append(load_kernel(config.kernel, RAM_BASE, config.memory_size))
        blobs = tuple(blob for program in programs for blob in program.blobs)
        return Program(blobs, programs[0].entry, max(program.end for program in programs))

    def _place(self) -> tuple[Blob, ...]:
        """All that power-on puts into RAM; the device tree last."""
        top = RAM_BASE + self._config.memory_size
        tree_at = below(top, _TREE_ROOM, self._program.end, "device tree")
        initrd = Blob(below(tree_at, len(self._initrd), self._program.end, "initrd"), self._initrd)
        tree = self.device_tree(initrd)
        if len(tree) > _TREE_ROOM:
            raise LimitReached("The device tree is too long; is --append?")
        initrds = (initrd,) if self._initrd else ()
        return (*self._program.blobs, *initrds, Blob(tree_at, tree))

    def device_tree(self, initrd: Blob) -> bytes:
        """The board described to the guest (devicetree specification v0.4, and the kernel's bindings)."""
        root = Node("").set("#address-cells", 2).set("#size-cells", 2)
        root.set("compatible", "riscv-virtio", "stillframe,virt").set("model", "stillframe,virt")
        chosen = root.add(Node("chosen"))
        chosen.set("bootargs", self._config.append).set("stdout-path", f"/soc/serial@{_UART:x}")
        if initrd.data:
            chosen.set("linux,initrd-start", U64(initrd.address))
            chosen.set("linux,initrd-end", U64(initrd.address + len(initrd.data)))
        memory = root.add(Node(f"memory@{RAM_BASE:x}")).set("device_type", "memory")
        memory.set("reg", U64(RAM_BASE), U64(self._config.memory_size))
        hart = self._add_cpus(root)
        for bank in self.flash:
            node = root.add(Node(f"flash@{bank.block.base:x}")).set("compatible", "cfi-flash")
            node.set("reg", U64(bank.block.base), U64(bank.block.size)).set("bank-width", 4)
        soc = root.add(Node("soc")).set("#address-cells", 2).set("#size-cells", 2)
        soc.set("compatible", "simple-bus").set("ranges")
        plic = soc.add(Node(f"plic@{_PLIC:x}")).set("compatible", "sifive,plic-1.0.0", "riscv,plic0")
        plic.set("reg", U64(_PLIC), U64(_PLIC_SIZE)).set("#interrupt-cells", 1).set("#address-cells", 0)
        plic.set("interrupt-controller").set("riscv,ndev", SOURCES - 1)
        plic.set("interrupts-extended", hart, _MACHINE_EXTERNAL, hart, _EXTERNAL)

        def add(name: str, base: int, size: int, irq: int, *compatible: str) -> Node:
            node = soc.add(Node(f"{name}@{base:x}")).set("compatible", *compatible)
            node.set("reg", U64(base), U64(size))
            return node.set("interrupt-parent", plic).set("interrupts", irq)

        add("serial", _UART, 0x100, _UART_IRQ, "ns16550a").set("clock-frequency", 3686400)
        add("rtc", _RTC, _PAGE, _RTC_IRQ, "google,goldfish-rtc")
        add("vmgenid", _VMGENID, _PAGE, _VMGENID_IRQ, "microsoft,vmgenid")
        for slot in range(VIRTIO_SLOTS):
            add(
                "virtio_mmio", VIRTIO_BASE + slot * REGION_SIZE, REGION_SIZE, VIRTIO_IRQ + slot, "virtio,mmio"
            )
        test = soc.add(Node(f"test@{_FINISHER:x}"))
        test.set("compatible", "sifive,test1", "sifive,test0", "syscon").set(
            "reg", U64(_FINISHER), U64(_PAGE)
        )
        for name, value in (("poweroff", _POWER_OFF), ("reboot", _RESET)):
            node = root.add(Node(name)).set("compatible", f"syscon-{name}").set("regmap", test)
            node.set("offset", 0).set("value", value)
        return root.to_dtb()

    @staticmethod
    def _add_cpus(root: Node) -> Node:
        cpus = root.add(Node("cpus")).set("#address-cells", 1).set("#size-cells", 0)
        cpus.set("timebase-frequency", 10**9 // TICK_NS)
        cpu = cpus.add(Node("cpu@0")).set("device_type", "cpu").set("reg", 0).set("status", "okay")
        cpu.set("compatible", "riscv").set("riscv,isa", "rv64" + "".join(_ISA[:6]) + "_" + "_".join(_ISA[6:]))
        cpu.set("riscv,isa-base", "rv64i").set("riscv,isa-extensions", *_ISA).set("mmu-type", "riscv,sv48")
        intc = cpu.add(Node("interrupt-controller")).set("compatible", "riscv,cpu-intc")
        return intc.set("#interrupt-cells", 1).set("interrupt-controller")
