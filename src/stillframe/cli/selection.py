"""Which nodes a command means where `--devices` and `--vmstate` are left out: from what the machine's monitor tells.

Save takes every node that a device of the guest uses, that can be written and keeps snapshots; the machine state goes to the
first that is not firmware. Load and delete take those of them that have the tag. What is left out is told, with the reason:
nothing is left out silently.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillframe.client import Client
from stillframe.errors import NotFound, Refused

_KEEPS_SNAPSHOTS = frozenset({"qcow2", "rbd"})


@dataclass(frozen=True, slots=True)
class UsedNode:
    """A node that a device of the guest uses.

    :param device: the device, as the monitor calls it. :param tags: snapshots it has, with the bytes of machine state of each.
    """

    node_name: str
    device: str
    driver: str
    read_only: bool
    firmware: bool
    tags: Mapping[str, int]

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be snapshotted; None if it can."""
        if self.read_only:
            return "it is read-only"
        if self.driver not in _KEEPS_SNAPSHOTS:
            return f"{self.driver} images keep no snapshots"
        return None


@dataclass(frozen=True, slots=True)
class Selection:
    """What a command is about to work on.

    :param vmstate: the node with the machine state; None where a command needs none.
    :param left_out: nodes that are not touched, with the reason.
    """

    devices: tuple[str, ...]
    vmstate: str | None
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def home(self) -> str:
        """The node with the machine state; the first one where none was chosen."""
        return self.vmstate or self.devices[0]


async def used_nodes(client: Client) -> list[UsedNode]:
    """The nodes behind the guest's devices, in the order in which the machine lists them."""
    nodes = []
    for block in await client.execute("query-block"):
        inserted = block.get("inserted")
        if not inserted or not inserted.get("node-name"):
            continue
        device = block.get("qdev") or block.get("device") or ""
        snapshots = inserted.get("image", {}).get("snapshots", [])
        tags: dict[str, int] = {}
        for each in snapshots:
            tags.setdefault(each["name"], each["vm-state-size"])
        nodes.append(
            UsedNode(
                inserted["node-name"],
                device,
                inserted["drv"],
                inserted["ro"],
                "flash" in device or str(block.get("device", "")).startswith("pflash"),
                tags,
            )
        )
    return nodes


def _nothing(nodes: Sequence[UsedNode], reasons: Sequence[tuple[str, str]]) -> Refused:
    if not nodes:
        return Refused(
            "No device of the guest uses a block node", remedy="Name the nodes: --devices a,b --vmstate a"
        )
    why = "; ".join(f"'{name}': {reason}" for name, reason in reasons)
    return Refused(
        f"No node of the guest's can be snapshotted ({why})", remedy="Use qcow2 images that are writable."
    )


async def select_for_save(client: Client, devices: tuple[str, ...], vmstate: str | None) -> Selection:
    """The nodes to save.

    :raise Refused: there are none.
    """
    if devices:
        return Selection(devices, vmstate or devices[0])
    nodes = await used_nodes(client)
    left_out = [(node.node_name, node.obstacle) for node in nodes if node.obstacle is not None]
    chosen = [node for node in nodes if node.obstacle is None]
    if not chosen:
        raise _nothing(nodes, left_out)
    home = next((node for node in chosen if not node.firmware), chosen[0])
    return Selection(tuple(node.node_name for node in chosen), vmstate or home.node_name, tuple(left_out))


async def select_with_tag(
    client: Client, tag: str, devices: tuple[str, ...], vmstate: str | None, *, needs_state: bool
) -> Selection:
    """The nodes to load or delete a snapshot on: those that have it.

    :param needs_state: one of them has to hold machine state.
    :raise NotFound: none has it, or none with machine state.
    """
    if devices and (vmstate or not needs_state):
        return Selection(devices, vmstate)
    nodes = await used_nodes(client)
    if devices:
        listed = [node for node in nodes if node.node_name in devices]
        listed_holder = next((node.node_name for node in listed if node.tags.get(tag)), devices[0])
        return Selection(devices, listed_holder)
    having = [node for node in nodes if node.obstacle is None and tag in node.tags]
    left_out = [
        (node.node_name, node.obstacle or f"it has no snapshot '{tag}'")
        for node in nodes
        if node not in having
    ]
    if not having:
        if not nodes:
            raise _nothing(nodes, left_out)
        known = sorted({each for node in nodes for each in node.tags})
        raise NotFound(
            f"There is no snapshot '{tag}'",
            remedy=f"There are: {', '.join(known)}." if known else "There is none at all.",
        )
    holder = next((node.node_name for node in having if node.tags[tag]), None)
    if needs_state and vmstate is None and holder is None:
        raise NotFound(
            f"Snapshot '{tag}' holds disks only, no machine state",
            remedy="Apply it to the images while no machine uses them: stillframe image snapshot apply",
        )
    return Selection(tuple(node.node_name for node in having), vmstate or holder, tuple(left_out))


def describe(selection: Selection) -> dict[str, Any]:
    """For programs."""
    return {
        "devices": list(selection.devices),
        "vmstate": selection.vmstate,
        "left-out": [{"node-name": name, "reason": reason} for name, reason in selection.left_out],
    }
