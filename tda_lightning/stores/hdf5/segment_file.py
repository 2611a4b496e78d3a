"""The file of a segment: its header, and checks of its HDF5 part before the content is read.

The header is one line of JSON in the user block of the HDF5 file, its first 512 bytes, which HDF5
itself ignores. It names the segment and holds a checksum. Segments of older versions have none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from tda_lightning.stores.integrity.damage import canonical_json, checksum_of_file, reading

HEADER_BYTES = 512
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_FORMAT = "tda_lightning segment"
# A compressed dataset takes more memory than room in the file, but gzip gains no more than this.
_MAX_COMPRESSION = 1100
_MAX_UNSTORED_BYTES = 2**22


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

    @property
    def ends(self) -> list[int]:
        """Beginnings and ends, in turn, of the parts that are not rows."""
        rows = chain(*((start, start + size) for start, size in self.rows))
        return [HEADER_BYTES, *rows, HEADER_BYTES + self.size]


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
    if any(before > after for before, after in pairwise(header.ends)):
        raise ValueError(f"its rows lie at {list(header.rows)}, not within {header.size:,} bytes")
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


def _fields_of(header: SegmentHeader) -> dict[str, Any]:
    fields = {name: value for name, value in vars(header).items() if name != "crc32"}
    return {**fields, "identity": vars(header.identity)}


def _checksum(path: Path, header: SegmentHeader) -> str:
    """Return the checksum of the header's fields and of the bytes after it that are not rows."""
    fields = {name: value for name, value in _fields_of(header).items() if name != "xxh3"}
    spans = list(zip(header.ends[::2], header.ends[1::2], strict=True))
    return checksum_of_file(path, canonical_json(fields), spans)


def _crc32_of(path: Path) -> int:
    """Return the checksum of the bytes after the header, as in earlier segments."""
    crc32, chunk = 0, memoryview(bytearray(2**18))
    with path.open("rb", buffering=0) as file:
        file.seek(HEADER_BYTES)
        while n_bytes := file.readinto(chunk):
            crc32 = zlib.crc32(chunk[:n_bytes], crc32)
    return crc32


def open_hdf5(path: Path, mode: Literal["r", "w"] = "r") -> h5py.File:
    """Open an HDF5 file, unlocked.

    A process that is forked while a segment is being written, such as a loader's worker, would
    inherit and keep its lock. Then nobody could read the segment. No lock is needed: a segment is
    written under a temporary name, and never changes under its final name.
    """
    block = HEADER_BYTES if mode == "w" else None  # for the header
    return h5py.File(path, mode, locking=False, userblock_size=block)


def read_datasets(file: h5py.File, names: Set[str]) -> dict[str, np.ndarray]:
    """Return some datasets, once every link and the size of every dataset has been checked.

    A file from a stranger may link to other files, or claim a size that would fill the memory.

    Raises:
        ValueError: If the file does not hold all of its datasets, or claims more than it stores.
    """
    links: list[tuple[bytes, int]] = []
    file.id.links.visit(lambda name, link: links.append((name, link.type)), info=True)
    wanted = {}
    for link, kind in links:
        name = link.decode()
        if kind != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{name!r} is a link to another place, which is not followed")
        opened = h5py.h5o.open(file.id, link)
        if isinstance(opened, h5py.h5d.DatasetID):
            require_stored(name, opened)
            if name in names:
                wanted[name] = opened
    return {name: _content(dataset) for name, dataset in wanted.items()}


def _content(dataset: h5py.h5d.DatasetID) -> np.ndarray:
    """Return all values of a dataset; by its high-level interface, h5py takes twice as long."""
    values = np.zeros(dataset.shape, dataset.dtype)
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def require_stored(name: str, dataset: h5py.h5d.DatasetID) -> None:
    """Check that a file holds a dataset, and that its size is not far beyond that of the file."""
    properties, stored = dataset.get_create_plist(), dataset.get_storage_size()
    if properties.get_layout() == h5py.h5d.VIRTUAL or properties.get_external_count():
        raise ValueError(f"{name!r} lies in other files, which are not read")
    size = dataset.get_type().get_size() * dataset.get_space().get_simple_extent_npoints()
    is_rows = name.endswith("/sketch")  # These are read block by block.
    if size > max(_MAX_UNSTORED_BYTES, _MAX_COMPRESSION * stored) and not (is_rows and stored):
        raise ValueError(f"{name!r} claims {size:,} bytes and stores {stored:,}")


def read_indices(file: h5py.File) -> list[int]:
    """Return the indices of the steps of a segment of which nothing has been checked yet.

    Raises:
        ValueError: If the file does not hold them, or they do not rise.
    """
    for name in (b"steps", b"steps/index"):
        if file.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{name.decode()!r} is a link to another place, which is not followed")
    dataset = h5py.h5d.open(file.id, b"steps/index")
    require_stored("steps/index", dataset)
    indices: list[int] = _content(dataset).tolist()
    require_rising(indices)
    return indices


def reading_segment(path: Path) -> AbstractContextManager[None]:
    """Turn every error inside the context into one that names the segment.

    Raises:
        StoreFileError: If anything goes wrong.
    """
    remedy = (
        "Restore it from a copy. Without one, record again, or use the steps before it, "
        "such as `run[:100]`"
    )
    return reading(path, "an unchanged segment of a run", f"{remedy}.")


def require_rising(indices: Sequence[int]) -> None:
    """Check that steps come in order.

    >>> require_rising([4, 2])
    Traceback (most recent call last):
        ...
    ValueError: Step 2 comes after step 4; expected rising indices from 0.
    """
    if indices and indices[0] < 0:
        raise ValueError(f"The first step is {indices[0]}; expected rising indices from 0.")
    for before, after in pairwise(indices):
        if after <= before:
            raise ValueError(
                f"Step {after} comes after step {before}; expected rising indices from 0."
            )
