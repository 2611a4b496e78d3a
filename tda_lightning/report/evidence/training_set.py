"""The training data behind the ids of a run: items, labels and exact copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tda_lightning.passes.batches import root_dataset
from tda_lightning.report.samples.shown import Label, Shown, content_hash, label_of
from tda_lightning.results.progress import progress_bar

# A larger training set is read only where its samples are shown.
MAX_READ = 20_000


@dataclass(frozen=True)
class TrainingSet:
    """Items of the training set by id.

    Attributes:
        dataset: The dataset that the ids index, below any ``Subset``.
        ids: Ids of all training samples, sorted.
        labels: Labels by id; empty if the training set was not read.
        copies: Groups of ids whose contents are equal, apart from their labels.
        render: Function from an item to how it is shown.
    """

    dataset: Any
    ids: list[int]
    labels: dict[int, Label | None]
    copies: list[list[int]]
    render: Callable[[Any], Shown]

    @property
    def was_read(self) -> bool:
        """Whether the whole training set was read."""
        return bool(self.labels)

    def shown(self, sample: int) -> Shown:
        """Return how a training sample is shown."""
        return rendered(self.render, self.dataset[sample])


def training_set(
    train: Any,
    ids: list[int],
    render: Callable[[Any], Shown],
    *,
    has_classes: bool,
    progress: bool,
) -> TrainingSet:
    """Read the labels of the training set, and find exact copies.

    If it ``has_classes``, labels such as 1.0 are classes.

    Raises:
        ValueError: If the ids are not indices of the dataset.
    """
    dataset = _require_dataset(train, ids)
    labels: dict[int, Label | None] = {}
    hashes: dict[bytes, list[int]] = {}
    for sample in progress_bar(ids, "training set", "sample", shown=progress):
        if len(ids) > MAX_READ:
            break
        item = dataset[sample]
        labels[sample] = label_of(item, has_classes)
        hashes.setdefault(content_hash(item), []).append(sample)
    copies = [group for group in hashes.values() if len(group) > 1]
    return TrainingSet(dataset, ids, labels, copies, render)


def rendered(render: Callable[[Any], Shown], item: Any) -> Shown:
    """Return how an item is shown.

    Raises:
        ValueError: If ``render`` returns something else.
    """
    shown = render(item)
    if not isinstance(shown, Shown):
        raise ValueError(
            f"`render` returned a `{type(shown).__name__}`; expected a `Shown`, such as "
            '`Shown(label="cat", image=item[0])`.'
        )
    return shown


def _require_dataset(train: Any, ids: list[int]) -> Any:
    train = root_dataset(train)
    if not hasattr(train, "__getitem__") or not hasattr(train, "__len__"):
        raise ValueError(
            f"`train` is a `{type(train).__name__}`; expected the dataset of the training, with "
            "`__getitem__` and `__len__`. Pass the dataset, not its loader."
        )
    if ids and not (ids[0] >= 0 and ids[-1] < len(train)):
        raise ValueError(
            f"`train` has {len(train):,} samples, and the run has ids from {ids[0]} to {ids[-1]}; "
            "expected ids that index the dataset. Pass the dataset of the training. If you named "
            "the samples yourself, pass a dataset with these ids as indices."
        )
    return train
