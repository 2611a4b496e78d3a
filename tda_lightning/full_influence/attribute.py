"""`attribute_by_gradients`: attribution with the full gradients of a small model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader

from tda_lightning.attribution.dynamics.optimizer import Extent, has_plain_rates
from tda_lightning.attribution.influence import suggested_damping
from tda_lightning.full_influence.full_gradients import FullGradients
from tda_lightning.full_influence.influence import FullInfluenceFunction
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.passes.batches import require_loader
from tda_lightning.passes.model_state import (
    fingerprint,
    preserved_state,
    require_model,
    warn_of_other_weights,
)
from tda_lightning.passes.targets import Loss, Target
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.results.scores import Scores
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import (
    is_selected,
    name_of,
    require_choice,
    require_kind,
    require_object,
)
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
    """Score every training sample by its effect on each query, with full gradients.

    For small models, since gradients are not sketched. Without a run, gradients and curvature are
    taken at the model's current weights. With a run that kept snapshots, those of the training data
    are means over at most ten snapshots, in the coordinates of the run's optimizer. This is more
    accurate, and takes one pass over the data per snapshot.

    Args:
        model: The trained LightningModule, with the weights to query. It is in evaluation mode
            meanwhile; its state is restored afterwards.
        train_loader: The training data, in any order.
        queries: See :func:`~tda_lightning.attribute`.
        run: The recorded training with snapshots: its folder or a store; see
            ``GradientRecorder(snapshots=...)``. A slice of a store uses the snapshots of its steps.
        method: The attribution method.
        target: See :func:`~tda_lightning.attribute`.
        at: See :func:`~tda_lightning.attribute`. Without a run, only ``"now"`` is possible.
        curvature_loader: The data to compute the curvature on; by default all training data. They
            are held in memory, and every product with the curvature is a pass over them. A subset
            is often enough.
        sample_ids: See :class:`~tda_lightning.GradientRecorder`.
        reduction: How the training loss combines its samples. The default is that of the run, or
            ``"mean"`` without a run.
        batch_dims: See :class:`~tda_lightning.GradientRecorder`. The default is that of the run.
        progress: Show progress bars.

    Returns:
        Scores, shape ``(n_query, n_train)``. A positive score marks a proponent. Their scale is
        that of ``InfluenceFunction``: the effect of a sample's presence in the training data on the
        loss. Memory: one vector of the parameters' size per query and per sample of a batch, and
        the memory of the solver.

    Raises:
        ImportError: If the solver needs curvlinops or SciPy, and they are not installed:
            ``pip install 'tda_lightning[solvers]'``.
        ValueError: If the sample ids cannot be inferred, the data do not fit the model, or the run
            has no snapshots; or if the method cannot be applied to the model.
    """
    _require_method(method)
    require_model(model)
    require_loader(train_loader, "train_loader")
    curvature_data = train_loader if curvature_loader is None else curvature_loader
    argument = "train_loader" if curvature_loader is None else "curvature_loader"
    require_loader(curvature_data, argument)
    if batch_dims is not None:
        require_kind("batch_dims", batch_dims, Mapping, '`{"encoder.*": 1}`')
    if reduction is not None:
        require_choice("reduction", reduction, Reduction)
    store = _open_run(run, at)
    if store is not None and at == "now":
        warn_of_other_weights(model, store.final_fingerprint)
    damping = None if store is None or method.damping is not None else suggested_full_damping(store)
    _warn_of_skipped_layers(model, method)
    selection = select_parameters(model, method.layers)
    gradients = FullGradients(model, selection, store, reduction, batch_dims)
    query = gradients.of_queries(queries, target, at, progress=progress)
    with preserved_state(model, "eval"):
        objective = gradients.objective(
            curvature_data, damping, argument=argument, progress=progress
        )
        solution = method.solve(objective, query.rows, progress=progress)
    train_ids, products = gradients.products(
        solution.directions, train_loader, sample_ids, progress=progress
    )
    return Scores(
        values=products / len(train_ids),
        query_ids=query.ids,
        tokens=query.tokens,
        train_ids=train_ids,
        method=repr(method),
        provenance={
            "model": type(model).__name__,
            "weights": _weights(model, store, at),
            "mode": "eval",
            "target": name_of(target),
            "parameters": f"{objective.d:,}",
            "curvature": f"of {objective.n:,} samples, damping {solution.damping:.3g}",
            "along": describe_snapshots(gradients.snapshots) if store else "no run",
        },
    )


def _warn_of_skipped_layers(model: nn.Module, method: FullInfluenceFunction) -> None:
    """Warn of requested layers that are not supported."""
    patterns = ["*"] if method.layers is None else method.layers
    for entry in select_parameters(model).left_out:
        if is_selected([entry.name], patterns):
            warnings.warn(f"attribute_by_gradients: {entry.describe()}", stacklevel=3)


def _require_method(method: object) -> None:
    require_object("method", method)
    if not isinstance(method, FullInfluenceFunction):
        raise ValueError(
            f"`method` is {method!r}; expected a `FullInfluenceFunction`. Pass methods that read a "
            "run to `attribute`, and methods that read features to `attribute_by_features`."
        )
    method.solver.require()


def _open_run(run: Run | None, at: Moment) -> Store | None:
    if run is None and at not in ("now", "model"):
        raise ValueError(
            f"`at={at!r}` was passed without a run; expected `run=` with the run that kept the "
            'snapshots, or `at="now"`.'
        )
    if isinstance(run, list | tuple):
        raise ValueError(
            f"`run` is a {type(run).__name__} of {len(run)}; expected one recorded training. "
            "Attribute each run with its own model, and average: `Scores.mean([...])`."
        )
    return None if run is None else open_run(run)


def suggested_full_damping(store: Store) -> float | None:
    """Return the damping that a run suggests for a mean loss, in the coordinates of its rows.

    Returns:
        The damping; ``None``, with a warning, if the steps of the run are not gradient steps.
    """
    extent = Extent.of(store)
    damping = suggested_damping(extent) / extent.weight
    if has_plain_rates(store):
        return damping
    names = sorted({step.optimizer for step in store})
    warnings.warn(
        f"Steps of {' and '.join(names)} are not gradient steps in the "
        f"coordinates of this run, so its learning rates suggest no damping ({damping:.3g} "
        "otherwise). The solver's default is used, as without a run. Pass "
        '`FullInfluenceFunction(damping=...)`, or record with `preconditioner="optimizer"` and an '
        "optimizer that it supports.",
        stacklevel=3,
    )
    return None


def _weights(model: nn.Module, store: Store | None, at: Moment) -> str:
    if store is None or at == "now" or at == "model":
        return fingerprint(model)
    return describe_weights(store, at)
