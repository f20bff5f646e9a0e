"""An unmodified QEMU as the engine: it runs the processors and the devices in a process of its own, and stillframe owns disks,
state, jobs and the monitor."""
