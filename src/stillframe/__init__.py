"""stillframe: snapshots of whole virtual machines, in QEMU's words, on ordinary qcow2 files."""

__version__ = "0.1.0"
