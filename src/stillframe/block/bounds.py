"""The refusals that every node owes: beyond its ends, and writing to what is read-only."""

from stillframe.block.node import Node
from stillframe.errors import InvalidRequest, Refused


def refuse_outside(node: Node, offset: int, length: int, verb: str) -> None:
    """:param verb: "read", "write", "map". :raise InvalidRequest: the range is not wholly inside the node."""
    if offset < 0 or length < 0 or offset + length > node.size:
        raise InvalidRequest(
            f"Cannot {verb} {length} bytes at {offset} of '{node.node_name}', which has {node.size} bytes"
        )


def refuse_read_only(node: Node) -> None:
    """:raise Refused: the node may not be written."""
    if node.read_only:
        raise Refused(f"Block node '{node.node_name}' is read-only")


def refuse_write(node: Node, offset: int, length: int) -> None:
    """Both refusals, for a range to be changed."""
    refuse_read_only(node)
    refuse_outside(node, offset, length, "write")
