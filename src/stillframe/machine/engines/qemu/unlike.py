"""Whether a stored state is of another machine than the one that runs, as far as its beginning tells: machine type and memory.

Whether a QEMU takes the state, that one alone can say. This is asked first where the guest is to be ended before it says so.
"""

import re
from typing import Final

from stillframe.errors import StateMismatch
from stillframe.machine.engines.qemu.monitor import QemuMonitor
from stillframe.vmstate.relayed import RelayedHead

_BLOCK: Final = re.compile(
    r"^ *(\S.*?) +\d+ \S+ +0x[0-9a-f]+ +0x([0-9a-f]+) +0x([0-9a-f]+)(?: |\r?$)", re.MULTILINE
)
"""A line of `info ramblock`: a name, the size of its pages, an offset, bytes in use, bytes that there may be."""


def refuse_unlike(monitor: QemuMonitor, head: RelayedHead) -> None:
    """:raise StateMismatch: the machine type, or a block of memory, is another."""
    kind = str(monitor.execute("qom-get", {"path": "/machine", "property": "type"})).removesuffix("-machine")
    if kind != head.machine:
        raise StateMismatch(
            f"Machine type received is '{head.machine}' and local is '{kind}'",
            section="configuration",
            remedy=f"Start the machine with --machine {head.machine}.",
        )
    text = str(monitor.execute("human-monitor-command", {"command-line": "info ramblock"}))
    ours = {name: (int(used, 16), int(most, 16)) for name, used, most in _BLOCK.findall(text)}
    for block in head.blocks:
        if block.name not in ours:
            raise StateMismatch(
                f'Unknown ramblock "{block.name}", cannot accept migration', section="ram", field=block.name
            )
        used, most = ours[block.name]
        # Tables of firmware have the size that the guest's devices ask for, within bounds.
        if block.length != used and (used == most or block.length > most):
            raise StateMismatch(
                f"Size mismatch: {block.name}: {block.length:#x} != {used:#x}",
                section="ram",
                field=block.name,
                remedy="Start the machine with the memory that it was saved with.",
            )
