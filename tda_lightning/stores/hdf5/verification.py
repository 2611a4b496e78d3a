"""Verify every file of a run: its header, its checksum, and that none is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tda_lightning.stores.damage import StoreFileError
from tda_lightning.stores.hdf5 import OpenSegment, Segment, folder
from tda_lightning.stores.hdf5.segment_header import SegmentIdentity
from tda_lightning.stores.hdf5.snapshot_files import indices_in, read_snapshot, snapshot_file

State = Literal["good", "unverified", "damaged", "missing"]


@dataclass(frozen=True)
class FileReport:
    """The state of one file of a run.

    Attributes:
        name: Name of the file.
        state: ``"unverified"`` if it can be read, but an older version stored no checksum.
        content: What it holds, or what is wrong.
    """

    name: str
    state: State
    content: str


def verify_files(path: Path) -> Iterator[FileReport]:
    """Read every file of a run, and report its state.

    Args:
        path: The folder of the run.

    Raises:
        FileNotFoundError: If the folder does not exist.
        StoreFileError: If the recipe is damaged: nothing else can be read without it.
        ValueError: If the path is not a run, or a run of another format.
    """
    ranks, run = folder.read_recipe(path).ranks, folder.read_run_id(path) or ""
    state: State = "good" if folder.has_checksum(path) else "unverified"
    yield FileReport(folder.RECIPE, state, "the recipe")
    for rank in range(ranks):
        files = folder.segments_of(path, rank, ranks)
        numbers = {folder.number_of(file): file for file in files}
        last = None
        for number in range(max(numbers, default=-1) + 1):
            if number not in numbers:
                name = folder.segment_name(number, rank, ranks)
                yield FileReport(name, "missing", "a segment, of which later ones exist")
                continue
            report, last = _verify_segment(
                numbers[number], SegmentIdentity(run, number, rank, ranks), last
            )
            yield report
    for index in indices_in(path):
        yield _verify_snapshot(path, index)


def _verify_segment(
    file: Path, identity: SegmentIdentity, last: int | None
) -> tuple[FileReport, int | None]:
    """Return the state of a segment, and the index of the last step so far."""
    try:
        segment = Segment(file, identity)
        reader = OpenSegment(segment)
        for position in range(len(segment)):
            reader.step_at(position)
    except StoreFileError as error:
        return FileReport(file.name, "damaged", str(error)), last
    first, end = segment.indices[0], segment.indices[-1]
    content = f"{len(segment):,} steps, index {first:,} to {end:,}"
    if last is not None and first <= last:
        return FileReport(file.name, "damaged", f"{content}, after step {last:,}"), last
    state: State = "good" if segment.is_verified else "unverified"
    return FileReport(file.name, state, content), end


def _verify_snapshot(path: Path, index: int) -> FileReport:
    name = snapshot_file(path, index).name
    try:
        weights = read_snapshot(path, index)
    except StoreFileError as error:
        return FileReport(name, "damaged", str(error))
    return FileReport(name, "good", f"{len(weights):,} tensors before step {index:,}")
