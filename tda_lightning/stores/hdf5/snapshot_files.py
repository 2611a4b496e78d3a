"""Snapshots: the weights of a model before chosen steps, each in a file of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tda_lightning.stores.durable import make_durable, partial_name
from tda_lightning.stores.store import Weights

SNAPSHOTS = "snapshot-*.pt"


def indices_in(path: Path) -> list[int]:
    """Return the steps before which there are snapshots in a folder, in order."""
    return sorted(int(file.stem.removeprefix("snapshot-")) for file in path.glob(SNAPSHOTS))


def write_snapshot(path: Path, index: int, weights: Weights) -> None:
    """Keep the weights before a step in a folder: whole, or not at all."""
    file = snapshot_file(path, index)
    unfinished = partial_name(file)
    try:
        torch.save(dict(weights), unfinished)
        make_durable(unfinished)
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    make_durable(path)


def read_snapshot(path: Path, index: int) -> dict[str, Tensor]:
    """Return the weights before a step."""
    found: dict[str, Tensor] = torch.load(snapshot_file(path, index), weights_only=True)
    return found


def drop_snapshots_after(path: Path, index: int) -> None:
    """Delete the snapshots of steps after an index; its own shows weights that still stand."""
    for later in indices_in(path):
        if later > index:
            snapshot_file(path, later).unlink()


def snapshot_file(path: Path, index: int) -> Path:
    """Return where the weights before a step are kept."""
    return path / f"snapshot-{index:08d}.pt"
