"""The processor's machine state: every register that a guest in S and U mode can see or cause, by name.

Not here: the registers of the hypervisor extension, which this processor does not have, and the counters `cycle` and `instret`,
which are the host's.
"""

from stillframe.machine.devices import Device
from stillframe.machine.engines.unicorn import layout
from stillframe.machine.engines.unicorn.cpu import INTERRUPTS, MACHINE, SUPERVISOR, USER, Cpu
from stillframe.machine.engines.unicorn.library import Processor
from stillframe.vmstate.fields import Description, Field, Value, Values

_WORDS = {
    "pc": layout.AT_PC,
    "load_res": layout.LOAD_RES,
    "load_val": layout.LOAD_VAL,
    "frm": layout.FRM,
    "badaddr": layout.BADADDR,
    "priv_ver": 70,
    "misa": 71,
    "priv": layout.AT_PRIV,
    "mhartid": 77,
    "mstatus": layout.MSTATUS,
    "mip": layout.MIP,
    "mie": layout.MIE,
    "mideleg": 82,
    "satp": 84,
    "stval": layout.STVAL,
    "mtval": 86,
    "medeleg": 87,
    "stvec": layout.STVEC,
    "sepc": layout.SEPC,
    "scause": layout.SCAUSE,
    "mtvec": 91,
    "mepc": 92,
    "mcause": 93,
    "scounteren": 119,
    "mcounteren": 120,
    "sscratch": 121,
    "mscratch": 122,
}
_FIXED = ("priv_ver", "misa", "mhartid", "mideleg", "medeleg")
_PMP, _PMP_REGIONS = 126, 16
_ADDRESSING_MODES = (0, 8, 9, 10)


class CpuState(Device):
    """The section `cpu` of the one hart."""

    section_name = "cpu"
    description = Description(
        "riscv-cpu",
        version=1,
        fields=(
            Field("gpr", "uint64", count=32),
            Field("fpr", "uint64", count=32),
            Field("fflags", "uint8"),
            Field("halted", "bool"),
            *(Field(name, "uint64") for name in _WORDS),
            Field("pmpaddr", "uint64", count=_PMP_REGIONS),
            Field("pmpcfg", "uint8", count=_PMP_REGIONS),
        ),
    )

    def __init__(self, cpu: Cpu, processor: Processor) -> None:
        self._cpu = cpu
        self._processor = processor
        self.halted = False
        """It waits for an interrupt, after a WFI."""

    def save_state(self) -> Values:
        words = self._cpu.words()
        values: dict[str, Value] = {
            "gpr": tuple(words[layout.GPR : layout.GPR + 32]),
            "fpr": tuple(words[layout.FPR : layout.FPR + 32]),
            "fflags": self._cpu.fflags(),
            "halted": self.halted,
            "pmpaddr": tuple(words[_PMP : _PMP + 2 * _PMP_REGIONS : 2]),
            "pmpcfg": tuple(word & 0xFF for word in words[_PMP + 1 : _PMP + 2 * _PMP_REGIONS : 2]),
        }
        values.update({name: words[index] for name, index in _WORDS.items()})
        return values

    def check_state(self, values: Values) -> None:
        if self.integers(values, "gpr", 32)[0] != 0:
            raise self.refuse("gpr", "has a register x0 that is not zero")
        self.integers(values, "fpr", 32)
        self.integer(values, "fflags", maximum=31)
        self.integer(values, "halted", maximum=1)
        own = self._cpu.words()
        for name in _WORDS:
            value = self.integer(values, name)
            if name in _FIXED and value != own[_WORDS[name]]:
                raise self.refuse(name, f"is {value:#x}, this processor's is {own[_WORDS[name]]:#x}")
        self.integer(values, "frm", maximum=7)
        if self.integer(values, "priv", maximum=MACHINE) not in (USER, SUPERVISOR):
            raise self.refuse("priv", "is not U or S mode, the only ones that a guest runs in")
        if self.integer(values, "satp") >> 60 not in _ADDRESSING_MODES:
            raise self.refuse("satp", "asks for a translation that this processor does not have")
        for name in ("mip", "mie"):
            if self.integer(values, name) & ~INTERRUPTS:
                raise self.refuse(name, "has interrupts that this machine does not have")
        for name in ("pmpaddr", "pmpcfg"):
            if any(self.integers(values, name, _PMP_REGIONS)):
                raise self.refuse(name, "is set; only M mode could do that, and no guest runs in it")

    def load_state(self, values: Values) -> None:
        words = self._cpu.words()
        words[layout.GPR : layout.GPR + 32] = self.integers(values, "gpr", 32)
        words[layout.FPR : layout.FPR + 32] = self.integers(values, "fpr", 32)
        for name, index in _WORDS.items():
            words[index] = self.integer(values, name)
        self._cpu.set_words(words)
        self._cpu.set_fflags(self.integer(values, "fflags"))
        self.halted = bool(self.integer(values, "halted"))
        self._processor.forget_everything()
