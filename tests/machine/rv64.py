"""A little RV64 assembler: enough for the programs of these tests, so that they need no compiler."""

import struct

X = {
    name: number
    for number, name in enumerate(
        [
            "zero",
            "ra",
            "sp",
            "gp",
            "tp",
            "t0",
            "t1",
            "t2",
            "s0",
            "s1",
            "a0",
            "a1",
            "a2",
            "a3",
            "a4",
            "a5",
            "a6",
            "a7",
            "s2",
            "s3",
            "s4",
            "s5",
            "s6",
            "s7",
            "s8",
            "s9",
            "s10",
            "s11",
            "t3",
            "t4",
            "t5",
            "t6",
        ]
    )
}
CSR = {
    "sstatus": 0x100,
    "sie": 0x104,
    "stvec": 0x105,
    "sscratch": 0x140,
    "sepc": 0x141,
    "scause": 0x142,
    "stval": 0x143,
    "sip": 0x144,
    "satp": 0x180,
    "fcsr": 0x003,
    "time": 0xC01,
}


class Program:
    """Instructions in order; branches name labels, which may come later."""

    def __init__(self, base: int = 0x8000_0000) -> None:
        self.base = base
        self._words: list[int] = []
        self._labels: dict[str, int] = {}
        self._fixups: list[tuple[int, str, str]] = []

    def label(self, name: str) -> None:
        self._labels[name] = 4 * len(self._words)

    def word(self, value: int) -> None:
        self._words.append(value & 0xFFFF_FFFF)

    def _i(self, opcode: int, funct: int, rd: str, rs: str, immediate: int) -> None:
        assert -2048 <= immediate < 2048
        self.word((immediate & 0xFFF) << 20 | X[rs] << 15 | funct << 12 | X[rd] << 7 | opcode)

    def addi(self, rd: str, rs: str, immediate: int) -> None:
        self._i(0x13, 0, rd, rs, immediate)

    def slli(self, rd: str, rs: str, amount: int) -> None:
        self._i(0x13, 1, rd, rs, amount)

    def andi(self, rd: str, rs: str, immediate: int) -> None:
        self._i(0x13, 7, rd, rs, immediate)

    def add(self, rd: str, rs: str, rt: str) -> None:
        self.word(X[rt] << 20 | X[rs] << 15 | X[rd] << 7 | 0x33)

    def load(self, rd: str, base: str, offset: int = 0, *, size: int = 8) -> None:
        self._i(0x03, {1: 4, 2: 5, 4: 6, 8: 3}[size], rd, base, offset)

    def store(self, rs: str, base: str, offset: int = 0, *, size: int = 8) -> None:
        funct = {1: 0, 2: 1, 4: 2, 8: 3}[size]
        high, low = (offset & 0xFFF) >> 5, offset & 31
        self.word(high << 25 | X[rs] << 20 | X[base] << 15 | funct << 12 | low << 7 | 0x23)

    def amoadd(self, rd: str, rs: str, base: str) -> None:
        self.word(X[rs] << 20 | X[base] << 15 | 3 << 12 | X[rd] << 7 | 0x2F)

    def load_reserved(self, rd: str, base: str) -> None:
        self.word(0x1000_0000 | X[base] << 15 | 3 << 12 | X[rd] << 7 | 0x2F)

    def store_conditional(self, rd: str, rs: str, base: str) -> None:
        self.word(0x1800_0000 | X[rs] << 20 | X[base] << 15 | 3 << 12 | X[rd] << 7 | 0x2F)

    def csrw(self, csr: str, rs: str) -> None:
        self.word(CSR[csr] << 20 | X[rs] << 15 | 1 << 12 | 0x73)

    def csrr(self, rd: str, csr: str) -> None:
        self.word(CSR[csr] << 20 | 2 << 12 | X[rd] << 7 | 0x73)

    def csrs(self, csr: str, rs: str) -> None:
        self.word(CSR[csr] << 20 | X[rs] << 15 | 2 << 12 | 0x73)

    def ecall(self) -> None:
        self.word(0x73)

    def ebreak(self) -> None:
        self.word(0x0010_0073)

    def sret(self) -> None:
        self.word(0x1020_0073)

    def wfi(self) -> None:
        self.word(0x1050_0073)

    def branch(self, kind: str, rs: str, rt: str, label: str) -> None:
        funct = {"eq": 0, "ne": 1, "lt": 4, "ge": 5}[kind]
        self._fixups.append((len(self._words), label, "branch"))
        self.word(X[rt] << 20 | X[rs] << 15 | funct << 12 | 0x63)

    def jump(self, label: str, rd: str = "zero") -> None:
        self._fixups.append((len(self._words), label, "jump"))
        self.word(X[rd] << 7 | 0x6F)

    def li(self, rd: str, value: int) -> None:
        """Any number below 2**63, 11 bits at a time."""
        assert 0 <= value < 1 << 63
        parts = [value >> shift & 0x7FF for shift in range(55, -1, -11)]
        while len(parts) > 1 and parts[0] == 0:
            parts.pop(0)
        self.addi(rd, "zero", parts[0])
        for part in parts[1:]:
            self.slli(rd, rd, 11)
            self.addi(rd, rd, part)

    def la(self, rd: str, label: str) -> None:
        """The address of a label: auipc and addi."""
        self._fixups.append((len(self._words), label, "address"))
        self.word(X[rd] << 7 | 0x17)
        self.addi(rd, rd, 0)

    def sbi(self, extension: int, function: int = 0) -> None:
        """An environment call with a0, a1 as they are."""
        self.li("a7", extension)
        self.addi("a6", "zero", function)
        self.ecall()

    def shut_down(self) -> None:
        self.addi("a0", "zero", 0)
        self.addi("a1", "zero", 0)
        self.sbi(0x53525354)

    def assemble(self) -> bytes:
        words = list(self._words)
        for index, label, kind in self._fixups:
            distance = self._labels[label] - 4 * index
            if kind == "branch":
                d = distance & 0x1FFF
                words[index] |= (
                    (d >> 12) << 31 | (d >> 5 & 63) << 25 | (d >> 1 & 15) << 8 | (d >> 11 & 1) << 7
                )
            elif kind == "jump":
                d = distance & 0x1FFFFF
                words[index] |= (
                    (d >> 20) << 31 | (d >> 1 & 1023) << 21 | (d >> 11 & 1) << 20 | (d >> 12 & 255) << 12
                )
            else:
                words[index] |= (distance + 0x800 & 0xFFFFF000) & 0xFFFF_FFFF
                words[index + 1] |= (distance & 0xFFF) << 20
        return struct.pack(f"<{len(words)}I", *words)
