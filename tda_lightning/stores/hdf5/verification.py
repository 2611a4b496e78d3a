"""Verify every file of a run: its header, its checksum, and that none is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tda_lightning.stores.hdf5 import Segment, folder
from tda_lightning.stores.hdf5.listing import require_same
from tda_lightning.stores.hdf5.segment_file import SegmentIdentity
from tda_lightning.stores.hdf5.snapshot_files import indices_in, read_snapshot, snapshot_file
from tda_lightning.stores.integrity.damage import StoreFileError
from tda_lightning.stores.integrity.manifest import (
    Manifest,
    SegmentEntry,
    SnapshotEntry,
    manifest_file,
    read_manifest,
)

State = Literal["good", "unverified", "damaged", "missing"]


@dataclass(frozen=True)
class FileReport:
    """The state of one file of a run.

    Attributes:
        name: Name of the file.
        state: ``"unverified"`` if it can be read, but an older version stored no checksum.
        content: A description of the content, or of the damage.
    """

    name: str
    state: State
    content: str


def verify_files(path: Path) -> Iterator[FileReport]:
    """Read every file of a run, and report its state.

    Raises:
        FileNotFoundError: If the folder does not exist.
        StoreFileError: If the recipe is damaged: nothing else can be read without it.
        ValueError: If the path is not a run, or a run of another format.
    """
    ranks, run = folder.read_recipe(path).ranks, folder.read_run_id(path) or ""
    state: State = "good" if folder.has_checksum(path) else "unverified"
    yield FileReport(folder.RECIPE, state, "the recipe")
    for rank in range(ranks):
        manifest, report = _verify_manifest(manifest_file(path, rank, ranks), run)
        yield report
        yield from _verify_segments(path, run, rank, ranks, manifest.segments)
        if rank == 0:
            indices = {*indices_in(path), *manifest.snapshots}
            for index in sorted(indices):
                yield _verify_snapshot(path, index, manifest.snapshots.get(index))


def _verify_manifest(file: Path, run: str) -> tuple[Manifest, FileReport]:
    """Return a manifest, an empty one if it cannot be used, and its state."""
    try:
        manifest = read_manifest(file, run)
    except StoreFileError as error:
        return Manifest(run), FileReport(file.name, "damaged", str(error))
    if manifest is None:
        content = "none: the last segments and the snapshots may be missing"
        return Manifest(run), FileReport(file.name, "unverified", content)
    counts = f"{len(manifest.segments):,} segments, {len(manifest.snapshots):,} snapshots"
    return manifest, FileReport(file.name, "good", f"lists {counts}")


def _verify_segments(
    path: Path, run: str, rank: int, ranks: int, listed: Mapping[int, SegmentEntry]
) -> Iterator[FileReport]:
    files = {folder.number_of(file): file for file in folder.segments_of(path, rank, ranks)}
    last, expected = None, 0
    for number in sorted({*files, *listed}):
        if gap := number - expected:
            content = "a segment" if gap == 1 else f"the first of {gap:,} segments"
            name = folder.segment_name(expected, rank, ranks)
            yield FileReport(name, "missing", f"{content} before other ones")
        if number in files:
            identity = SegmentIdentity(run, number, rank, ranks)
            report, last = _verify_segment(files[number], identity, last, listed)
            yield report
        else:
            content = listed[number].describe()
            yield FileReport(folder.segment_name(number, rank, ranks), "missing", content)
        expected = number + 1


def _verify_segment(
    file: Path,
    identity: SegmentIdentity,
    last: int | None,
    listed: Mapping[int, SegmentEntry],
) -> tuple[FileReport, int | None]:
    """Return the state of a segment, and the index of the last step so far."""
    try:
        segment = Segment(file, identity)
        for position in range(len(segment)):
            segment.step_at(position)
        require_same(segment, listed)
    except StoreFileError as error:
        return FileReport(file.name, "damaged", str(error)), last
    first, end = segment.indices[0], segment.indices[-1]
    content = f"{len(segment):,} steps, index {first:,} to {end:,}"
    if last is not None and first <= last:
        return FileReport(file.name, "damaged", f"{content}, after step {last:,}"), last
    state: State = "good" if segment.header is not None else "unverified"
    return FileReport(file.name, state, content), end


def _verify_snapshot(path: Path, index: int, entry: SnapshotEntry | None) -> FileReport:
    name = snapshot_file(path, index).name
    if index not in indices_in(path):
        return FileReport(name, "missing", f"the weights before step {index:,}")
    try:
        weights = read_snapshot(path, index, entry)
    except StoreFileError as error:
        return FileReport(name, "damaged", str(error))
    return FileReport(name, "good", f"{len(weights):,} tensors before step {index:,}")
