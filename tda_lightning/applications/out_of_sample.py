r"""Out-of-sample predictions: what a model would predict for each training sample without it.

With the logits :math:`z_{ic}` of sample :math:`i`, and the effect :math:`s` of its presence on each
of them,

.. math:: z_{ic} - s(z_{ic}, i), \qquad
   s(z_{ic}, i) = \frac{1}{n} \, \nabla z_{ic}^\top (\bar H + \delta I)^{-1} \bar g_i

to first order (Koh & Liang 2017, "Understanding Black-box Predictions via Influence Functions", eq.
2). It replaces k-fold training for methods that need held-out predictions (Northcutt et al. 2021,
"Confident Learning: Estimating Uncertainty in Dataset Labels").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.applications.predictions import of_classes, predict, warn_of_given_ids
from tda_lightning.applications.pruning import mean_rows
from tda_lightning.attribution import InfluenceFunction
from tda_lightning.attribution.steps import DeviceView
from tda_lightning.passes.model_state import warn_of_other_weights
from tda_lightning.passes.outputs import Labels, Outputs, labels_of, outputs_of
from tda_lightning.passes.queries import identified_rows
from tda_lightning.passes.targets import Logit
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.stores import Store
from tda_lightning.stores.opening import Run, open_run


@dataclass(frozen=True)
class OutOfSample(ShownInNotebooks):
    """Class probabilities of training samples, as if each had not been trained on.

    Attributes:
        ids: Indices of the samples in the dataset, below any ``Subset``, sorted; shape ``(n,)``.
        probabilities: Estimated probability of each class without the sample, in the order of
            ``ids``, shape ``(n, classes)``.
        in_sample: Probabilities that the model predicts, shape ``(n, classes)``.
        labels: Given labels, shape ``(n,)``.
    """

    ids: Int64[Tensor, " n"]
    probabilities: Float[Tensor, "n classes"]
    in_sample: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"]

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per sample and a column per class, indexed by its id."""
        pd = import_pandas()
        index = pd.Index(self.ids.numpy(), name="train")
        return pd.DataFrame(self.probabilities.numpy(), index=index)

    def __repr__(self) -> str:
        n, classes = self.probabilities.shape
        without, within = (
            float(part.gather(1, self.labels[:, None]).mean())
            for part in (self.probabilities, self.in_sample)
        )
        lines = [
            f"OutOfSample: probabilities of {classes} classes for {n:,} samples",
            f"  mean probability of the label: {without:.3f}, in sample {within:.3f}",
            "  note: Estimated to first order. Some wrong labels that were memorized stay hidden: "
            "`find_mislabeled` reads the course of the training instead.",
        ]
        return "\n".join(lines)


def out_of_sample_probabilities(
    run: Run,
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    outputs: Outputs = outputs_of,
    labels: Labels = labels_of,
    progress: bool = True,
) -> OutOfSample:
    """Estimate what a classifier would predict for each training sample without it.

    The probabilities go straight into ``cleanlab``: ``find_issues(pred_probs=...)``. Time: a
    backward pass over the data per class. Memory: three matrices of ``k x k`` numbers, and two rows
    per sample.

    Args:
        run: A recorded training: its folder or a store.
        model: The trained LightningModule. It is left unchanged.
        loader: The training data, in any order.
        outputs: Function of (module, batch) that returns the logits.
        labels: Function of the batch that returns the labels.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run holds no rows, or the data do not match the model.
    """
    store = open_run(run)
    InfluenceFunction().require(store)
    warn_of_given_ids(store, "loader", remedy="Record without `sample_ids=`.")
    outputs, labels = of_classes(store, outputs, labels)
    predictions = predict(model, loader, outputs, labels, progress)
    predictions = predictions.of(predictions.ids.sort().values)
    solutions = _solutions(store, predictions.ids)
    warn_of_other_weights(model, store.final_fingerprint)
    effects = []
    for index in range(predictions.probabilities.shape[1]):
        rows = identified_rows(
            model,
            loader,
            store.recipe,
            target=Logit(index, outputs=outputs, labels=labels),
            preconditioner=store.preconditioner(),
            progress=progress,
        )
        ordered = rows.rows[rows.ids.argsort()]
        effects.append((ordered * solutions).sum(dim=1).double())
    logits = predictions.probabilities.clamp_min(1e-300).log() - torch.stack(effects, dim=1)
    return OutOfSample(
        predictions.ids, logits.softmax(dim=1), predictions.probabilities, predictions.labels
    )


def _solutions(store: Store, ids: Int64[Tensor, " n"]) -> Float[Tensor, "n k"]:
    """Return the inverse curvature times the mean gradient of each sample, over their number.

    Samples that were never drawn have no effect.
    """
    method = InfluenceFunction()
    train_ids, rows = mean_rows(store)
    identity = torch.eye(store.recipe.dimension, dtype=rows.dtype)
    _, inverse = next(iter(method.directions(DeviceView(store, identity), identity)))
    places = torch.searchsorted(train_ids, ids).clamp_max(len(train_ids) - 1)
    is_known = (train_ids[places] == ids)[:, None]
    return torch.where(is_known, rows[places] @ inverse, 0.0)
