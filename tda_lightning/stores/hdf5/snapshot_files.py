"""Snapshot files: the weights of a model before chosen steps, one file per step."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor

from tda_lightning.stores.integrity.damage import (
    StoreFileError,
    checksum_of_file,
    reading,
    require_stored_bytes,
)
from tda_lightning.stores.integrity.durable import atomic_write
from tda_lightning.stores.integrity.manifest import Manifest, SnapshotEntry, append_entry
from tda_lightning.stores.store import Weights

_NAME = re.compile(r"snapshot-(\d{8,})\.pt")


def indices_in(path: Path) -> list[int]:
    """Return the indices of the steps with a snapshot in a folder, in order.

    Other files, such as a user's ``snapshot-best.pt``, are ignored.
    """
    matches = (_NAME.fullmatch(file.name) for file in path.glob("snapshot-*.pt"))
    return sorted(int(match[1]) for match in matches if match)


def write_snapshot(
    path: Path, index: int, weights: Weights, manifest: Path, permit: Callable[[], None]
) -> None:
    """Write the weights before a step to a file in a folder, atomically, and list it.

    The manifest is not changed if it does not exist, as in earlier runs. ``permit`` raises if
    nothing may be written any more.
    """
    file = snapshot_file(path, index)
    if file.exists() and manifest.exists():  # From here on, either file is valid.
        append_entry(manifest, SnapshotEntry(index, 0, ""))
    try:
        with atomic_write(file, permit) as partial:
            torch.save(dict(weights), partial)
            entry = SnapshotEntry(index, partial.stat().st_size, checksum_of_file(partial))
    except RuntimeError as error:  # torch raises system errors, such as a full disk, as these.
        raise OSError(f"writing `{file}` failed: {error}") from error
    if manifest.exists():
        append_entry(manifest, entry)


def require_snapshots(path: Path, indices: Sequence[int], manifest: Manifest | None) -> None:
    """Check that all listed snapshots are there."""
    for index in sorted(manifest.snapshots if manifest is not None else ()):
        if index not in indices:
            raise StoreFileError(
                f"`{snapshot_file(path, index)}` is missing; expected all snapshots in the "
                "manifest. Restore it from a copy, or use the others: "
                "`HDF5Store.open(path, missing='skip')`."
            )


def read_snapshot(path: Path, index: int, entry: SnapshotEntry | None) -> dict[str, Tensor]:
    """Return the weights before a step, after a comparison with the manifest if they are listed."""
    file = snapshot_file(path, index)
    expected = "a snapshot: a dict from names to tensors, saved with `torch.save`"
    remedy = "Restore it from a copy, or use another snapshot."
    with reading(file, expected, remedy):
        _require_checksum(file, entry)
        weights: dict[str, Tensor] = torch.load(file, weights_only=True)
        if not all(isinstance(weight, Tensor) for weight in weights.values()):
            raise TypeError("it holds other objects than tensors")
    return weights


def _require_checksum(file: Path, entry: SnapshotEntry | None) -> None:
    require_stored_bytes(file)
    if entry is not None and entry.xxh3:
        if (size := file.stat().st_size) != entry.size:
            raise ValueError(f"it has {size:,} bytes, not {entry.size:,} as in the manifest")
        if checksum_of_file(file) != entry.xxh3:
            raise ValueError("its checksum is not that in the manifest")
        return
    with ZipFile(file) as archive:  # torch does not compare the checksums that it wrote.
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of `{damaged}` is another one")


def drop_snapshots_after(path: Path, index: int) -> None:
    """Delete the snapshots after an index; the one at the index itself remains valid."""
    for later in indices_in(path):
        if later > index:
            snapshot_file(path, later).unlink()


def snapshot_file(path: Path, index: int) -> Path:
    """Return the path of the snapshot before a step."""
    return path / f"snapshot-{index:08d}.pt"
