"""A third front door: ask a small model itself, by whole gradients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from tda_lightning.api import fingerprint
from tda_lightning.layers import survey
from tda_lightning.parameter_space import FullInfluenceFunction, Objective, require_operators
from tda_lightning.parameter_space.objective import columns_of, parameters_of
from tda_lightning.projectors import Identity
from tda_lightning.queries import query_rows, train_rows
from tda_lightning.recipe import Recipe, SampleAxis
from tda_lightning.sample_ids import IdSource, require_once
from tda_lightning.scores import Scores
from tda_lightning.targets import Loss, Target, name_of
from tda_lightning.undisturbed import undisturbed


def attribute_by_gradients(
    model: nn.Module,
    train_loader: DataLoader[Any],
    queries: Any,
    *,
    method: FullInfluenceFunction = FullInfluenceFunction(),
    target: Target = Loss(),
    curvature_loader: DataLoader[Any] | None = None,
    sample_ids: IdSource | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    batch_dims: Mapping[str, SampleAxis] | None = None,
    progress: bool = True,
) -> Scores:
    """Say which training samples lowered, or raised, the loss of each query, by whole gradients.

    For small models: nothing is sketched, and nothing needs to have been recorded. It needs
    curvlinops and SciPy: ``pip install 'tda_lightning[solvers]'``.

    Args:
        model: The LightningModule that was trained, with the weights to ask about. It is left as
            it was, and in evaluation mode in between.
        train_loader: The training data, in any order.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        method: How to attribute.
        target: What is asked about: the loss, or a function of (module, batch) that returns one
            number per sample, to raise: :class:`~tda_lightning.Logit`, say.
        curvature_loader: The data to take curvature from; by default all training data. They are
            kept in memory, and gone through in every product with the curvature: fewer will do.
        sample_ids: Where a batch has its samples' ids; by default learnt from the sampler.
        reduction: How the training loss combines its samples.
        batch_dims: Axis of the samples in layers whose names match a pattern, where it is not the
            first; see ``GradientRecorder``.
        progress: Show progress bars.

    Returns:
        Scores, shape ``(n_query, n_train)``; positive marks a proponent. They are of the scale of
        those of ``InfluenceFunction``: what presence among the training samples does to the loss.
        Memory: one vector of the parameters' size for each query and for each sample of a batch.

    Raises:
        ImportError: If curvlinops or SciPy is not installed.
        ValueError: If the ids cannot be known, the data do not fit the model, or the method cannot
            be applied to it.
    """
    require_operators()
    surveyed = survey(model, method.layers)
    recipe = Recipe(
        blocks=surveyed.blocks,
        left_out=surveyed.left_out,
        projector=Identity().to_dict(),
        dimension=sum(block.size for block in surveyed.blocks),
        dtype=_row_dtype(model),
        reduction=reduction,
        batch_dims=dict(batch_dims or {}),
        model=type(model).__name__,
    )
    if method.layers is None:
        for entry in surveyed.left_out:
            warnings.warn(f"attribute_by_gradients: {entry.describe()}", stacklevel=2)
    order, parameters = columns_of(surveyed), parameters_of(surveyed)
    asked = query_rows(model, queries, recipe, target=target, progress=progress)
    asked = asked[:, order.argsort()].to(parameters[0].device, parameters[0].dtype)
    loader = train_loader if curvature_loader is None else curvature_loader
    with undisturbed(model, "eval"):
        objective = Objective.of(model, parameters, loader, reduction=reduction, progress=progress)
        solution = method.solve(objective, asked, progress=progress)
    directions = solution.directions[:, order].to(recipe.torch_dtype)
    parts, ids = [], []
    for named, rows in train_rows(
        model, train_loader, recipe, sample_ids=sample_ids, progress=progress
    ):
        parts.append((directions @ rows.mT).cpu())
        ids.append(named)
    if not ids:
        raise ValueError("`train_loader` is an empty loader; expected at least one batch.")
    train_ids, places = torch.cat(ids).sort()
    require_once(train_ids)
    return Scores(
        values=torch.cat(parts, dim=1)[:, places] / len(train_ids),
        query_ids=torch.arange(len(asked)),
        train_ids=train_ids,
        method=repr(method),
        provenance={
            "model": recipe.model,
            "weights": fingerprint(model),
            "mode": "eval",
            "target": name_of(target),
            "parameters": f"{recipe.dimension:,}",
            "curvature": f"of {objective.n:,} samples, damping {solution.damping:.3g}",
        },
    )


def _row_dtype(model: nn.Module) -> Literal["float32", "float64"]:
    trained = [one for one in model.parameters() if one.requires_grad]
    return "float64" if all(one.dtype == torch.float64 for one in trained) else "float32"
