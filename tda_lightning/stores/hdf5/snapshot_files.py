"""Snapshot files: the weights of a model before chosen steps, one file per step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tda_lightning.stores.durable import atomic_write
from tda_lightning.stores.store import Weights

SNAPSHOTS = "snapshot-*.pt"


def indices_in(path: Path) -> list[int]:
    """Return the indices of the steps with a snapshot in a folder, in order."""
    return sorted(int(file.stem.removeprefix("snapshot-")) for file in path.glob(SNAPSHOTS))


def write_snapshot(path: Path, index: int, weights: Weights) -> None:
    """Write the weights before a step to a file in a folder, atomically."""
    with atomic_write(snapshot_file(path, index)) as partial:
        torch.save(dict(weights), partial)


def read_snapshot(path: Path, index: int) -> dict[str, Tensor]:
    """Return the weights before a step."""
    weights: dict[str, Tensor] = torch.load(snapshot_file(path, index), weights_only=True)
    return weights


def drop_snapshots_after(path: Path, index: int) -> None:
    """Delete the snapshots after an index; the one at the index itself remains valid."""
    for later in indices_in(path):
        if later > index:
            snapshot_file(path, later).unlink()


def snapshot_file(path: Path, index: int) -> Path:
    """Return the path of the snapshot before a step."""
    return path / f"snapshot-{index:08d}.pt"
