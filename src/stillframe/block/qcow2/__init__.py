"""qcow2 images: disks with snapshots and machine state inside.

layout, snapshot_table, lineage, widths   the bytes: header, snapshot table, our record, refcounts
image_file, gate, image                   an open image: its file, its lock and who uses it, its tables in force
mapping, l2_entry, refcounts              where a disk's bytes lie, which clusters are free
reading, compression                      what lies there, as bytes
writing, packing, resize                  what changes the active tree
create, preallocation                     new images
pending, shadow, changes, snapshots       what changes the list of snapshots: frozen, prepared, switched
view                                      a snapshot's disk, to be read
check, repair, bitmaps                    whether the tables agree, and how they are made to
node                                      all of it as a block node
"""

from stillframe.block.qcow2.create import Compat, create_image
from stillframe.block.qcow2.node import Qcow2Node

__all__ = ["Compat", "Qcow2Node", "create_image"]
