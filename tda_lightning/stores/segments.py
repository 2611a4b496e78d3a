"""Segments: sealed HDF5 files of consecutive steps. The only file that knows h5py.

A segment is written under a temporary name, flushed, fsynced and renamed; once it has its name it
is whole and never changes. ``docs/file-format.md`` describes the inside.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path

import h5py
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.step import Audit, ParameterGroup, Preconditioner, Step
from tda_lightning.stores.encoding import Storage, decode, encode

_GROUP_FIELDS = tuple(field.name for field in fields(ParameterGroup))
_BLOCK_BYTES = 8 * 2**20


def write_segment(path: Path, steps: Sequence[Step], storage: Storage) -> None:
    """Write steps to a new sealed segment, or leave no file of that name.

    Args:
        path: Final name of the segment.
        steps: At least one step; all with the same number of parameter groups.
        storage: Number format of the rows.
    """
    partial = partial_name(path)
    sketches = [encode(step.sketch, storage) for step in steps]
    curvature = [encode(_curvature_rows(step), storage) for step in steps]
    with h5py.File(partial, "w") as file:
        _write_steps(file.create_group("steps"), steps)
        _write_audits(file.create_group("audits"), steps)
        _write_preconditioners(file.create_group("preconditioners"), steps)
        _write_visits(file.create_group("visits"), steps)
        places = [
            _write_rows(file["visits"], sketches, storage),
            _write_rows(file.create_group("curvature"), curvature, storage),
        ]
        file["curvature/offset"] = np.cumsum([0, *(len(rows) for rows, _ in curvature)])
    for place, encoded in zip(places, (sketches, curvature), strict=True):
        _fill(partial, place, [rows for rows, _ in encoded])
    make_durable(partial)
    partial.replace(path)
    make_durable(path.parent)


def partial_name(path: Path) -> Path:
    """Return the name of a file that is being written: with it, it can be ignored."""
    return path.with_name(f".{path.name}.partial")


def make_durable(path: Path) -> None:
    """Wait until a file's or folder's content has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_steps(group: h5py.Group, steps: Sequence[Step]) -> None:
    group["index"] = np.array([step.index for step in steps], dtype=np.int64)
    group["epoch"] = np.array([step.epoch for step in steps], dtype=np.int64)
    group["optimizer"] = [step.optimizer for step in steps]
    group["loss"] = [step.loss for step in steps]
    counts = [len(step.sample_ids) for step in steps]
    group["offset"] = np.cumsum([0, *counts], dtype=np.int64)
    hyper = np.array([[astuple(one) for one in step.groups] for step in steps], dtype=np.float64)
    for number, name in enumerate(_GROUP_FIELDS):
        group[name] = hyper[:, :, number]


def _hyper(group: h5py.Group, name: str) -> np.ndarray:
    # Segments of older runs lack some columns: zeros, for what is not known.
    return group[name][:] if name in group else np.zeros(group["lr"].shape)


def _words(group: h5py.Group, name: str) -> list[str]:
    return group[name].asstr()[:].tolist() if name in group else [""] * len(group["index"])


def _write_visits(group: h5py.Group, steps: Sequence[Step]) -> None:
    group["sample_id"] = torch.cat([step.sample_ids for step in steps]).numpy()
    group["weight"] = torch.cat([step.weights for step in steps]).numpy()
    for name in ("terms", "curvature"):
        group[name] = torch.cat([_or_unknown(step, name) for step in steps]).numpy()


def _or_unknown(step: Step, name: str) -> Tensor:
    known: Tensor | None = getattr(step, name)
    return torch.full((len(step.sample_ids),), torch.nan) if known is None else known.float()


def _curvature_rows(step: Step) -> Tensor:
    return step.sketch[:0] if step.curvature_rows is None else step.curvature_rows


def _write_rows(
    group: h5py.Group, encoded: Sequence[tuple[np.ndarray, np.ndarray]], storage: Storage
) -> int:
    group.attrs["storage"] = storage
    group["scale"] = np.concatenate([scales for _, scales in encoded])
    return _reserve(group, "sketch", [rows for rows, _ in encoded])


def _write_preconditioners(group: h5py.Group, steps: Sequence[Step]) -> None:
    found = [(n, one) for n, step in enumerate(steps) if (one := step.preconditioner) is not None]
    group["step"] = np.array([place for place, _ in found], dtype=np.int64)
    for name in ("rows", "columns"):
        group[name] = np.array([getattr(one, name).numpy() for _, one in found])


def _read_preconditioners(group: h5py.Group) -> dict[int, Preconditioner]:
    rows, columns = torch.from_numpy(group["rows"][:]), torch.from_numpy(group["columns"][:])
    return {
        int(place): Preconditioner(rows[number], columns[number])
        for number, place in enumerate(group["step"][:])
    }


