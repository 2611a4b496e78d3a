"""Segment header: which segment of which run a file is, and the checksum of its content.

The header is one line of JSON in the user block of the HDF5 file, its first 512 bytes, which HDF5
itself ignores. Segments of older versions have none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from tda_lightning.stores.integrity.damage import canonical_json, checksum_of_file

HEADER_BYTES = 512
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_FORMAT = "tda_lightning segment"


@dataclass(frozen=True)
class SegmentIdentity:
    """Which segment of which run a file is.

    Attributes:
        run: Id of the run.
        number: Number of the segment.
        rank: Number of the process that wrote it.
        ranks: Number of processes.
    """

    run: str
    number: int
    rank: int = 0
    ranks: int = 1

    def shifted(self, by: int) -> SegmentIdentity:
        """Return the identity of a later or earlier segment of the same process."""
        return replace(self, number=self.number + by)


@dataclass(frozen=True)
class SegmentHeader:
    """The header of a segment.

    Attributes:
        identity: Which segment it is.
        first: Index of its first step.
        last: Index of its last step.
        steps: Number of its steps.
        size: Number of bytes after the header.
        rows: First byte in the file, and number of bytes, of each dataset of rows. Each block of
            rows has its checksum in the file.
        xxh3: Checksum of the other fields of the header and of all other bytes after it.
        crc32: Checksum by ``zlib.crc32`` of the bytes after the header; only in earlier segments,
            which have no ``rows`` and no ``xxh3``.
    """

    identity: SegmentIdentity
    first: int
    last: int
    steps: int
    size: int
    rows: tuple[tuple[int, int], ...] = ()
    xxh3: str = ""
    crc32: int | None = None

    def describe(self) -> str:
        """Return a short description of what the segment holds."""
        return f"{self.steps:,} steps, index {self.first:,} to {self.last:,}"


def write_header(
    path: Path,
    identity: SegmentIdentity,
    indices: Sequence[int],
    rows: Sequence[tuple[int, int]],
) -> None:
    """Write the header of a segment whose content is complete.

    Args:
        path: The file, with a user block of ``HEADER_BYTES``.
        identity: Which segment it is.
        indices: Indices of its steps.
        rows: First byte and number of bytes of each dataset of rows, in the order of the file.
    """
    size = path.stat().st_size - HEADER_BYTES
    header = SegmentHeader(identity, indices[0], indices[-1], len(indices), size, tuple(rows))
    header = replace(header, xxh3=_checksum(path, header))
    line = json.dumps({"format": _FORMAT, **_fields_of(header)}).encode() + b"\n"
    assert len(line) <= HEADER_BYTES
    with path.open("r+b") as file:
        file.write(line.ljust(HEADER_BYTES, b"\0"))


def read_header(path: Path) -> SegmentHeader | None:
    """Return the header of a segment, or ``None`` for a segment of an older version.

    Raises:
        ValueError: If the file begins with neither.
    """
    with path.open("rb") as file:
        block = file.read(HEADER_BYTES)
    if block.startswith(_HDF5_SIGNATURE):
        return None
    fields: dict[str, Any] = json.loads(block.split(b"\n", 1)[0])
    if fields.pop("format") != _FORMAT:
        raise ValueError("it does not begin with the header of a segment")
    identity = SegmentIdentity(**fields.pop("identity"))
    rows = tuple((first, size) for first, size in fields.pop("rows", ()))
    header = SegmentHeader(identity=identity, rows=rows, **fields)
    _require_spans(header)
    return header


def require_identity(header: SegmentHeader, expected: SegmentIdentity) -> None:
    """Check that a segment is the one that its name and its folder announce.

    Raises:
        ValueError: If it is another one; the message names the difference.
    """
    found = vars(header.identity)
    for name, value in vars(expected).items():
        if found[name] != value:
            what = "it belongs to another run" if name == "run" else f"it is another {name}"
            raise ValueError(f"{what}: its `{name}` is {found[name]!r}, not {value!r}")


def require_steps(header: SegmentHeader, indices: Sequence[int]) -> None:
    """Check that a segment holds the steps of its header.

    Raises:
        ValueError: If it holds others.
    """
    if [header.first, header.last, header.steps] != [*indices[:1], *indices[-1:], len(indices)]:
        raise ValueError(f"it holds {len(indices):,} steps, not {header.describe()}")


def require_checksum(path: Path, header: SegmentHeader) -> None:
    """Check that the content of a segment is what was sealed, apart from its blocks of rows.

    Raises:
        ValueError: If it is not.
    """
    size = path.stat().st_size - HEADER_BYTES
    if size != header.size:
        raise ValueError(f"it holds {size:,} bytes after its header, not {header.size:,}")
    checksum, expected = _checksum(path, header), header.xxh3
    if header.crc32 is not None:
        checksum, expected = f"{_crc32_of(path):08x}", f"{header.crc32:08x}"
    if checksum != expected:
        raise ValueError(f"its checksum is {checksum}, not {expected}")


def _require_spans(header: SegmentHeader) -> None:
    """Check that the spans of rows lie in the file, one after the other."""
    ends = [HEADER_BYTES, *chain(*((a, a + n) for a, n in header.rows)), HEADER_BYTES + header.size]
    if any(before > after for before, after in pairwise(ends)):
        raise ValueError(f"its rows lie at {list(header.rows)}, not within {header.size:,} bytes")


def _fields_of(header: SegmentHeader) -> dict[str, Any]:
    fields = {name: value for name, value in vars(header).items() if name != "crc32"}
    return {**fields, "identity": vars(header.identity)}


def _checksum(path: Path, header: SegmentHeader) -> str:
    """Return the checksum of the header's fields and of the bytes after it that are not rows."""
    fields = {name: value for name, value in _fields_of(header).items() if name != "xxh3"}
    ends = [HEADER_BYTES, *chain(*((a, a + n) for a, n in header.rows)), HEADER_BYTES + header.size]
    spans = list(zip(ends[::2], ends[1::2], strict=True))
    return checksum_of_file(path, canonical_json(fields), spans)


def _crc32_of(path: Path) -> int:
    """Return the checksum of the bytes after the header, as in earlier segments."""
    crc32, chunk = 0, memoryview(bytearray(2**18))
    with path.open("rb", buffering=0) as file:
        file.seek(HEADER_BYTES)
        while n_bytes := file.readinto(chunk):
            crc32 = zlib.crc32(chunk[:n_bytes], crc32)
    return crc32
