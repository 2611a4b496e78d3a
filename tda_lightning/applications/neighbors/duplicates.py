"""Find duplicates: groups of training samples that nearly coincide, and labels that disagree.

Two samples are copies if the cosine of their directions is high; copies of copies are in the same
group. From the run alone, directions are those of the recorded gradients, in which copies with
different labels differ. With the model, they are those of the features before the last layer, which
do not depend on labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.applications.neighbors.directions import (
    Directions,
    feature_directions,
    gradient_directions,
)
from tda_lightning.applications.notes import Note
from tda_lightning.applications.predictions import given_labels, warn_of_given_ids
from tda_lightning.features import train_features
from tda_lightning.passes.outputs import Labels, labels_of
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.results.html_tables import ShownInNotebooks, with_notes
from tda_lightning.results.optional import DataFrame
from tda_lightning.results.tables import frame_by_sample
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_not_negative
from tda_lightning.stores.opening import Run, open_run

GRADIENT_SIMILARITY, FEATURE_SIMILARITY = 0.98, 0.995
# If more of the samples are in groups, different samples are probably alike to the model.
MANY_GROUPED = 0.2


@dataclass(frozen=True)
class Duplicates(ShownInNotebooks):
    """Groups of training samples that nearly coincide.

    Attributes:
        groups: Ids of each group, sorted; the group with the most similar pair first.
        train_ids: Ids of all training samples, shape ``(n_train,)``.
        similarities: Largest cosine of each training sample with another, shape ``(n_train,)``.
        labels: Label of each training sample, if a loader was passed; shape ``(n_train,)``.
        threshold: Least cosine of two copies.
        notes: What limits the answer, and what to do about it.
    """

    groups: tuple[Int64[Tensor, " _"], ...]
    train_ids: Int64[Tensor, " n_train"]
    similarities: Float[Tensor, " n_train"]
    labels: Int[Tensor, " n_train"] | None
    threshold: float
    notes: tuple[Note, ...]

    @property
    def ids(self) -> Int64[Tensor, " n_grouped"]:
        """Ids of the samples in groups, group by group."""
        return torch.cat([self.train_ids[:0], *self.groups])

    @property
    def scores(self) -> Float[Tensor, " n_grouped"]:
        """Largest cosine of each of ``ids`` with another sample."""
        return self.similarities[torch.searchsorted(self.train_ids, self.ids)]

    @property
    def redundant_ids(self) -> Int64[Tensor, " n_redundant"]:
        """All but the first id of each group: without them, no copies are left."""
        return torch.cat([self.train_ids[:0], *(group[1:] for group in self.groups)])

    @cached_property
    def disagreeing(self) -> tuple[Int64[Tensor, " _"], ...]:
        """The groups in which labels differ: at least one of their labels is wrong.

        Raises:
            ValueError: If labels are unknown.
        """
        if self.labels is None:
            raise ValueError(
                "Labels are unknown; expected those of the training data. Pass `model` and "
                "`loader` to `find_duplicates`."
            )
        return tuple(
            group for group in self.groups if len(torch.unique(self._labels_of(group))) > 1
        )

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per sample in a group, indexed by its id."""
        numbers = [number for number, group in enumerate(self.groups) for _ in group.tolist()]
        frame = frame_by_sample(self.ids, {"similarity": self.scores})
        frame.insert(0, "group", numbers)
        if self.labels is None:
            return frame
        frame["label"] = self._labels_of(self.ids).numpy()
        return frame.assign(disagrees=frame.groupby("group").label.transform("nunique") > 1)

    def __repr__(self) -> str:
        n = len(self.train_ids)
        head = f"Duplicates: {len(self.ids):,} of {n:,} samples are in {len(self.groups):,} groups"
        lines = [head + f" with cosines above {self.threshold:g}"]
        if self.labels is not None:
            lines.append(f"  labels disagree in {len(self.disagreeing):,} groups")
        first = [] if self.labels is None else [*self.disagreeing[:5]]
        shown = {int(group[0]): group for group in (*first, *self.groups[:5])}
        lines += [f"  {self._describe(group)}" for group in list(shown.values())[:5]]
        lines += ["  ..."] if len(self.groups) > 5 else []
        return with_notes(lines, self.notes)

    def _describe(self, group: Int64[Tensor, " _"]) -> str:
        ids = group[:6].tolist()
        words = [str(sample_id) for sample_id in ids]
        if self.labels is not None:
            labels = self._labels_of(group[:6]).tolist()
            words = [f"{i} (label {label})" for i, label in zip(ids, labels, strict=True)]
        return ", ".join(words) + (", ..." if len(group) > 6 else "")

    def _labels_of(self, ids: Int64[Tensor, " n"]) -> Int[Tensor, " n"]:
        assert self.labels is not None
        return self.labels[torch.searchsorted(self.train_ids, ids)]


