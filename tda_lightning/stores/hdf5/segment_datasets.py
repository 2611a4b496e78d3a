"""Datasets of a segment: facts of its steps, and of their visits."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tda_lightning.stores.hdf5.stored_rows import StoredRows
from tda_lightning.stores.step import (
    OPTIONAL_FACTS,
    Audit,
    ParameterGroup,
    Preconditioner,
    StepFacts,
)

Datasets = Mapping[str, np.ndarray]

# The hyper-parameters of a group are stored under these names.
GROUP_FIELDS = tuple(field.name for field in fields(ParameterGroup))
_AUDIT_FIELDS = ("gradient", "deviation", "left_out", "update")
STEP_DATASETS = {
    *("blocks", "curvature/offset"),
    *(f"steps/{name}" for name in ("index", "epoch", "optimizer", "loss", "offset")),
    *(f"steps/{name}" for name in GROUP_FIELDS),
    *(f"audits/{name}" for name in ("step", *_AUDIT_FIELDS)),
    *(f"preconditioners/{name}" for name in ("step", "rows", "columns")),
}
VISIT_DATASETS = {
    *(f"visits/{name}" for name in ("sample_id", "weight", "scale", *OPTIONAL_FACTS)),
    "curvature/scale",
}
# Segments of older versions lack these columns of visits.
_NEW_FACTS = {"trace_ratio", "losses", "errors", "margins"}
# Segments of older versions lack these columns of groups; zero means unknown.
_NEW_GROUP_FIELDS = {"share", "decoupled", "descent", "owner"}
# Small enough to stay in a processor's cache between the disk and the first product.
_BLOCK_BYTES = 2**20
# Memory of the Python objects that hold the visits of a segment, about.
_OBJECT_BYTES = 2**13


class StepColumns:
    """The steps of a segment, without their visits.

    Args:
        datasets: The ``STEP_DATASETS`` of the segment.
        sketch: The rows of its visits.
        curvature_rows: The rows of its sampled labels.
    """

    def __init__(self, datasets: Datasets, sketch: StoredRows, curvature_rows: StoredRows) -> None:
        self._index = datasets["steps/index"].tolist()
        self._epoch = datasets["steps/epoch"].tolist()
        count = len(self._index)
        self._optimizer = _words(datasets, "optimizer")
        # Segments of older versions lack it.
        self._loss = _words(datasets, "loss") if "steps/loss" in datasets else [""] * count
        self._groups = np.stack([_group_values(datasets, name) for name in GROUP_FIELDS], -1)
        self.audits = _audits(datasets)
        self.preconditioners = _preconditioners(datasets)
        self.offset: list[int] = datasets["steps/offset"].tolist()
        self.curvature_offset: list[int] = datasets["curvature/offset"].tolist()
        self.sketch, self.curvature_rows = sketch, curvature_rows
        require_offsets(self.offset, count, sketch.count)
        require_offsets(self.curvature_offset, count, curvature_rows.count)
        columns = {"epoch": self._epoch, "optimizer": self._optimizer, "loss": self._loss}
        require_lengths(count, **columns, groups=self._groups)
        has_blocks = sketch.checksums is not None
        self.blocks = (
            _blocks_until(datasets["blocks"][:, 0].tolist(), count)
            if has_blocks
            else split(self.offset, max(1, _BLOCK_BYTES // sketch.row_bytes))
        )

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the last preconditioner set in this segment at or before the position."""
        changes = [start for start in self.preconditioners if start <= position]
        return self.preconditioners[max(changes)] if changes else None

    def facts(self, position: int, visits: Mapping[str, Tensor]) -> StepFacts:
        """Return the facts of a step, given the known columns of its visits."""
        return StepFacts(
            index=self._index[position],
            epoch=self._epoch[position],
            optimizer=self._optimizer[position],
            groups=tuple(ParameterGroup(*values) for values in self._groups[position].tolist()),
            sample_ids=visits["sample_id"],
            weights=visits["weight"],
            audit=self.audits.get(position),
            **{name: visits.get(name) for name in OPTIONAL_FACTS},
            preconditioner=self.preconditioners.get(position),
            loss=self._loss[position],
        )


