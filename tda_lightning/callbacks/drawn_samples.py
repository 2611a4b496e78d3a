"""DrawnSamples: rows of a step that do not hold the samples of the batch in their order.

A ``training_step`` may permute its batch, draw from it again, or mix two samples in a row. That is
checked in the first recorded batches, with growing distances. A batch that was drawn again gets the
ids of the samples that were drawn, and so do all later ones. Mixed rows are warned of.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from tda_lightning.callbacks.messages import inform
from tda_lightning.gradients.graph.sample_layout import IrregularRows, KnownRows, SampleLayout
from tda_lightning.gradients.losses import compares_all_pairs, mixes_samples
from tda_lightning.passes.batch_contents import find_tensors
from tda_lightning.recording.collation import tensors_of_samples
from tda_lightning.recording.origins.joined import (
    StatedRows,
    followable,
    followed_rows,
    known_rows,
    tracker_of,
)
from tda_lightning.recording.origins.order import MixedSamplesError, RowsOf, actual_order
from tda_lightning.recording.origins.repeated import repeated_rows
from tda_lightning.recording.origins.tracker import OriginTracker


class DrawnSamples:
    """Finds which samples the rows of each batch hold.

    Args:
        name: Name of the callback, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._n_batches = 0
        self._transferred: OriginTracker | None = None
        self._tracker: OriginTracker | None = None
        self._following = ExitStack()
        self._are_drawn = self._are_mixed = False
        self._statements = StatedRows()
        self._stated: dict[int, IrregularRows] = {}
        self._known = KnownRows()
        # The layouts of rows of which the batch has several per sample, by how many there are.
        self._layouts: dict[int, SampleLayout] = {}

    def _is_checked(self, number: int) -> bool:
        """Return whether a batch is checked: 1, 2, 4, 8, since a step may mix in some only."""
        return self._are_drawn or (not self._are_mixed and number & (number - 1) == 0)

    def transferring(self, batch: Any) -> AbstractContextManager[object]:
        """Follow the samples of the next batch through hooks of the model, inside the context."""
        self._transferred = None
        if not self._is_checked(self._n_batches + 1):
            return nullcontext()
        lengths = Counter(len(each) for each in find_tensors(batch) if each.ndim)
        n = max(lengths, key=lengths.__getitem__, default=0)  # Ids are not known yet.
        self._transferred = OriginTracker(tensors_of_samples(batch, n), n)
        return self._transferred

    def start(self, batch: Any, n: int, is_compiled: bool) -> None:
        """Follow the samples of a batch until :meth:`stop`, if it is to be checked.

        In a compiled model, only labels are checked.
        """
        self.stop()
        self._n_batches += 1
        self._stated = self._statements.of(batch, n)
        self._known = KnownRows(self._stated)
        before, self._tracker, self._transferred = self._transferred, None, None
        if not self._is_checked(self._n_batches):
            return
        for size, layout in repeated_rows(find_tensors(batch), n).items():
            if size not in self._stated:
                self._layouts[size // n] = layout
        tensors = followable(batch, n, self._stated)
        is_followed = before is not None and any(map(before.origins_of, tensors))
        if before is not None and is_followed and before.n == n:
            self._tracker = before
        else:
            self._tracker = tracker_of(batch, n, self._stated)
        if not is_compiled:
            self._following.enter_context(self._tracker)

    def stop(self) -> None:
        """Stop following samples: the forward pass is over, or the training."""
        self._following.close()

    def close(self) -> None:
        """Forget the batch: the training is over."""
        self.stop()
        self._statements = StatedRows()
        for tracker in (self._tracker, self._transferred):
            if tracker is not None:
                tracker.forget()
        self._tracker = self._transferred = None

    def known_rows(self, n: int) -> KnownRows:
        """Return whose rows the batch of ``n`` samples has, once its forward pass is over."""
        if self._tracker is not None:
            self._known = known_rows(self._stated, followed_rows(self._tracker.meetings, n), {})
        for size, rows in self._known.followed.items():
            if isinstance(rows, SampleLayout):
                self._layouts[size // n] = rows
            else:
                self._are_drawn = True  # They may be others in each batch.
        stated = self._known.stated.items()
        if any(rows is not self._stated.get(size) for size, rows in stated):
            self._report_moves()
        regular = {n * count: layout for count, layout in self._layouts.items()}
        return KnownRows(self._known.stated, {**regular, **self._known.followed})

    def order(self, loss: Tensor, rows_of: RowsOf | None) -> Int[Tensor, " n"] | None:
        """Return the sample in the rows of each sample; ``None`` if they are in order.

        Args:
            loss: The loss of the batch, with its graph.
            rows_of: Returns where the recorder takes the samples to lie in the output of a node.
                With ``None``, only the rows of the loss count.
        """
        tracker, self._tracker = self._tracker, None
        if tracker is None or (rows_of is None and tracker.n in self._stated):
            return None
        meetings = [m for m in tracker.meetings if rows_of or not m.is_with_parameter]
        try:
            order = actual_order(meetings, tracker.n, rows_of or (lambda node: None))
        except MixedSamplesError:
            self._warn_of_mixing()
            return None
        except RuntimeError:  # Tensors of an unusual kind must not end the training.
            return None
        if mixes_samples(loss):
            self._warn_of_mixing()
        if self._n_batches == 1 and compares_all_pairs(loss, tracker.n):
            rank_zero_warn(
                f"{self._name}: the loss subtracts targets of another shape from the outputs, such "
                f"as ({tracker.n},) from ({tracker.n}, 1). So each output is compared with the "
                "targets of all samples, and its row holds all of them; expected equal shapes. Add "
                "or remove the axis: `targets[:, None]` or `outputs[:, 0]`."
            )
        if torch.equal(order, torch.arange(tracker.n)):
            return None
        self._report_draws()
        return order

    def _warn_of_mixing(self) -> None:
        if self._are_mixed:
            return
        self._are_mixed = True
        rank_zero_warn(
            f"{self._name}: rows of the batch hold two samples, as in mixup or CutMix, or with "
            "permuted samples as negatives. Each of them has the id of one; expected one sample "
            "per row. Mix the samples in the loader, with the ids and weights of both, and permute "
            "outputs of the model instead of its inputs: see `Mixup and CutMix` in docs/gotchas.md."
        )

    def _report_moves(self) -> None:
        if not self._are_drawn and self._n_batches > 1:
            rank_zero_warn(
                f"{self._name}: `training_step`, or a hook, moves the joined elements of a batch, "
                f"which was noticed in recorded batch {self._n_batches}. From here on, rows follow "
                "them. If elements were moved before, rows may have the ids of other samples: "
                "expected a step that does so from the first batch on, or never. Move them in the "
                "loader instead."
            )
        self._are_drawn = True

    def _report_draws(self) -> None:
        if self._are_drawn:
            return
        self._are_drawn = True
        fact = "`training_step`, or a hook, draws the samples of the batch again or permutes them"
        if self._n_batches == 1:
            inform(f"{self._name}: {fact}. Rows have the ids of the samples that were drawn.")
        else:
            rank_zero_warn(
                f"{self._name}: {fact}, which was noticed in recorded batch {self._n_batches}. "
                "From here on, rows have the ids of the samples that were drawn. If batches before "
                "were drawn again too, their ids may be wrong: expected a step that does so from "
                "the first batch on, or never. Draw in the loader instead, with `sample_ids=`."
            )
