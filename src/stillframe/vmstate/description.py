"""The JSON description at the end of a stream: what a reader without our declarations needs to walk it.

    {"configuration": {"vmsd_name", "version", "fields"}, "page_size": 4096,
     "devices": [{"name", "instance_id", "vmsd_name", "version",
                  "fields": [{"name", "array_len"?, "type", "size"}]}]}

In QEMU's shape, so that its analyze-migration.py reads our streams. RAM has no entry there.
"""

import json
from collections.abc import Sequence

from stillframe.vmstate.fields import describe_fields
from stillframe.vmstate.sections import SectionState


def describe(machine: str, sections: Sequence[SectionState]) -> bytes:
    """The description of a stream with these sections, in their order. :param machine: the board's name."""
    configuration = {
        "vmsd_name": "configuration",
        "version": 1,
        "fields": [
            {"name": "len", "type": "uint32", "size": 4},
            {"name": "name", "type": "buffer", "size": len(machine.encode())},
        ],
    }
    devices = [
        {
            "name": section.name,
            "instance_id": section.instance_id,
            "vmsd_name": section.description.name,
            "version": section.description.version,
            "fields": describe_fields(section.description, section.values),
        }
        for section in sections
    ]
    text = json.dumps({"configuration": configuration, "page_size": 4096, "devices": devices}).encode()
    # analyze-migration.py looks for the first brace behind the last NUL, and must not find it in the length.
    while b"{" in len(text).to_bytes(4, "big"):
        text += b" "
    return text