class VisitColumns:
    """The visits of a segment, without their rows.

    Args:
        datasets: The ``VISIT_DATASETS`` of the segment.
        steps: Its steps.

    Attributes:
        scales: Scale of each row.
        curvature_scales: Scale of each row of sampled labels.
    """

    def __init__(self, datasets: Datasets, steps: StepColumns) -> None:
        self._offset = steps.offset
        names = ["sample_id", "weight", *OPTIONAL_FACTS]
        present = [n for n in names if n not in _NEW_FACTS or f"visits/{n}" in datasets]
        columns = {name: datasets[f"visits/{name}"] for name in present}
        self.scales, self.curvature_scales = datasets["visits/scale"], datasets["curvature/scale"]
        require_lengths(self._offset[-1], **columns, scale=self.scales)
        require_lengths(steps.curvature_offset[-1], scale=self.curvature_scales)
        self._is_known = {
            name: _is_known(values, self._offset)
            for name, values in columns.items()
            if name in OPTIONAL_FACTS
        }
        self._columns = {name: torch.from_numpy(values) for name, values in columns.items()}

    @property
    def sample_ids(self) -> Tensor:
        """Sample ids of all visits."""
        return self._columns["sample_id"]

    @property
    def n_bytes(self) -> int:
        """Memory of the visits, about."""
        columns = sum(values.nbytes for values in self._columns.values())
        return _OBJECT_BYTES + columns + self.scales.nbytes + self.curvature_scales.nbytes

    def of_step(self, position: int) -> dict[str, Tensor]:
        """Return the columns that were recorded in a step."""
        span = slice(self._offset[position], self._offset[position + 1])
        return {
            name: values[span]
            for name, values in self._columns.items()
            if name not in self._is_known or self._is_known[name][position]
        }


def split(offset: Sequence[int], visits_per_block: int) -> list[range]:
    """Split steps into blocks of at most ``visits_per_block`` visits, or of one step."""
    blocks = []
    start = 0
    for stop in range(1, len(offset)):
        is_last = stop == len(offset) - 1
        if is_last or offset[stop + 1] - offset[start] > visits_per_block:
            blocks.append(range(start, stop))
            start = stop
    return blocks


def blocks_of(counts: Sequence[int], rows: np.ndarray) -> list[range]:
    """Return the blocks of steps that are read at once, given their visits and encoded rows."""
    visits_per_block = _BLOCK_BYTES // (rows.shape[1] * rows.dtype.itemsize)
    return split(np.cumsum([0, *counts]).tolist(), max(1, visits_per_block))


def _blocks_until(ends: Sequence[int], n_steps: int) -> list[range]:
    """Return the blocks of steps that end before these steps."""
    offset = [0, *ends]
    require_offsets(offset, len(ends), n_steps)
    return [range(start, stop) for start, stop in pairwise(offset)]


def _is_known(values: np.ndarray, offset: Sequence[int]) -> np.ndarray:
    """Return for every step whether the column was recorded; NaN in all visits means unknown."""
    # Some values may be NaN in a recorded column: those of samples whose loss is not finite.
    n_missing = np.concatenate([[0], np.isnan(values).cumsum()])
    n_visits = np.diff(offset)
    known: np.ndarray = (np.diff(n_missing[offset]) < n_visits) | (n_visits == 0)
    return known


def _group_values(datasets: Datasets, name: str) -> np.ndarray:
    is_missing = name in _NEW_GROUP_FIELDS and f"steps/{name}" not in datasets
    return np.zeros(datasets["steps/lr"].shape) if is_missing else datasets[f"steps/{name}"]


def _words(datasets: Datasets, name: str) -> list[str]:
    words = [sys.intern(word.decode()) for word in datasets[f"steps/{name}"].tolist()]
    for word in set(words):
        if not word.isprintable():
            raise ValueError(f"{name!r} is {word[:60]!r}; expected a name")
    return words


def _preconditioners(datasets: Datasets) -> dict[int, Preconditioner]:
    positions, *factors = (datasets[f"preconditioners/{n}"] for n in ("step", "rows", "columns"))
    rows, columns = map(torch.from_numpy, factors)
    require_lengths(len(positions), rows=rows, columns=columns)
    return {
        position: Preconditioner(rows[number], columns[number])
        for number, position in enumerate(positions.tolist())
    }


def _audits(datasets: Datasets) -> dict[int, Audit]:
    columns = {name: datasets[f"audits/{name}"] for name in _AUDIT_FIELDS}
    positions = datasets["audits/step"].tolist()
    require_lengths(len(positions), **columns)
    return {
        position: Audit(
            torch.from_numpy(columns["gradient"][number]),
            torch.from_numpy(columns["deviation"][number]),
            float(columns["left_out"][number]),
            float(columns["update"][number]),
        )
        for number, position in enumerate(positions)
    }


def require_offsets(offset: Sequence[int], n_steps: int, n_rows: int) -> None:
    """Check that offsets divide rows among steps."""
    is_rising = all(before <= after for before, after in pairwise(offset))
    if len(offset) != n_steps + 1 or offset[0] != 0 or offset[-1] != n_rows or not is_rising:
        raise ValueError(
            f"The offsets of {n_steps} steps in {n_rows} rows do not rise from 0 to {n_rows}."
        )


def require_lengths(expected: int, **columns: Sized) -> None:
    """Check that every column has the expected number of entries.

    >>> require_lengths(3, weight=[1.0, 2.0])
    Traceback (most recent call last):
        ...
    ValueError: `weight` has 2 entries; expected 3.
    """
    for name, column in columns.items():
        if len(column) != expected:
            raise ValueError(f"`{name}` has {len(column)} entries; expected {expected}.")
