"""Explain errors: the training samples behind each wrong prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.applications.predictions import of_classes, predict
from tda_lightning.attribution import Attributor, TracIn
from tda_lightning.attribution.attribute import attribute
from tda_lightning.passes.batches import dataset_ids, select_samples
from tda_lightning.passes.outputs import Labels, Outputs, labels_of, outputs_of
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.results.ranking import Ranking
from tda_lightning.results.sample_groups import positions_of
from tda_lightning.results.scores import Scores
from tda_lightning.stores.opening import Run, open_run


@dataclass(frozen=True)
class Errors(ShownInNotebooks):
    """The wrong predictions of a loader, each with its main proponents and opponents.

    Opponents raised the loss of the true label: they speak for the wrong prediction. Many share its
    label, and mislabelled ones are often among them.

    Attributes:
        ids: Indices of the samples in the dataset, below any ``Subset``, shape ``(n_errors,)``.
        given: True labels, shape ``(n_errors,)``.
        predicted: Predicted labels, shape ``(n_errors,)``.
        scores: Scores of all training samples; queries are in the order of ``ids``.
        k: Number of proponents and of opponents to show.
        n_examined: Number of predictions examined.
    """

    ids: Int64[Tensor, " n_errors"]
    given: Int64[Tensor, " n_errors"]
    predicted: Int64[Tensor, " n_errors"]
    scores: Scores
    k: int
    n_examined: int

    @property
    def proponents(self) -> Ranking:
        """The training samples that spoke most for the true label."""
        return self.scores.proponents(self.k)

    @property
    def opponents(self) -> Ranking:
        """The training samples that spoke most for another label."""
        return self.scores.opponents(self.k)

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per error and rank."""
        pd = import_pandas()
        index = pd.MultiIndex.from_product([self.ids.tolist(), range(self.k)])
        index.names = ["sample", "rank"]
        repeated = {"given_label": self.given, "predicted_label": self.predicted}
        columns = {n: v.repeat_interleave(self.k).numpy() for n, v in repeated.items()}
        for name, ranking in (("proponent", self.proponents), ("opponent", self.opponents)):
            columns[name] = ranking.ids.flatten().numpy()
            columns[f"{name}_score"] = ranking.values.flatten().numpy()
        return pd.DataFrame(columns, index=index)

    def common_opponents(self, n: int = 5) -> list[tuple[int, int]]:
        """Return the training samples that are opponents of most errors, with their counts."""
        ids, counts = torch.unique(self.opponents.ids, return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:n]
        return list(zip(ids[order].tolist(), counts[order].tolist(), strict=True))

    def __repr__(self) -> str:
        head = f"Errors: {len(self.ids):,} of {self.n_examined:,} predictions are wrong"
        lines = [
            f"  {sample}: label {given}, predicted {predicted}; opponents {opponents}"
            for sample, given, predicted, opponents in zip(
                self.ids[:5].tolist(),
                self.given.tolist(),
                self.predicted.tolist(),
                self._shown_opponents(),
                strict=False,
            )
        ]
        return "\n".join([head, *lines, *(["  ..."] if len(self.ids) > 5 else [])])

    def _shown_opponents(self) -> Sequence[list[int]]:
        ids: list[list[int]] = self.opponents.ids[:5].tolist() if len(self.ids) else []
        return ids


def explain_errors(
    run: Run,
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    k: int = 5,
    method: Attributor = TracIn(),
    outputs: Outputs = outputs_of,
    labels: Labels = labels_of,
    progress: bool = True,
) -> Errors:
    """Return the training samples behind each wrong prediction of a classifier.

    Args:
        run: A recorded training: its folder or a store.
        model: The trained LightningModule.
        loader: The data to examine, with true labels.
        k: Number of proponents, and of opponents, to show per error.
        method: The attribution method.
        outputs: Function of (module, batch) that returns the logits.
        labels: Function of the batch that returns the labels.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If no prediction is wrong, or the data do not match the model.
    """
    store = open_run(run)
    outputs, labels = of_classes(store, outputs, labels)
    predictions = predict(model, loader, outputs, labels, progress)
    is_wrong = predictions.predicted() != predictions.labels
    if not is_wrong.any():
        raise ValueError(
            f"All {len(is_wrong):,} predictions are right; expected some errors to explain. Pass "
            "other data, or query samples of your choice with `attribute`."
        )
    ids = predictions.ids[is_wrong]
    positions = positions_of(dataset_ids(loader, "loader"), ids)
    queries = select_samples(loader, positions.tolist())
    return Errors(
        ids,
        predictions.labels[is_wrong],
        predictions.predicted()[is_wrong],
        attribute(store, model, queries, method=method, progress=progress),
        min(k, len(store.train_ids())),
        len(is_wrong),
    )