def find_duplicates(
    run: Run,
    model: nn.Module | None = None,
    loader: DataLoader[Any] | None = None,
    *,
    similarity: float | None = None,
    layer: str | None = None,
    labels: Labels | None = labels_of,
    sample_ids: IdSource | None = None,
    progress: bool = True,
) -> Duplicates:
    """Find groups of training samples that nearly coincide.

    The run alone finds copies with the same label. A model and a loader find copies with any label,
    and which of them disagree. Time grows with the square of the number of samples.

    Args:
        run: A recorded training: its folder or a store.
        model: The trained LightningModule.
        loader: The training data.
        similarity: Least cosine of two copies: by default .98 for gradients, .995 for features.
        layer: Name of the layer whose inputs are compared; by default the last ``Linear`` that is
            called.
        labels: Function of the batch that returns the labels, or ``None`` for data without.
        sample_ids: Ids in the batches of the loader, as they were recorded: see
            :class:`~tda_lightning.GradientRecorder`.
        progress: Show a progress bar.

    Returns:
        The groups, the most similar first.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If only one of ``model`` and ``loader`` is passed, or the run holds no rows.
    """
    if similarity is not None:
        require_not_negative("similarity", similarity)
        if similarity > 1:
            raise ValueError(
                f"`similarity` is {similarity!r}; expected a cosine from 0 to 1, such as "
                f"{GRADIENT_SIMILARITY}."
            )
    store = open_run(run)
    if (model is None) != (loader is None):
        raise ValueError(
            "Only one of `model` and `loader` is passed; expected both or none. Pass both to find "
            "copies with different labels."
        )
    if model is None or loader is None:
        directions, given, threshold = gradient_directions(store), None, GRADIENT_SIMILARITY
    else:
        if sample_ids is None:
            warn_of_given_ids(store, "loader", remedy="Pass `sample_ids=` here, too.")
        features = train_features(
            model, loader, layer=layer, sample_ids=sample_ids, progress=progress
        )
        directions, threshold = feature_directions(features), FEATURE_SIMILARITY
        given = None if labels is None else _labels_by_id(loader, labels, sample_ids, features.ids)
    threshold = threshold if similarity is None else similarity
    groups, similarities = _groups(directions, threshold)
    is_by_features = model is not None
    n_grouped, n = sum(map(len, groups)), len(directions.train_ids)
    notes = [
        *_notes_on_number(n_grouped, n, is_by_features),
        *_notes(store, directions, is_by_features),
    ]
    return Duplicates(groups, directions.train_ids, similarities, given, threshold, tuple(notes))


def _labels_by_id(
    loader: DataLoader[Any],
    labels: Labels,
    sample_ids: IdSource | None,
    ids: Int[Tensor, " n_train"],
) -> Int[Tensor, " n_train"]:
    """Return the label of each sample; labels that are no whole numbers are numbered."""
    given_ids, given = given_labels(loader, labels, sample_ids)
    ordered = given[given_ids.argsort()]
    assert len(ordered) == len(ids)
    is_whole = ordered.ndim == 1 and not ordered.is_floating_point()
    return ordered if is_whole else torch.unique(ordered, dim=0, return_inverse=True)[1]


def _groups(
    directions: Directions, threshold: float
) -> tuple[tuple[Int64[Tensor, " _"], ...], Float[Tensor, " n_train"]]:
    """Return the ids of each group that cosines above the threshold join, the most similar first.

    Also return the largest cosine of each sample.
    """
    n = len(directions.train_ids)
    group_of, nearest = torch.arange(n), torch.zeros(n)
    for start, cosines in directions.cosines():
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -1.0  # A sample is no copy of itself.
        nearest[start : start + len(cosines)] = cosines.amax(dim=1)
        is_copy = cosines >= threshold
        for row in is_copy.any(dim=1).nonzero()[:, 0].tolist():
            members = torch.cat([group_of[start + row][None], group_of[is_copy[row]]])
            group_of[torch.isin(group_of, members)] = members.min()
    numbers, sizes = torch.unique(group_of, return_counts=True)
    groups = [(group_of == number).nonzero()[:, 0] for number in numbers[sizes > 1]]
    groups.sort(key=lambda group: -float(nearest[group].max()))
    return tuple(directions.train_ids[group] for group in groups), nearest.clamp(-1, 1)


def _notes_on_number(n_grouped: int, n: int, is_by_features: bool) -> Iterator[Note]:
    if n_grouped > MANY_GROUPED * n:
        yield Note(
            f"{n_grouped:,} of {n:,} samples are in groups, so most are probably no copies: the "
            "model hardly tells its samples apart, as early in a training, or in a regression with "
            "inputs that are not scaled.",
            remedy="Look at some pairs"
            + ("." if is_by_features else ", or pass `model` and `loader`."),
        )


def _notes(store: Store, directions: Directions, is_by_features: bool) -> Iterator[Note]:
    yield from directions.notes()
    missing = ~torch.isin(store.train_ids(), directions.train_ids)
    if missing.any():
        yield Note(
            f"{int(missing.sum()):,} samples of the run are not in the loader; they were not "
            "examined."
        )
    if is_by_features:
        yield Note(
            f"Samples were compared by {directions.origin}: different samples with the same "
            "features are in a group, too."
        )
    else:
        yield Note(
            "Gradients depend on labels, so copies with different labels cannot be found this way.",
            remedy="Pass `model` and `loader` to find them.",
        )
    yield Note("Copies that the model sees differently, such as shifted images, cannot be found.")
