"""Batches that a ``training_step`` permutes, draws again or mixes, in passes without training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.gradients.row_pass import BatchRows
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.passes.batch_contents import find_tensors
from tda_lightning.recording.origins.joined import (
    StatedRows,
    followed_rows,
    known_rows,
    tracker_of,
)
from tda_lightning.recording.origins.order import MixedSamplesError, actual_order
from tda_lightning.recording.origins.repeated import repeated_rows

# What earlier batches of a pass have shown.
_STATEMENTS: MutableMapping[RowRecorder, StatedRows] = WeakKeyDictionary()


class DrawnBatch:
    """Finds the sample whose data each row of a batch holds.

    Args:
        rows: Records the rows of the batch.
        batch: The batch.
        n: Number of its samples.
    """

    def __init__(self, rows: RowRecorder, batch: Any, n: int) -> None:
        self._rows = rows
        self._repeated = repeated_rows(find_tensors(batch), n)
        self._stated = _STATEMENTS.setdefault(rows, StatedRows()).of(batch, n)
        self._tracker = tracker_of(batch, n, self._stated)
        self._is_followed = n > 1 and not rows.is_compiled
        self._order: Int[Tensor, " n"] | None = None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the samples through the forward pass of the batch inside the context."""
        if self._is_followed:
            with self._tracker:
                yield
        else:
            yield

    def show_rows(self) -> None:
        """Let the recorder know whose rows the batch has."""
        n = self._tracker.n
        followed = followed_rows(self._tracker.meetings, n)
        self._rows.known = known_rows(self._stated, followed, self._repeated)

    def read_order(self, argument: str) -> None:
        """Find the order of the samples, once the graph of the loss has been read."""
        tracker = self._tracker
        if count := self._rows.joined_rows():
            warnings.warn(
                f"Nothing shows which rows of `{argument}` are of one sample: there are {count} "
                "rows per sample; expected labels or ids that are repeated alike. Pass a "
                "`DataLoader` with `batch_size=1`, so that each row is a query.",
                stacklevel=2,
            )
        try:
            order = actual_order(tracker.meetings, tracker.n, self._rows.rows_of)
        except MixedSamplesError:
            warnings.warn(
                f"Rows of `{argument}` hold two samples, as in mixup or with permuted samples as "
                "negatives, so that their scores belong to both; expected one sample per row. "
                "Pass a `DataLoader` with `batch_size=1`, whose batches hold no second sample.",
                stacklevel=2,
            )
            return
        self._order = None if torch.equal(order, torch.arange(tracker.n)) else order

    def in_order(self, batch_rows: BatchRows, argument: str) -> BatchRows:
        """Return the rows in the order of the batch.

        Raises:
            ValueError: If some sample has no row, or several.
        """
        if self._order is None:
            return batch_rows
        n = len(self._order)
        if len(set(self._order.tolist())) < n:
            raise ValueError(
                f"`training_step` draws from the samples of `{argument}` again, so that some of "
                "them have several rows and others none; expected a row for each sample. Pass a "
                "`DataLoader` with `batch_size=1`, or do not draw `if not self.training`."
            )
        place = self._order.argsort()

        def moved(values: Tensor) -> Tensor:
            return values[place.to(values.device)] if len(values) == n else values

        curvature_rows = batch_rows.curvature_rows
        return BatchRows(
            moved(batch_rows.rows),
            batch_rows.loss.in_order(place),
            None if curvature_rows is None else moved(curvature_rows),
        )
