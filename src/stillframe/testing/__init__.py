"""Tests of snapshots over a monitor, ours or a real QEMU's: docs/testing.md.

from stillframe.testing import ANY, Machine
with Machine(["qemu-system-x86_64"], "-machine", "none") as machine:
    machine.execute("stop")
    machine.event("STOP")
"""

from stillframe.testing.machine import Machine, NoAnswer
from stillframe.testing.matching import ANY, Text, matches, plain
from stillframe.testing.transcript import Transcript

__all__ = ["ANY", "Machine", "NoAnswer", "Text", "Transcript", "matches", "plain"]
