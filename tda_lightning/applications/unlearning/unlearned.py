"""Unlearning: move a model to where it would be without some training samples, and report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.applications.predictions import warn_of_given_ids
from tda_lightning.applications.unlearning.sample_passes import (
    Ids,
    ids_to_forget,
    single_losses,
    single_predictions,
    spread_samples,
)
from tda_lightning.applications.unlearning.weight_updates import (
    ForgettingTask,
    SecondOrder,
    WeightUpdate,
)
from tda_lightning.gradients.parameter_selection import select_like
from tda_lightning.metrics.mislabel import mislabel_auc
from tda_lightning.passes.batches import dataset_ids, select_samples
from tda_lightning.passes.model_state import require_model, swapped_weights, warn_of_other_weights
from tda_lightning.passes.outputs import Outputs, outputs_of
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.stores.arguments import require_kind
from tda_lightning.stores.opening import Run, open_run

# Losses are compared on at most this many samples of each set.
MAX_SAMPLES = 1000
NOT_GUARANTEED = (
    "Approximate: the weights may still hold traces of the forgotten samples, and nothing is "
    "certified. Buffers, such as the statistics of batch norm, are unchanged. Exact unlearning is "
    "retraining; see `rewind_plan`."
)
_EXPECTED_AUC = (
    "A retrained model has a membership AUC of about .5 only if the forgotten samples are like "
    "the holdout's; pass it as `retrained=` to compare."
)


@dataclass(frozen=True)
class Unlearned(ShownInNotebooks):
    """New weights without the influence of some samples, and how they compare.

    Attributes:
        state_dict: The new weights and buffers, for ``model.load_state_dict``.
        ids: Ids of the forgotten samples, shape ``(n_forget,)``.
        losses: Mean loss of each set (``"forget"``, ``"retain"``, ``"holdout"``) for each model
            (``"before"``, ``"after"``, ``"retrained"``).
        membership_auc: For each model, the probability that a forgotten sample has a lower loss
            than a holdout sample. Models without these samples are at about .5 if both sets are
            alike.
        distances: Mean distance of the predictions of ``"before"`` and ``"after"`` to those of the
            retrained model, for each set. It is the total variation of class probabilities, or the
            absolute difference.
        unchanged: Names of the parameters that the update did not move.
        method: The update and its hyper-parameters.
        not_guaranteed: What the result does not promise.
    """

    state_dict: Mapping[str, Tensor]
    ids: Int[Tensor, " n_forget"]
    losses: Mapping[str, Mapping[str, float]]
    membership_auc: Mapping[str, float]
    distances: Mapping[str, Mapping[str, float]]
    unchanged: tuple[str, ...]
    method: str
    not_guaranteed: str = NOT_GUARANTEED

    def to_pandas(self) -> DataFrame:
        """Return a data frame with models as rows and all measurements as columns."""
        pd = import_pandas()
        columns = {f"loss, {name}": values for name, values in self.losses.items()}
        if self.membership_auc:
            columns["membership AUC"] = self.membership_auc
        columns |= {f"distance, {name}": values for name, values in self.distances.items()}
        return pd.DataFrame(columns).rename_axis("model")

    def __repr__(self) -> str:
        lines = [f"Unlearned {len(self.ids)} samples by {self.method}"]
        for name, values in self.losses.items():
            lines.append(f"  mean loss, {name + ':':9s} {_listed(values)}")
        if self.membership_auc:
            lines.append(f"  membership AUC:      {_listed(self.membership_auc)}")
            if "retrained" not in self.membership_auc:
                lines.append(f"  {_EXPECTED_AUC}")
        for name, values in self.distances.items():
            lines.append(f"  distance, {name + ':':10s} {_listed(values)}")
        if self.unchanged:
            lines.append(f"  unchanged parameters: {', '.join(self.unchanged)}")
        return "\n".join([*lines, f"  {self.not_guaranteed}"])


def unlearn(
    model: nn.Module,
    run: Run,
    train_loader: DataLoader[Any],
    forget_ids: Ids,
    *,
    update: WeightUpdate = SecondOrder(),
    holdout: DataLoader[Any] | None = None,
    retrained: nn.Module | None = None,
    outputs: Outputs = outputs_of,
    progress: bool = True,
) -> Unlearned:
    """Compute weights that approximate those of a training without some samples.

    The model is not changed: load the result with ``model.load_state_dict(result.state_dict)``.

    Args:
        model: The trained LightningModule.
        run: The recorded training: its folder or a store. With snapshots, the default update is far
            more accurate: ``GradientRecorder(snapshots=n)``.
        train_loader: The training data, in any order.
        forget_ids: Ids of the samples to forget.
        update: How the weights are moved.
        holdout: Data that the model was not trained on, for the report.
        retrained: A model that was trained without these samples, for the report.
        outputs: Function of (module, batch) that returns logits or predictions. Used only with
            ``retrained``.
        progress: Show progress bars.

    Returns:
        The new weights, with a report. Losses are means over at most 1,000 samples of each set.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If an id is not in the training set, or the loader has another one.
    """
    require_model(model)
    require_kind("update", update, WeightUpdate, "`SecondOrder()`")
    store = open_run(run)
    warn_of_other_weights(model, store.final_fingerprint, remedy="")
    warn_of_given_ids(store, "train_loader", remedy="Record without `sample_ids=`.")
    train_ids = store.train_ids()
    ids = ids_to_forget(forget_ids, train_ids)
    forget, retain = _split(train_loader, ids, train_ids)
    selection = select_like(model, store.recipe)
    store.recipe.require_blocks(selection.blocks, type(model).__name__)
    task = ForgettingTask(
        model=model,
        selection=selection,
        run=store,
        forget_ids=ids,
        forget=select_samples(train_loader, forget),
        retain=select_samples(train_loader, retain),
        train_loader=train_loader,
        progress=progress,
    )
    moved = selection.all_parameters()
    state = _moved_state(model, moved, update.displacement(task))
    sets = {
        "forget": spread_samples(train_loader, forget, MAX_SAMPLES),
        "retain": spread_samples(train_loader, retain, MAX_SAMPLES),
    }
    if holdout is not None:
        positions = list(range(len(dataset_ids(holdout, "holdout"))))
        sets["holdout"] = spread_samples(holdout, positions, MAX_SAMPLES)
    losses, predictions = _measured(model, state, retrained, sets, outputs)
    moved_parts = {id(parameter) for parameter in moved}
    return Unlearned(
        state_dict=state,
        ids=ids,
        losses={name: _means(values) for name, values in losses.items()},
        membership_auc=_membership(losses) if holdout is not None else {},
        distances={name: _distances(by_model) for name, by_model in predictions.items()},
        unchanged=tuple(n for n, p in model.named_parameters() if id(p) not in moved_parts),
        method=repr(update),
    )


def _split(
    loader: DataLoader[Any], ids: Int[Tensor, " n"], train_ids: Int[Tensor, " n_train"]
) -> tuple[list[int], list[int]]:
    """Return the positions in the dataset of the samples to forget, and of all others."""
    all_ids = dataset_ids(loader, "train_loader")
    n_missing = int((~torch.isin(train_ids, all_ids)).sum())
    n_other = int((~torch.isin(all_ids, train_ids)).sum())
    if n_missing or n_other:
        raise ValueError(
            f"`train_loader` lacks {n_missing:,} of the {len(train_ids):,} training samples of the "
            f"run, and has {n_other:,} others; expected the training data, over which updates take "
            "means. Pass a loader of the dataset that the model was trained on."
        )
    is_forgotten = torch.isin(all_ids, ids)
    if is_forgotten.all():
        raise ValueError(
            "`forget_ids` holds all samples of `train_loader`; expected some to remain. Start from "
            "new weights instead."
        )
    return is_forgotten.nonzero()[:, 0].tolist(), (~is_forgotten).nonzero()[:, 0].tolist()


def _moved_state(
    model: nn.Module, parameters: list[nn.Parameter], displacement: Float[Tensor, " d"]
) -> dict[str, Tensor]:
    """Return a copy of the model's state with some parameters moved."""
    if not displacement.isfinite().all():
        raise ValueError(
            "The update is not finite; expected finite weights. Increase the damping, or decrease "
            "the rate."
        )
    parts = torch.split(displacement, [parameter.numel() for parameter in parameters])
    moves = {id(p): part.view_as(p) for p, part in zip(parameters, parts, strict=True)}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        move = moves.get(id(value))
        state[name] = value.detach().clone() if move is None else (value + move.to(value)).detach()
    return state


