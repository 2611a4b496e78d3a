"""A third front door: ask a small model itself, by whole gradients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from tda_lightning.arguments import require_choice, require_kind
from tda_lightning.attribution.dynamics.optimizer import Extent, has_plain_rates
from tda_lightning.attribution.influence import suggested_damping
from tda_lightning.full_influence.full_gradients import WholeGradients, whole_recipe
from tda_lightning.full_influence.influence import FullInfluenceFunction
from tda_lightning.gradients.layers import select_layers
from tda_lightning.passes.batches import require_loader
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.passes.targets import Loss, Target, name_of
from tda_lightning.passes.training_step import require_model
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.results.provenance import fingerprint
from tda_lightning.results.scores import Scores
from tda_lightning.stores import Store
from tda_lightning.stores.opening import Run, open_run
from tda_lightning.stores.recipe import SampleAxis
from tda_lightning.stores.snapshots import Moment, describe_snapshots, describe_weights

Reduction = Literal["mean", "sum"]


def attribute_by_gradients(
    model: nn.Module,
    train_loader: DataLoader[Any],
    queries: Any,
    *,
    run: Run | None = None,
    method: FullInfluenceFunction = FullInfluenceFunction(),
    target: Target = Loss(),
    at: Moment = "now",
    curvature_loader: DataLoader[Any] | None = None,
    sample_ids: IdSource | None = None,
    reduction: Reduction | None = None,
    batch_dims: Mapping[str, SampleAxis] | None = None,
    progress: bool = True,
) -> Scores:
    """Say which training samples lowered, or raised, the loss of each query, by whole gradients.

    For small models: nothing is sketched. Without a run, all is asked of the weights that the model
    has. With one that kept snapshots, gradients and curvature of the training data are means over
    them (over ten, if there are more), in the coordinates of its optimizer: more accurate, and as
    many passes over the data.

    Args:
        model: The LightningModule that was trained, with the weights to ask about. It is left as
            it was, and in evaluation mode in between.
        train_loader: The training data, in any order.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        run: The recorded training, its folder or a store, with snapshots; see
            ``GradientRecorder(snapshots=...)``. A slice of a store has those of its steps.
        method: How to attribute.
        target: What is asked about: the loss, or a function of (module, batch) that returns one
            number per sample, to raise: :class:`~tda_lightning.Logit`, say.
        at: At which weights queries are asked: ``"now"``, those that the model has; or, with a run,
            the index of a snapshot, or ``"snapshots"``, for the mean of the queries' gradients at
            those of the later two thirds.
        curvature_loader: The data to take curvature from; by default all training data. They are
            kept in memory, and gone through in every product with the curvature: fewer will do.
        sample_ids: Where a batch has its samples' ids; by default learnt from the sampler.
        reduction: How the training loss combines its samples; by default as the run says, or by a
            mean.
        batch_dims: Axis of the samples in layers whose names match a pattern, where it is not the
            first; by default as the run says. See ``GradientRecorder``.
        progress: Show progress bars.

    Returns:
        Scores, shape ``(n_query, n_train)``; positive marks a proponent. They are of the scale of
        those of ``InfluenceFunction``: what presence among the training samples does to the loss.
        Memory: one vector of the parameters' size for each query and for each sample of a batch,
        and what the solver says.

    Raises:
        ImportError: If the solver needs curvlinops or SciPy, and they are not installed:
            ``pip install 'tda_lightning[solvers]'``.
        ValueError: If the ids cannot be known, the data do not fit the model, the run has no
            snapshots, or the method cannot be applied to the model.
    """
    _require_method(method)
    require_model(model)
    require_loader(train_loader, "train_loader")
    if curvature_loader is not None:
        require_loader(curvature_loader, "curvature_loader")
    if batch_dims is not None:
        require_kind("batch_dims", batch_dims, Mapping, '`{"encoder.*": 1}`')
    if reduction is not None:
        require_choice("reduction", reduction, Reduction)
    loader = train_loader if curvature_loader is None else curvature_loader
    name = "train_loader" if curvature_loader is None else "curvature_loader"
    store = _opened(run, at)
    damping = None if store is None or method.damping is not None else _suggested(store)
    _say_what_is_left_out(model, method)
    selection = select_layers(model, method.layers)
    if store is not None:
        reduction = reduction or store.recipe.reduction
        batch_dims = store.recipe.batch_dims if batch_dims is None else batch_dims
    recipe = whole_recipe(model, selection, reduction or "mean", batch_dims or {})
    whole = WholeGradients(model, selection, recipe, store)
    asked = whole.of_queries(queries, target, at, progress=progress)
    with preserved_state(model, "eval"):
        objective = whole.objective(loader, damping, argument=name, progress=progress)
        solution = method.solve(objective, asked, progress=progress)
    train_ids, products = whole.products(
        solution.directions, train_loader, sample_ids, progress=progress
    )
    return Scores(
        values=products / len(train_ids),
        query_ids=torch.arange(len(asked)),
        train_ids=train_ids,
        method=repr(method),
        provenance={
            "model": recipe.model,
            "weights": _weights(model, store, at),
            "mode": "eval",
            "target": name_of(target),
            "parameters": f"{recipe.dimension:,}",
            "curvature": f"of {objective.n:,} samples, damping {solution.damping:.3g}",
            "along": describe_snapshots(whole.snapshots) if store else "no run",
        },
    )


def _say_what_is_left_out(model: nn.Module, method: FullInfluenceFunction) -> None:
    """Warn of layers that were to count and cannot."""
    patterns = ["*"] if method.layers is None else method.layers
    for entry in select_layers(model).left_out:
        if any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            warnings.warn(f"attribute_by_gradients: {entry.describe()}", stacklevel=3)


def _require_method(method: object) -> None:
    if not isinstance(method, FullInfluenceFunction):
        raise ValueError(
            f"`method` is {method!r}; expected a `FullInfluenceFunction`. Others are asked by "
            "`attribute`, of a recorded run, or by `attribute_by_features`."
        )
    method.solver.require()


def _opened(run: Run | None, at: Moment) -> Store | None:
    if run is None and at != "now":
        raise ValueError(
            f"`at={at!r}` came without a run; expected `run=`, the one that kept the snapshots, or "
            '`at="now"`.'
        )
    if isinstance(run, list | tuple):
        raise ValueError(
            f"`run` is a {type(run).__name__} of {len(run)}; expected one recorded training. Ask "
            "each with its own model, and average: `Scores.mean([...])`."
        )
    return None if run is None else open_run(run)


def _suggested(store: Store) -> float | None:
    """Return the damping that a run suggests for a mean over samples, whatever its steps sum up."""
    extent = Extent.of(store)
    found = suggested_damping(extent) / extent.weight
    if has_plain_rates(store):
        return found
    names = sorted({step.optimizer for step in store})
    warnings.warn(
        f"attribute_by_gradients: steps of {' and '.join(names)} are no gradient steps in the "
        f"coordinates of this run, so no damping follows from their rates ({found:.3g} it would "
        "be); the solver's own is taken, as without a run. Pass `FullInfluenceFunction(damping=...)"
        '`, or record with `preconditioner="optimizer"` under an optimizer that it knows.',
        stacklevel=3,
    )
    return None


def _weights(model: nn.Module, store: Store | None, at: Moment) -> str:
    return fingerprint(model) if store is None or at == "now" else describe_weights(store, at)
