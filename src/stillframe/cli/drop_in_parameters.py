"""What the values of QEMU's options can say here, by the names that `query-command-line-options` has for them.

Facts from QEMU 10.0's own answer, of which this is a part: `-m` is `memory`, `-smp` is `smp-opts`.
"""

from collections.abc import Collection, Mapping

from stillframe.cli.drop_in_words import Option

PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "machine": {"type": "string", "usb": "boolean", "dump-guest-core": "boolean", "mem-merge": "boolean"},
    "accel": {},
    "smp-opts": dict.fromkeys(
        ("cpus", "maxcpus", "sockets", "dies", "clusters", "cores", "threads"), "number"
    ),
    "memory": {"size": "size"},
    "name": {"guest": "string", "process": "string", "debug-threads": "boolean"},
    "icount": {"shift": "string", "align": "boolean", "sleep": "boolean"},
    "device": {},
    "drive": {
        "file": "string",
        "if": "string",
        "format": "string",
        "driver": "string",
        "node-name": "string",
        "read-only": "boolean",
        "auto-read-only": "boolean",
        "force-share": "boolean",
        "discard": "string",
        "media": "string",
        "index": "number",
        "unit": "number",
        "werror": "string",
        "rerror": "string",
    },
    "chardev": {
        "backend": "string",
        "path": "string",
        "append": "boolean",
        "fd": "string",
        "host": "string",
        "port": "string",
        "server": "boolean",
        "wait": "boolean",
    },
    "mon": {"chardev": "string", "mode": "string"},
    "msg": {"timestamp": "boolean"},
    "rtc": {"base": "string", "clock": "string", "driftfix": "string"},
    "overcommit": {"mem-lock": "string", "cpu-pm": "boolean"},
    "boot-opts": {"strict": "boolean", "menu": "boolean"},
    "object": {},
    "add-fd": {"fd": "number", "set": "number", "opaque": "string"},
}
"""Each option whose value is parameters: their names, and what they are. An option's "id" is not among them, as in QEMU."""


def refuse_unknown(option: Option, group: str, given: Collection[str]) -> None:
    """:param group: the option's name in `PARAMETERS`. :raise BadOption: one of the parameters is not there."""
    for name in given:
        if name != "id" and name not in PARAMETERS[group]:
            raise option.refused(f"Invalid parameter '{name}'")
