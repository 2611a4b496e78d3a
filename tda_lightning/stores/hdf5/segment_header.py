"""Segment header: which segment of which run a file is, and the checksum of its content.

The header is one line of JSON in the user block of the HDF5 file, its first 512 bytes, which HDF5
itself ignores. Segments of older versions have none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HEADER_BYTES = 512
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_FORMAT = "tda_lightning segment"
# Small enough to stay in a processor's cache between reading and summing.
_CHUNK_BYTES = 2**18


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


@dataclass(frozen=True)
class SegmentHeader:
    """The header of a segment.

    Attributes:
        identity: Which segment it is.
        first: Index of its first step.
        last: Index of its last step.
        steps: Number of its steps.
        size: Number of bytes after the header.
        crc32: Checksum of these bytes, that of ``zlib.crc32``.
    """

    identity: SegmentIdentity
    first: int
    last: int
    steps: int
    size: int
    crc32: int

    def describe(self) -> str:
        """Return a short description of what the segment holds."""
        return f"{self.steps:,} steps, index {self.first:,} to {self.last:,}"


def write_header(path: Path, identity: SegmentIdentity, indices: list[int]) -> None:
    """Write the header of a segment whose content is complete.

    Args:
        path: The file, with a user block of ``HEADER_BYTES``.
        identity: Which segment it is.
        indices: Indices of its steps.
    """
    size, crc32 = _checksum(path)
    header = SegmentHeader(identity, indices[0], indices[-1], len(indices), size, crc32)
    fields = {"format": _FORMAT, **asdict(header)}
    line = json.dumps(fields).encode() + b"\n"
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
    return SegmentHeader(identity=identity, **fields)


def require_identity(header: SegmentHeader, expected: SegmentIdentity) -> None:
    """Check that a segment is the one that its name and its folder say.

    Raises:
        ValueError: If it is another one; the message names the difference.
    """
    found = asdict(header.identity)
    for name, value in asdict(expected).items():
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
    """Check that the content of a segment is what was sealed.

    Raises:
        ValueError: If it is not.
    """
    size, crc32 = _checksum(path)
    if size != header.size:
        raise ValueError(f"it holds {size:,} bytes after its header, not {header.size:,}")
    if crc32 != header.crc32:
        raise ValueError(f"its checksum is {crc32:08x}, not {header.crc32:08x}")


def _checksum(path: Path) -> tuple[int, int]:
    """Return the number of bytes after the header, and their checksum."""
    size, crc32, chunk = 0, 0, memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(HEADER_BYTES)
        while n_bytes := file.readinto(chunk):
            size, crc32 = size + n_bytes, zlib.crc32(chunk[:n_bytes], crc32)
    return size, crc32
