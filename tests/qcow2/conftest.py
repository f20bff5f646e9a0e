"""What tests of this folder get by name."""

from pathlib import Path

import pytest

from qcow2.killed import Shelf
from stillframe.block.qcow2 import unflushed


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Shared memory of the test's own."""
    monkeypatch.setattr(unflushed, "SHARED_MEMORY", str(tmp_path / "shm"))
    return Shelf(tmp_path / "shm")