def _measured(
    model: nn.Module,
    state: Mapping[str, Tensor],
    retrained: nn.Module | None,
    sets: Mapping[str, DataLoader[Any]],
    outputs: Outputs,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Return the losses of each set by each model, and the predictions if one is retrained."""
    models: dict[str, tuple[nn.Module, AbstractContextManager[None]]] = {
        "before": (model, nullcontext()),
        "after": (model, swapped_weights(model, state)),
    }
    if retrained is not None:
        models["retrained"] = (retrained, nullcontext())
    losses: dict[str, dict[str, Tensor]] = {name: {} for name in sets}
    predictions: dict[str, dict[str, Tensor]] = {name: {} for name in sets if retrained is not None}
    for version, (module, weights) in models.items():
        with weights:
            for name, samples in sets.items():
                losses[name][version] = single_losses(module, samples)
                if name in predictions:
                    predictions[name][version] = single_predictions(module, samples, outputs)
    return losses, predictions


def _distances(predictions: Mapping[str, Float[Tensor, "n outputs"]]) -> dict[str, float]:
    """Return the mean distance of the predictions to those of the retrained model."""
    goal = predictions["retrained"]
    halved = 0.5 if goal.shape[1] > 1 else 1.0
    return {
        name: halved * float((predictions[name] - goal).abs().sum(dim=1).mean())
        for name in ("before", "after")
    }


def _means(losses: Mapping[str, Float[Tensor, " n"]]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in losses.items()}


def _membership(losses: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the AUC of the lower loss as a sign of the forgotten samples."""
    forget, holdout = losses["forget"], losses["holdout"]
    is_member = torch.cat(
        [torch.ones(len(forget["before"])), torch.zeros(len(holdout["before"]))]
    ).bool()
    return {
        name: mislabel_auc(-torch.cat([forget[name], holdout[name]]), is_member) for name in forget
    }


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
