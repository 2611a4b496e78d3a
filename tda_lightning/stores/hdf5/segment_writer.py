"""Write steps to a segment, atomically; rows bypass HDF5, which would block training."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from tda_lightning.stores.hdf5.segment_datasets import GROUP_FIELDS, blocks_of
from tda_lightning.stores.hdf5.segment_file import SegmentIdentity, open_hdf5, write_header
from tda_lightning.stores.integrity.damage import checksum_of_parts
from tda_lightning.stores.integrity.durable import atomic_write
from tda_lightning.stores.row_formats import Storage, encode, raw_bytes, storage_for
from tda_lightning.stores.step import OPTIONAL_FACTS, Step

# What a segment holds beside its rows, at most, in all but very long ones.
_MAX_METADATA_BYTES = 2**16
# Factors per step in one chunk of a preconditioner's dataset.
_CHUNK = 256


def write_segment(
    path: Path,
    steps: Sequence[Step],
    storage: Storage | None,
    identity: SegmentIdentity,
    permit: Callable[[], None] = lambda: None,
) -> None:
    """Write steps to a new sealed segment, atomically.

    Args:
        path: Path of the segment.
        steps: At least one step; all with the same number of parameter groups.
        storage: Number format of the rows; by default, one with their range.
        identity: Which segment of which run it is.
        permit: Raises if nothing may be written any more; called right before the file is sealed.
    """
    storage = storage_for(storage, steps[0].sketch.dtype)
    sketches = [encode(step.sketch, storage) for step in steps]
    curvature = [encode(_curvature_rows(step), storage) for step in steps]
    blocks = blocks_of([len(rows) for rows, _ in sketches], sketches[0][0])
    with atomic_write(path, permit) as partial:
        _require_space(partial, [rows for part in (sketches, curvature) for rows, _ in part])
        with open_hdf5(partial, "w") as file:
            _write_steps(file.create_group("steps"), steps)
            _write_audits(file.create_group("audits"), steps)
            _write_preconditioners(file.create_group("preconditioners"), steps)
            _write_visits(file.create_group("visits"), steps)
            file["blocks"] = np.array(
                [
                    (block.stop, _checksum(sketches, block), _checksum(curvature, block))
                    for block in blocks
                ],
                dtype=np.uint64,
            )
            offsets = [
                _write_rows(file["visits"], sketches, storage),
                _write_rows(file.create_group("curvature"), curvature, storage),
            ]
            file["curvature/offset"] = np.cumsum([0, *(len(rows) for rows, _ in curvature)])
        spans = [
            _fill(partial, offset, [rows for rows, _ in encoded])
            for offset, encoded in zip(offsets, (sketches, curvature), strict=True)
        ]
        spans = sorted(span for span in spans if span[1])
        write_header(partial, identity, [step.index for step in steps], spans)


def _require_space(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Raise the system's error if there is no space for a segment.

    HDF5 would find out when it closes the file, and crash when the process ends.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    size = sum(array.nbytes for array in arrays) + _MAX_METADATA_BYTES
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _write_steps(group: h5py.Group, steps: Sequence[Step]) -> None:
    group["index"] = np.array([step.index for step in steps], dtype=np.int64)
    group["epoch"] = np.array([step.epoch for step in steps], dtype=np.int64)
    group["optimizer"] = [step.optimizer for step in steps]
    group["loss"] = [step.loss for step in steps]
    counts = [len(step.sample_ids) for step in steps]
    group["offset"] = np.cumsum([0, *counts], dtype=np.int64)
    groups = [[tuple(vars(group).values()) for group in step.groups] for step in steps]
    values = np.array(groups, dtype=np.float64)
    for number, name in enumerate(GROUP_FIELDS):
        group[name] = values[:, :, number]


def _write_visits(group: h5py.Group, steps: Sequence[Step]) -> None:
    group["sample_id"] = torch.cat([step.sample_ids for step in steps]).numpy()
    group["weight"] = torch.cat([step.weights for step in steps]).numpy()
    for name in OPTIONAL_FACTS:
        group[name] = torch.cat([_values_or_nan(step, name) for step in steps]).numpy()


def _values_or_nan(step: Step, name: str) -> Tensor:
    values: Tensor | None = getattr(step, name)
    return torch.full((len(step.sample_ids),), torch.nan) if values is None else values.float()


def _curvature_rows(step: Step) -> Tensor:
    return step.sketch[:0] if step.curvature_rows is None else step.curvature_rows


def _checksum(encoded: Sequence[tuple[np.ndarray, np.ndarray]], block: range) -> int:
    return checksum_of_parts(raw_bytes(encoded[step][0]) for step in block)


def _write_rows(
    group: h5py.Group, encoded: Sequence[tuple[np.ndarray, np.ndarray]], storage: Storage
) -> int:
    group.attrs["storage"] = storage
    group["scale"] = np.concatenate([scales for _, scales in encoded])
    return _reserve(group, "sketch", [rows for rows, _ in encoded])


def _write_preconditioners(group: h5py.Group, steps: Sequence[Step]) -> None:
    changes = [(n, p) for n, step in enumerate(steps) if (p := step.preconditioner) is not None]
    group["step"] = np.array([position for position, _ in changes], dtype=np.int64)
    for name in ("rows", "columns"):
        factors = np.array([getattr(part, name).numpy() for _, part in changes])
        # Most factors equal those before, and lie near them within a chunk.
        layout = {"chunks": (len(factors), min(_CHUNK, factors.shape[1]))} if len(factors) else {}
        filters = {"shuffle": True, "compression": "gzip", "compression_opts": 6} if layout else {}
        group.create_dataset(name, data=factors, **layout, **filters)


def _reserve(group: h5py.Group, name: str, arrays: Sequence[np.ndarray]) -> int:
    """Create a contiguous dataset for the rows of the arrays; return its offset in the file."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    shape = (sum(len(array) for array in arrays), arrays[0].shape[1])
    dtype, space = h5py.h5t.py_create(arrays[0].dtype), h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(group.id, name.encode(), dtype, space, properties)
    offset: int | None = dataset.get_offset()
    return offset or 0  # Without rows, HDF5 allocates nothing.


def _fill(path: Path, offset: int, arrays: Sequence[np.ndarray]) -> tuple[int, int]:
    """Write arrays at an offset; return it and the number of bytes."""
    # Bypass HDF5, which needs one copy of all rows and holds Python's lock while it writes: 0.6 ms
    # per step, next to a training step of 0.8 ms.
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        for array in arrays:
            remaining = raw_bytes(array)
            while remaining:
                remaining = remaining[file.write(remaining) :]
    return offset, sum(array.nbytes for array in arrays)


def _write_audits(group: h5py.Group, steps: Sequence[Step]) -> None:
    audits = {n: step.audit for n, step in enumerate(steps) if step.audit is not None}
    group["step"] = np.array(list(audits), dtype=np.int64)
    group["gradient"] = np.array([audit.gradient.tolist() for audit in audits.values()])
    group["deviation"] = np.array([audit.deviation.tolist() for audit in audits.values()])
    group["left_out"] = np.array([audit.left_out for audit in audits.values()])
    group["update"] = np.array([audit.update for audit in audits.values()])