def _reserve(group: h5py.Group, name: str, arrays: Sequence[np.ndarray]) -> int:
    """Make a contiguous dataset for the arrays' rows; return where in the file it begins."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    shape = (sum(len(array) for array in arrays), arrays[0].shape[1])
    dtype, space = h5py.h5t.py_create(arrays[0].dtype), h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(group.id, name.encode(), dtype, space, properties)
    offset: int | None = dataset.get_offset()
    return offset or 0  # Nothing is allocated for no rows.


def _fill(path: Path, offset: int, arrays: Sequence[np.ndarray]) -> None:
    # Past HDF5, which would want one copy of all rows first, and hold Python's lock while it writes
    # (0.6 ms a step beside a training step of 0.8 ms).
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        for array in filter(len, arrays):
            left = np.ascontiguousarray(array).data.cast("B")
            while left:
                left = left[file.write(left) :]


def _write_audits(group: h5py.Group, steps: Sequence[Step]) -> None:
    found = [(place, step.audit) for place, step in enumerate(steps) if step.audit is not None]
    group["step"] = np.array([place for place, _ in found], dtype=np.int64)
    group["gradient"] = np.array([audit.gradient.tolist() for _, audit in found])
    group["deviation"] = np.array([audit.deviation.tolist() for _, audit in found])
    group["left_out"] = np.array([audit.left_out for _, audit in found])
    group["update"] = np.array([audit.update for _, audit in found])


def _read_audits(group: h5py.Group) -> dict[int, Audit]:
    names = ("gradient", "deviation", "left_out", "update")
    gradient, deviation, left_out, update = (group[name][:] for name in names)
    return {
        int(place): Audit(
            torch.from_numpy(gradient[number]),
            torch.from_numpy(deviation[number]),
            float(left_out[number]),
            float(update[number]),
        )
        for number, place in enumerate(group["step"][:])
    }


class Segment:
    """A sealed segment, read block by block.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with h5py.File(path, "r") as file:
            steps = file["steps"]
            self._index: list[int] = steps["index"][:].tolist()
            self._epoch = steps["epoch"][:].tolist()
            self._offset = steps["offset"][:].tolist()
            self._optimizer, self._loss = _words(steps, "optimizer"), _words(steps, "loss")
            self._hyper = np.stack([_hyper(steps, name) for name in _GROUP_FIELDS], -1).tolist()
            self._audits = _read_audits(file["audits"])
            self._preconditioners = _read_preconditioners(file["preconditioners"])
            self._curvature_offset = file["curvature/offset"][:].tolist()
            row_bytes = file["visits/sketch"].dtype.itemsize * file["visits/sketch"].shape[1]
        self._blocks = _split(self._offset, max(1, _BLOCK_BYTES // row_bytes))

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._index)

    @property
    def indices(self) -> list[int]:
        """Index of every step: the number of optimizer steps taken before it."""
        return self._index

    def block_around(self, position: int) -> range:
        """Return the positions that are read together with this one."""
        return next(block for block in self._blocks if position in block)

    def audits(self) -> list[Audit]:
        """Return the audits of this segment's steps, in order."""
        return list(self._audits.values())

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the ids of the samples in this segment, sorted."""
        with h5py.File(self._path, "r") as file:
            ids: Tensor = torch.unique(torch.from_numpy(file["visits/sample_id"][:]))
        return ids

    def visits(self) -> Iterator[tuple[int, int, Int[Tensor, " n"]]]:
        """Yield the index, the epoch and the sample ids of every step, in order."""
        with h5py.File(self._path, "r") as file:
            ids = torch.from_numpy(file["visits/sample_id"][:])
        places = zip(self._offset, self._offset[1:], self._index, self._epoch, strict=False)
        for start, stop, index, epoch in places:
            yield index, epoch, ids[start:stop]

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the last one that began at this position or before it, in this segment."""
        begun = [place for place in self._preconditioners if place <= position]
        return self._preconditioners[max(begun)] if begun else None

    def read(self, positions: range) -> list[Step]:
        """Read consecutive steps; their tensors share one piece of memory."""
        visits, curvature = self._offset, self._curvature_offset
        with h5py.File(self._path, "r") as file:
            columns = _read_columns(file["visits"], _span(visits, positions))
            columns["sketch"] = _read_rows(file["visits"], _span(visits, positions))
            sampled = _read_rows(file["curvature"], _span(curvature, positions))
        return [
            self._step(
                place,
                {name: _part(values, visits, positions, place) for name, values in columns.items()},
                _part(sampled, curvature, positions, place),
            )
            for place in positions
        ]

    def _step(self, place: int, columns: dict[str, Tensor], sampled: Tensor) -> Step:
        return Step(
            index=self._index[place],
            epoch=self._epoch[place],
            optimizer=self._optimizer[place],
            groups=tuple(ParameterGroup(*values) for values in self._hyper[place]),
            sample_ids=columns["sample_id"],
            weights=columns["weight"],
            sketch=columns["sketch"],
            audit=self._audits.get(place),
            terms=_if_known(columns["terms"]),
            curvature=_if_known(columns["curvature"]),
            curvature_rows=sampled if len(sampled) else None,
            preconditioner=self._preconditioners.get(place),
            loss=self._loss[place],
        )


_COLUMNS = ("sample_id", "weight", "terms", "curvature")


def _span(offset: Sequence[int], positions: range) -> slice:
    return slice(offset[positions.start], offset[positions.stop])


def _part(values: Tensor, offset: Sequence[int], positions: range, place: int) -> Tensor:
    first = offset[positions.start]
    return values[offset[place] - first : offset[place + 1] - first]


def _read_columns(group: h5py.Group, span: slice) -> dict[str, Tensor]:
    return {name: torch.from_numpy(group[name][span]) for name in _COLUMNS}


def _read_rows(group: h5py.Group, span: slice) -> Tensor:
    return decode(group["sketch"][span], group["scale"][span], group.attrs["storage"])


def _if_known(values: Tensor) -> Tensor | None:
    return None if bool(values.isnan().any()) else values


def _split(offset: Sequence[int], visits_per_block: int) -> list[range]:
    """Cut steps into runs of at most ``visits_per_block`` visits, or of one step."""
    blocks = []
    start = 0
    for stop in range(1, len(offset)):
        is_last = stop == len(offset) - 1
        if is_last or offset[stop + 1] - offset[start] > visits_per_block:
            blocks.append(range(start, stop))
            start = stop
    return blocks
