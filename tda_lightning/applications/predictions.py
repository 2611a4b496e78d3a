"""Predictions of a model on a loader: the probabilities, labels and ids of its samples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.passes.batch_contents import require_batches
from tda_lightning.passes.batches import named_batches, require_loader, transfer
from tda_lightning.passes.labelled_logits import require_logits
from tda_lightning.passes.model_state import preserved_state, require_model
from tda_lightning.passes.outputs import Labels, Outputs
from tda_lightning.recording.sample_ids import IdSource, SampleLedger
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import describe, require_kind


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of the samples of a loader, in the order of the loader.

    Attributes:
        ids: Index of each sample in the dataset, below any ``Subset``, shape ``(n,)``.
        probabilities: Predicted probability of each class, shape ``(n, classes)``.
        labels: Given labels, shape ``(n,)``.
    """

    ids: Int64[Tensor, " n"]
    probabilities: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"]

    def predicted(self) -> Int64[Tensor, " n"]:
        """Return the most probable class of each sample."""
        return self.probabilities.argmax(dim=1)

    def of(self, ids: Int64[Tensor, " m"]) -> Predictions:
        """Return the predictions for some ids, in their order.

        Raises:
            ValueError: If there is none for one of them.
        """
        order = self.ids.argsort()
        places = torch.searchsorted(self.ids[order], ids).clamp_max(len(order) - 1)
        rows = order[places]
        missing = ids[self.ids[rows] != ids]
        if len(missing):
            raise ValueError(
                f"`loader` does not yield sample {int(missing[0])} and {len(missing) - 1} more "
                "of the run's training set; expected all of them. Pass a loader of the training "
                "data without `drop_last`."
            )
        return Predictions(ids, self.probabilities[rows], self.labels[rows])


def of_classes(run: Store, outputs: Outputs, labels: Labels) -> tuple[Outputs, Labels]:
    """Return outputs with one logit per class, and whole labels, also for two classes.

    A binary cross-entropy takes one logit :math:`z` per sample. It is that of the logits
    :math:`(-z/2, z/2)`, of class 0 and class 1.
    """
    if run.facts[0].loss != "cross-entropy":
        return outputs, labels

    def class_logits(module: nn.Module, batch: Any) -> Tensor:
        logits = outputs(module, batch)
        logits = logits[None] if logits.ndim == 0 else logits
        if logits.ndim > 2 or logits.numel() != len(logits):
            return logits
        return torch.stack([-logits.flatten() / 2, logits.flatten() / 2], dim=1)

    def whole_labels(batch: Any) -> Tensor:
        given = labels(batch)
        if given.numel() != len(given) or not ((given == 0) | (given == 1)).all():
            return given
        return given.flatten().long()

    return class_logits, whole_labels


def predict(
    model: nn.Module,
    loader: DataLoader[Any],
    outputs: Outputs,
    labels: Labels,
    progress: bool,
    sample_ids: IdSource | None = None,
) -> Predictions:
    """Return the predictions of a classifier in evaluation mode; its state is restored.

    ``outputs`` returns logits, shape ``(n, classes)``, and ``labels`` one label per sample.

    Raises:
        ValueError: If the logits or the labels have another shape, or the model returns
            probabilities.
    """
    require_model(model)
    require_loader(loader, "loader")
    require_kind("loader", loader, DataLoader, "`DataLoader(test, batch_size=50)`")
    parts = []
    named = named_batches(SampleLedger(sample_ids), loader, "predictions", progress)
    with named as batches, preserved_state(model, "eval"), torch.no_grad():
        for ids, batch in batches:
            given, logits = labels(batch), outputs(model, transfer(model, batch))
            _require_classes(logits, given)
            parts.append((ids, logits.cpu().double(), given.cpu().long()))
    require_batches(parts, "loader")
    ids, logits, given = (torch.cat(column) for column in zip(*parts, strict=True))
    require_logits(logits)
    require_single_logit(logits)
    return Predictions(ids, logits.softmax(dim=1), given)


def given_labels(
    loader: DataLoader[Any], labels: Labels, sample_ids: IdSource | None = None
) -> tuple[Int64[Tensor, " n"], Tensor]:
    """Return the ids and the labels of the samples of a loader, in one pass over it."""
    require_loader(loader, "loader")
    with named_batches(SampleLedger(sample_ids), loader, "labels", progress=False) as batches:
        parts = [(ids, labels(batch).cpu()) for ids, batch in batches]
    ids, given = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, given


def warn_of_given_ids(run: Store, argument: str, *, remedy: str) -> None:
    """Warn if the ids of a run come from its batches, and those of a loader from its sampler."""
    if run.recipe.train_ids is None:
        warnings.warn(
            f"The ids of the run come from `sample_ids=`, and those of `{argument}` are indices "
            "into its dataset; expected the same numbers, or samples are taken for others. "
            f"{remedy}",
            stacklevel=3,
        )


def require_single_logit(logits: Float[Tensor, "n classes"]) -> None:
    """Check that a single output per sample was a logit, and not behind a sigmoid."""
    is_pair = logits.shape[1] == 2 and bool((logits[:, 0] == -logits[:, 1]).all())
    single = 2 * logits[:, -1]
    if is_pair and ((single >= 0) & (single <= 1)).all():
        raise ValueError(
            "All outputs of the model are between 0 and 1, as behind a sigmoid; expected logits. "
            "Pass `outputs=lambda module, batch: module(batch[0]).logit()`. If they are logits, "
            "return those of both classes, such as 0 and the output."
        )


def _several_labels(logits: Tensor, labels: Tensor) -> str:
    """Return the remedy for several labels per sample, if that is what these look like."""
    is_each_one_or_zero = bool(((labels == 0) | (labels == 1)).all())
    if logits.ndim != 2 or labels.shape != logits.shape or not is_each_one_or_zero:
        return ""
    return (
        " Of several labels per sample, choose one, such as the first: "
        "`outputs=lambda model, batch: nn.functional.pad(model(batch[0])[:, :1], (1, 0))` and "
        "`labels=lambda batch: batch[1][:, 0].long()`. `find_mislabeled(run)` needs neither. Of "
        "one-hot labels, take the class: `labels=lambda batch: batch[1].argmax(dim=1)`."
    )


def _require_classes(logits: Tensor, labels: Tensor) -> None:
    if labels.is_floating_point() and not _several_labels(logits, labels):
        raise ValueError(
            f"Labels are {describe(labels)}, as in a regression; expected classes, one whole "
            "number per sample. Pass `labels=`, a function that returns these. In a regression, "
            "use what needs no predicted classes: `find_mislabeled(run)`, `find_outliers(run)`, "
            "`attribute`."
        )
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"The model returned {describe(logits)}, and labels are {describe(labels)}; expected "
            "logits of shape (n, classes) and one whole number per sample. Pass `outputs=` or "
            f"`labels=`, functions that return these.{_several_labels(logits, labels)}"
        )
