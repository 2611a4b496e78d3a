"""Manifest: the segments and snapshots that a run should hold, so that a lost one is noticed.

One file per writing process, with one JSON document per line. Each line holds its own checksum. A
line is appended once its file is durable, so the manifest never lists a file that does not exist; a
killed process may leave a file that is not listed, or the beginning of a line, which is ignored.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tda_lightning.stores.integrity.damage import checksum_of_document, reading
from tda_lightning.stores.integrity.durable import NO_FOLLOW, atomic_write

MANIFEST_NAME = re.compile(r"manifest(-rank-\d+)?\.jsonl")
_FORMAT = "tda_lightning manifest"
# About a million segments; a sparse file may claim any size.
_MAX_BYTES = 2**28


@dataclass(frozen=True)
class SegmentEntry:
    """A segment.

    Attributes:
        number: Number of the segment.
        first: Index of its first step.
        last: Index of its last step.
        steps: Number of its steps.
        xxh3: Checksum in its header; empty for segments of older versions.
    """

    number: int
    first: int
    last: int
    steps: int
    xxh3: str = ""

    def describe(self) -> str:
        """Return a short description of the content."""
        return f"{self.steps:,} steps, index {self.first:,} to {self.last:,}"


@dataclass(frozen=True)
class SnapshotEntry:
    """A snapshot.

    Attributes:
        index: Index of the step before which it was taken.
        size: Number of bytes of the file.
        xxh3: Checksum of the file; empty while it is being replaced.
    """

    index: int
    size: int
    xxh3: str


@dataclass(frozen=True)
class EndEntry:
    """The end of a training.

    Attributes:
        weights: Fingerprint of the weights after it.
    """

    weights: str


Entry = SegmentEntry | SnapshotEntry | EndEntry
_KINDS: Mapping[str, type[Entry]] = {
    "segment": SegmentEntry,
    "snapshot": SnapshotEntry,
    "end": EndEntry,
}
# The other fields are whole numbers from 0.
_TEXTS = {"xxh3", "weights"}


@dataclass(frozen=True)
class Manifest:
    """What one process has written.

    Attributes:
        run: Id of the run.
        segments: Segments by number.
        snapshots: Snapshots by index.
        weights: Fingerprint of the weights at the end of the training; empty until then.
    """

    run: str
    segments: Mapping[int, SegmentEntry] = field(default_factory=dict)
    snapshots: Mapping[int, SnapshotEntry] = field(default_factory=dict)
    weights: str = ""

    def before(self, index: int) -> Manifest:
        """Return the part that stays valid if the steps from ``index`` on are dropped."""
        return Manifest(
            self.run,
            {n: entry for n, entry in self.segments.items() if entry.last < index},
            {n: entry for n, entry in self.snapshots.items() if n <= index},
        )

    @classmethod
    def of(cls, run: str, entries: Iterable[Entry]) -> Manifest:
        """Return the manifest with these entries; a later entry replaces an earlier one."""
        segments, snapshots, weights = {}, {}, ""
        for entry in entries:
            if isinstance(entry, SegmentEntry):
                segments[entry.number] = entry
            elif isinstance(entry, SnapshotEntry):
                snapshots[entry.index] = entry
            else:
                weights = entry.weights
        return cls(run, segments, snapshots, weights)

    def _entries(self) -> Iterable[Entry]:
        yield from self.segments.values()
        yield from self.snapshots.values()
        if self.weights:
            yield EndEntry(self.weights)


def manifest_file(path: Path, rank: int, ranks: int) -> Path:
    """Return the path of the manifest of one process."""
    return path / ("manifest.jsonl" if ranks == 1 else f"manifest-rank-{rank}.jsonl")


def write_manifest(file: Path, manifest: Manifest) -> None:
    """Write a manifest, atomically; an existing one is replaced."""
    head = {"kind": "run", "format": _FORMAT, "run": manifest.run}
    lines = [_line(head), *map(_line_of, manifest._entries())]
    with atomic_write(file) as partial:
        partial.write_text("".join(lines))


def append_entry(file: Path, entry: Entry) -> None:
    """Append an entry to a manifest, durably.

    Raises:
        OSError: If it cannot be written; the manifest is as before.
    """
    _own(file)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | NO_FOLLOW)
    try:
        size, line = os.fstat(descriptor).st_size, _line_of(entry).encode()
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(f"`{file}` cannot be written: no space is left. Make space.")
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _own(file: Path) -> None:
    """Replace a manifest by a copy if it is a link: the file has another name elsewhere."""
    # Backups are made with hard links, and a stranger's folder may link to a file of the user.
    if file.is_symlink():
        raise OSError(f"`{file}` is a link; expected the manifest itself. Restore it from a copy.")
    if not file.exists():
        raise FileNotFoundError(f"`{file}` is gone; expected the manifest of this run")
    if os.stat(file).st_nlink > 1:
        content = file.read_bytes()
        with atomic_write(file) as partial:
            partial.write_bytes(content)


def read_manifest(file: Path, run: str) -> Manifest | None:
    """Return a manifest, or ``None`` if there is none, as in runs of older versions.

    Raises:
        StoreFileError: If it is damaged, or belongs to another run.
    """
    if not file.exists() and not file.is_symlink():
        return None
    remedy = (
        "Restore it from a copy, or read the run without: `HDF5Store.open(path, missing='skip')`."
    )
    with reading(file, "the manifest of a run", remedy):
        if (size := file.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes; expected at most {_MAX_BYTES:,}")
        # A killed process may leave the beginning of a line at the end.
        head, *lines = file.read_text().split("\n")[:-1] or [""]
        first = _document_of(head)
        if first.get("format") != _FORMAT or first.get("run") != run:
            raise ValueError(f"it belongs to the run {first.get('run')!r}, not {run!r}")
        return Manifest.of(run, map(_entry_of, lines))


def _entry_of(line: str) -> Entry:
    fields = _document_of(line)
    kind = fields.pop("kind")
    for name, value in fields.items():
        is_text = name in _TEXTS
        if not isinstance(value, str) if is_text else not _is_count(value):
            expected = "a text" if is_text else "a whole number"
            raise ValueError(f"`{name}` of a {kind!r} is {str(value)[:60]!r}; expected {expected}")
    return _KINDS[kind](**fields)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _line_of(entry: Entry) -> str:
    kind = next(name for name, cls in _KINDS.items() if isinstance(entry, cls))
    return _line({"kind": kind, **asdict(entry)})


def _line(document: Mapping[str, Any]) -> str:
    return json.dumps({**document, "check": checksum_of_document(document)}) + "\n"


def _document_of(line: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(line)
    if document.pop("check") != checksum_of_document(document):
        raise ValueError(f"the checksum of the line {line[:60]!r} is another one")
    return document
