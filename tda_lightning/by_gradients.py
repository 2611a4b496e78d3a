"""A third front door: ask a small model itself, by whole gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.api import fingerprint
from tda_lightning.callbacks.trained import row_dtype
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
    _say_what_is_left_out(model, method)
    surveyed = survey(model, method.layers)
    recipe = Recipe(
        blocks=surveyed.blocks,
        left_out=surveyed.left_out,
        projector=Identity().to_dict(),
        dimension=sum(block.size for block in surveyed.blocks),
        dtype="float64" if row_dtype(model) == torch.float64 else "float32",
        reduction=reduction,
        batch_dims=dict(batch_dims or {}),
        model=type(model).__name__,
    )
    asked = query_rows(model, queries, recipe, target=target, progress=progress)
    order, parameters = columns_of(surveyed), parameters_of(surveyed)
    vectors = asked[:, order.argsort()].to(parameters[0].device, parameters[0].dtype)
    loader = train_loader if curvature_loader is None else curvature_loader
    with undisturbed(model, "eval"):
        objective = Objective.of(model, parameters, loader, reduction=reduction, progress=progress)
        solution = method.solve(objective, vectors, progress=progress)
    rows = train_rows(model, train_loader, recipe, sample_ids=sample_ids, progress=progress)
    train_ids, products = _products(solution.directions[:, order].to(recipe.torch_dtype), rows)
    return Scores(
        values=products / len(train_ids),
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


def _say_what_is_left_out(model: nn.Module, method: FullInfluenceFunction) -> None:
    """Warn of layers that were to count and cannot."""
    patterns = ["*"] if method.layers is None else method.layers
    for entry in survey(model).left_out:
        if any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            warnings.warn(f"attribute_by_gradients: {entry.describe()}", stacklevel=3)


def _products(
    directions: Float[Tensor, "n_query d"], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Int[Tensor, " n_train"], Float[Tensor, "n_query n_train"]]:
    """Return the ids of all samples, sorted, and the products of their rows with the directions."""
    ids, products = [], []
    for named, rows in batches:
        ids.append(named)
        products.append((directions @ rows.mT).cpu())
    if not ids:
        raise ValueError("`train_loader` is an empty loader; expected at least one batch.")
    train_ids, places = torch.cat(ids).sort()
    require_once(train_ids)
    return train_ids, torch.cat(products, dim=1)[:, places]
