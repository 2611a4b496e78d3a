"""Snapshot files: the weights of a model before chosen steps, one file per step."""

from __future__ import annotations

import re
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor

from tda_lightning.stores.damage import reading
from tda_lightning.stores.durable import atomic_write
from tda_lightning.stores.store import Weights

_NAME = re.compile(r"snapshot-(\d{8,})\.pt")


def indices_in(path: Path) -> list[int]:
    """Return the indices of the steps with a snapshot in a folder, in order.

    Other files, such as a user's ``snapshot-best.pt``, are ignored.
    """
    matches = (_NAME.fullmatch(file.name) for file in path.glob("snapshot-*.pt"))
    return sorted(int(match[1]) for match in matches if match)


def write_snapshot(path: Path, index: int, weights: Weights) -> None:
    """Write the weights before a step to a file in a folder, atomically.

    Raises:
        OSError: If the file cannot be written.
    """
    file = snapshot_file(path, index)
    try:
        with atomic_write(file) as partial:
            torch.save(dict(weights), partial)
    except RuntimeError as error:  # torch raises system errors, such as a full disk, as these.
        raise OSError(f"writing `{file}` failed: {error}") from error


def read_snapshot(path: Path, index: int) -> dict[str, Tensor]:
    """Return the weights before a step."""
    file = snapshot_file(path, index)
    expected = "a snapshot: a dict from names to tensors, saved with `torch.save`"
    remedy = "Restore it from a copy, or delete it and use another snapshot."
    with reading(file, expected, remedy):
        with ZipFile(file) as archive:  # torch does not compare the checksums that it wrote.
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of `{damaged}` is another one")
        weights: dict[str, Tensor] = torch.load(file, weights_only=True)
        if not all(isinstance(weight, Tensor) for weight in weights.values()):
            raise TypeError("it holds other objects than tensors")
    return weights


def drop_snapshots_after(path: Path, index: int) -> None:
    """Delete the snapshots after an index; the one at the index itself remains valid."""
    for later in indices_in(path):
        if later > index:
            snapshot_file(path, later).unlink()


def snapshot_file(path: Path, index: int) -> Path:
    """Return the path of the snapshot before a step."""
    return path / f"snapshot-{index:08d}.pt"
