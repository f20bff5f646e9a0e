"""Dialogues made up from a seed, held with QEMU 10.0 and then with stillframe-qemu: what differs has a name, as in recorded ones.

`make hunt` holds many; INVENTED=seed holds one.
"""

import os
import random
from pathlib import Path

import pytest

from conformance.differences import DIFFERENCES
from conformance.inventing import invented
from conformance.replay import make_images, replay
from peers import peer

LONG = bool(os.environ.get("STILLFRAME_LONG"))
LENGTH = 60


def seeds() -> list[int]:
    if "INVENTED" in os.environ:
        return [int(os.environ["INVENTED"])]
    return random.Random(int(os.environ.get("SEED", "1"))).sample(range(1 << 32), 200 if LONG else 4)


@pytest.mark.parametrize("seed", seeds())
def test_a_dialogue_that_nobody_recorded_goes_the_same_but_for_named_differences(
    seed: int, tmp_path: Path
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir()
    dialogue = invented(seed, LENGTH, peer("qemu-system-riscv64", "10.0"), theirs)
    make_images(dialogue, ours)
    unnamed = [found for found in replay(dialogue, ours, DIFFERENCES) if not found.names]
    assert not unnamed, "\n\n".join(map(str, unnamed))[:6000]
