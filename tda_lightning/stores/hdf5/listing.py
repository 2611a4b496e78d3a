"""Compare the files of a run with its manifests: none may be missing, and each the one listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tda_lightning.stores.hdf5 import Segment, folder
from tda_lightning.stores.hdf5.shards import Shard
from tda_lightning.stores.integrity.damage import StoreFileError
from tda_lightning.stores.integrity.manifest import (
    Manifest,
    SegmentEntry,
    manifest_file,
    read_manifest,
)


def entry_of(segment: Segment) -> SegmentEntry:
    """Return the entry of a segment in the manifest."""
    checksum = segment.header.xxh3 if segment.header is not None else ""
    indices = segment.indices
    number = folder.number_of(segment.path)
    return SegmentEntry(number, indices[0], indices[-1], len(indices), checksum)


def read_shards(
    path: Path, run: str, ranks: int, missing: Literal["refuse", "skip"]
) -> list[Shard]:
    """Return the segments of each process; if none may be missing, those in the manifests."""
    if missing == "skip":
        files = [folder.segments_of(path, rank, ranks) for rank in range(ranks)]
        return [Shard(rank_files, run, ranks) for rank_files in files]
    _require_ranks(path, ranks)
    now = _manifest_stamps(path, ranks)
    while True:
        try:
            return [_read_shard(path, run, rank, ranks) for rank in range(ranks)]
        except StoreFileError:  # noqa: PERF203
            before, now = now, _manifest_stamps(path, ranks)
            if now == before:  # Else a training has been resumed meanwhile.
                raise


def first_manifest(
    path: Path, run: str, ranks: int, missing: Literal["refuse", "skip"]
) -> Manifest | None:
    """Return the manifest of the first process, which also lists the snapshots.

    Raises:
        StoreFileError: If it is damaged, unless it may be left out.
    """
    try:
        return read_manifest(manifest_file(path, 0, ranks), run)
    except StoreFileError:
        if missing == "refuse":
            raise
        return None


def kept_entries(path: Path, run: str, rank: int, ranks: int, index: int) -> Manifest:
    """Return the entries of one process that stay if the steps from ``index`` on are dropped.

    Segments that are not listed yet are listed; those listed and lost keep their entries.

    Raises:
        StoreFileError: If a file is damaged, or is not the one in the manifest.
    """
    manifest = read_manifest(manifest_file(path, rank, ranks), run) or Manifest(run)
    segments = dict(manifest.segments)
    for file in folder.segments_of(path, rank, ranks):
        segment = Segment(file, folder.identity_of(file, run, ranks))
        require_same(segment, manifest.segments)
        segments[folder.number_of(file)] = entry_of(segment)
    return Manifest(run, segments, manifest.snapshots).before(index)


def _read_shard(path: Path, run: str, rank: int, ranks: int) -> Shard:
    file = manifest_file(path, rank, ranks)
    manifest = read_manifest(file, run)  # Before the files: it lists none that is not there yet.
    files = folder.segments_of(path, rank, ranks)
    _require_complete(path, rank, ranks, files, manifest)
    shard = Shard(files, run, ranks)
    _require_listed(shard.segments, manifest, file)
    return shard


def _require_ranks(path: Path, ranks: int) -> None:
    """Check that every segment is one of the processes that the recipe names."""
    for file in folder.all_segments(path):
        identity = folder.identity_of(file, "", ranks)
        name = folder.segment_name(identity.number, identity.rank, ranks)
        if file.name != name or identity.rank >= ranks:
            raise StoreFileError(
                f"`{file}` is no segment of a run of {ranks:,} processes, the number in "
                f"`{folder.RECIPE}`. Restore the files of one run from a copy."
            )


def _manifest_stamps(path: Path, ranks: int) -> list[tuple[int, int, int] | None]:
    """Return what changes if a manifest is replaced or grows."""
    files = [manifest_file(path, rank, ranks) for rank in range(ranks)]
    stats = [file.stat() if file.is_file() else None for file in files]
    return [s and (s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]


def _require_complete(
    path: Path, rank: int, ranks: int, files: Sequence[Path], manifest: Manifest | None
) -> None:
    """Check that no segment of a process is missing, given the files of those that are there."""
    numbers = set(map(folder.number_of, files))
    listed = manifest.segments if manifest is not None else {}
    missing = [*(set(listed) - numbers), *folder.first_gap(numbers)[:1]]
    if missing:
        number = min(missing)
        file = path / folder.segment_name(number, rank, ranks)
        if number in listed:
            content = f" ({listed[number].describe()})"
        else:
            later = next(file for file in files if folder.number_of(file) > number)
            content = f", although `{later.name}` is there"
        raise StoreFileError(
            f"`{file}` is missing{content}; expected all segments of the run. Restore it from a "
            "copy, or leave its steps out: `HDF5Store.open(path, missing='skip')`."
        )


def _require_listed(segments: Sequence[Segment], manifest: Manifest | None, file: Path) -> None:
    """Check that segments are those in the manifest, a file; later ones need not be listed yet."""
    for segment in segments:
        if manifest is None and segment.header is not None and segment.header.xxh3:
            raise StoreFileError(
                f"`{file}` is missing, although `{segment.path.name}` was listed in it; expected "
                "the manifest of the run. Restore it from a copy, or read the run without: "
                "`HDF5Store.open(path, missing='skip')`."
            )
        if manifest is not None:
            require_same(segment, manifest.segments)


def require_same(segment: Segment, entries: Mapping[int, SegmentEntry]) -> None:
    """Check that a segment is the one in the manifest, if it is listed."""
    entry = entry_of(segment)
    listed = entries.get(entry.number, entry)
    if segment.header is None:  # Rewritten by a user, such as by `h5repack`, or an older version.
        listed = replace(listed, xxh3="")
    if entry != listed:
        raise StoreFileError(
            f"`{segment.path}` is another segment than the one in the manifest; expected "
            f"{listed.describe()}, checksum {listed.xxh3 or 'none'}, found {entry.describe()}, "
            f"checksum {entry.xxh3 or 'none'}. It may come from before the training was resumed. "
            "Restore the latest copy."
        )
