"""Full gradients: unprojected rows of a small model, at its current weights or along a run.

Along a run, gradients are taken at its snapshots, each in the coordinates of the nearest step. If
the run recorded sketches there, these are the same gradients before they were sketched.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.full_influence.objective import (
    CURRENT_WEIGHTS,
    LinearizationPoint,
    Objective,
    columns_of,
)
from tda_lightning.gradients.parameter_selection import ParameterSelection, row_dtype
from tda_lightning.gradients.sketching.projectors import Identity
from tda_lightning.passes.batches import columns_by_id
from tda_lightning.passes.queries import QueryRows, checked_for_zeros, identified_rows, queries_at
from tda_lightning.passes.query_batches import batches_in_memory
from tda_lightning.passes.targets import Target
from tda_lightning.passes.training_data import sampled_rows, train_rows
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.results.progress import progress_bar
from tda_lightning.stores import Store
from tda_lightning.stores.recipe import Recipe, SampleAxis
from tda_lightning.stores.snapshots import MAX_SNAPSHOTS, Moment, own_snapshots, position_of, spread
from tda_lightning.stores.step import Step


class FullGradients:
    """Computes gradients as vectors that hold the parameters one after the other, flattened.

    The linearization points are at most ten snapshots of a run, or the model's current weights
    without a run. How losses are reduced, and the axis of the samples, are by default those of the
    run.

    Raises:
        ValueError: If the run has no snapshots, or did not record a selected layer.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: ParameterSelection,
        run: Store | None,
        reduction: Literal["mean", "sum"] | None = None,
        batch_dims: Mapping[str, SampleAxis] | None = None,
    ) -> None:
        if run is not None:
            reduction = reduction or run.recipe.reduction
            batch_dims = run.recipe.batch_dims if batch_dims is None else batch_dims
        self._model, self._run = model, run
        self._recipe = Recipe(
            blocks=selection.blocks,
            left_out=selection.left_out,
            projector=Identity().to_dict(),
            dimension=sum(block.size for block in selection.blocks),
            dtype="float64" if row_dtype(model) == torch.float64 else "float32",
            reduction=reduction or "mean",
            batch_dims=dict(batch_dims or {}),
            model=type(model).__name__,
        )
        self._parameters = selection.all_parameters()
        # From the columns of a row to the entries of a vector, and back.
        self._vector_indices = columns_of(selection)
        self._row_columns = self._vector_indices.argsort()
        self.snapshots: list[int] = []
        self._linearization_points = [CURRENT_WEIGHTS]
        if run is not None:
            self.snapshots = spread(own_snapshots(run), MAX_SNAPSHOTS)
            self._linearization_points = [self._point_at(run, index) for index in self.snapshots]

    @classmethod
    def at_current_weights(
        cls, model: nn.Module, selection: ParameterSelection, run: Store
    ) -> FullGradients:
        """Return gradients at the model's current weights, in the coordinates of a run's end."""
        gradients = cls(model, selection, None, run.recipe.reduction, run.recipe.batch_dims)
        gradients._run = run
        gradients._linearization_points = [LinearizationPoint(scale=gradients._scale(-1))]
        return gradients

    def sum_over(self, data: Any, *, progress: bool) -> Float[Tensor, " d"]:
        """Return the sum of the samples' gradients, as the mean over the linearization points."""
        total = torch.zeros(self._recipe.dimension)
        for point in self._linearization_points:
            with point.loaded_into(self._model):
                queries = identified_rows(self._model, data, self._recipe, progress=progress)
            summed = self.vectors(queries.rows, point.scale).sum(dim=0)
            total = total.to(summed) + summed
        return total / len(self._linearization_points)

    def of_samples(self, data: Any) -> Float[Tensor, "n d"]:
        """Return the gradient of each sample's loss at the model's current weights."""
        queries = identified_rows(self._model, data, self._recipe, progress=False)
        return self.vectors(queries.rows, None)

    def recorded(self, step: Step, position: int) -> Float[Tensor, "n d"]:
        """Return the rows of a step of a run that are not compressed, as gradients."""
        gradients, scale = self.vectors(step.sketch, None), self._scale(position)
        # A factor of zero is that of a parameter that has had no gradient.
        return gradients if scale is None else torch.where(scale > 0, gradients / scale, 0.0)

    def as_parameters(self, displacement: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return a displacement in the coordinates of the gradients as one of the parameters."""
        scales = [point.scale for point in self._linearization_points if point.scale is not None]
        return displacement * torch.stack(scales).mean(dim=0) if scales else displacement

    def of_queries(self, queries: Any, target: Target, at: Moment, *, progress: bool) -> QueryRows:
        """Return the queries with the gradients of their losses, or of another target."""
        queries = batches_in_memory(queries) if at == "snapshots" else queries
        model, recipe = self._model, self._recipe

        def record(position: int) -> QueryRows:
            query = identified_rows(model, queries, recipe, target=target, progress=progress)
            return replace(query, rows=self.vectors(query.rows, self._scale(position)))

        run = self._run
        return checked_for_zeros(record(-1) if run is None else queries_at(run, model, at, record))

    def objective(
        self,
        loader: DataLoader[Any],
        damping: float | None,
        *,
        argument: str = "train_loader",
        progress: bool,
    ) -> Objective:
        """Return the mean loss over some data, with the linearization points of the gradients.

        ``damping`` is what the training suggests; ``argument`` names the user's loader.
        """
        objective = Objective.of(
            self._model,
            self._parameters,
            loader,
            reduction=self._recipe.reduction,
            argument=argument,
            progress=progress,
        )
        return replace(
            objective,
            linearization_points=tuple(self._linearization_points),
            sampled=lambda draws: self._sampled(objective, draws, progress),
            damping=damping,
        )

    def _sampled(
        self, objective: Objective, draws: int, progress: bool
    ) -> Generator[Float[Tensor, "n d"], None, None]:
        """Yield sampled-label rows whose outer products sum to the mean over all points."""
        passes = [point for point in self._linearization_points for _ in range(draws)]
        total = objective.n * len(passes)
        is_mean = objective.reduction == "mean"
        bar = progress_bar(passes, "sampled labels", "pass", shown=progress)
        for number, point in enumerate(bar):
            seed = number * len(objective.batches)
            arguments = self._model, objective.batches, self._recipe
            rows_by_batch = sampled_rows(*arguments, seed=seed, argument=objective.argument)
            with point.loaded_into(self._model), closing(rows_by_batch) as batches:
                for size, rows in zip(objective.sizes, batches, strict=True):
                    share = (size if is_mean else 1) / total
                    yield self.vectors(rows, point.scale) * share**0.5

    def products(
        self,
        directions: Float[Tensor, "n_query d"],
        loader: DataLoader[Any],
        sample_ids: IdSource | None,
        *,
        progress: bool,
    ) -> tuple[Int[Tensor, " n_train"], Float[Tensor, "n_query n_train"]]:
        """Return the sorted ids of all samples, and the products of directions and gradients.

        Raises:
            ValueError: If the passes over the loader draw different samples.
        """
        points = self._linearization_points
        bar = progress_bar(points, "training samples", "pass", shown=progress)
        passes = (self._products_at(point, directions, loader, sample_ids) for point in bar)
        train_ids, total = next(passes)
        for ids, products in passes:
            _require_same_samples(train_ids, ids, len(points))
            total += products
        return train_ids, total / len(points)

    def _products_at(
        self,
        point: LinearizationPoint,
        directions: Float[Tensor, "n_query d"],
        loader: DataLoader[Any],
        sample_ids: IdSource | None,
    ) -> tuple[Int[Tensor, " n_train"], Float[Tensor, "n_query n_train"]]:
        scaled = directions if point.scale is None else directions * point.scale
        row_directions = scaled[:, self._vector_indices].to(self._recipe.torch_dtype)
        parts = []
        rows_by_batch = train_rows(self._model, loader, self._recipe, sample_ids=sample_ids)
        with point.loaded_into(self._model), closing(rows_by_batch) as batches:
            for batch_ids, rows in batches:
                _require_finite(batch_ids, rows)
                parts.append((batch_ids, (row_directions @ rows.mT).cpu()))
        return columns_by_id(parts)

    def vectors(
        self, rows: Float[Tensor, "n d"], scale: Float[Tensor, " d"] | None
    ) -> Float[Tensor, "n d"]:
        """Return rows as vectors of the parameters, on their device, multiplied by ``scale``."""
        like = self._parameters[0]
        vectors = rows[:, self._row_columns].to(like.device, like.dtype)
        return vectors if scale is None else vectors * scale

    def _point_at(self, run: Store, snapshot: int) -> LinearizationPoint:
        weights = run.weights_at(snapshot)
        for name, _ in self._model.named_parameters():
            if name in weights and not torch.isfinite(weights[name]).all():
                raise ValueError(
                    f"The snapshot before step {snapshot} holds NaN or infinity in `{name}`; "
                    "expected weights of a training that did not diverge. Use only the part of "
                    "the run before that: `run=store[:n]`."
                )
        return LinearizationPoint(weights, self._scale(position_of(run, snapshot)))

    def _scale(self, position: int) -> Float[Tensor, " d"] | None:
        """Return the preconditioner of a step as one factor for each parameter."""
        preconditioner = None if self._run is None else self._run.preconditioner(position)
        if self._run is None or preconditioner is None:
            return None
        recorded = self._run.recipe.blocks
        rows = torch.split(preconditioner.rows, [block.rows for block in recorded])
        columns = torch.split(preconditioner.columns, [block.columns for block in recorded])
        factors = {block: pair for block, *pair in zip(recorded, rows, columns, strict=True)}
        missing = [block.name for block in self._recipe.blocks if block not in factors]
        if missing:
            raise ValueError(
                f"The run did not record `{missing[0]}` as it is in the model; expected the layers "
                "of the run. Select some of these with `layers=[...]`, or omit `run=`."
            )
        scales = [torch.outer(*factors[block]).flatten() for block in self._recipe.blocks]
        return self.vectors(torch.cat(scales)[None], None)[0]


def _require_same_samples(
    first_ids: Int[Tensor, " n"], ids: Int[Tensor, " m"], passes: int
) -> None:
    if torch.equal(first_ids, ids):
        return
    unmatched = sorted(set(first_ids.tolist()) ^ set(ids.tolist()))
    raise ValueError(
        "`train_loader` does not draw the same samples in every pass: "
        f"ids {_listed(unmatched)} are in one pass and not in another; expected the same in all "
        f"{passes} passes, one for each snapshot. Pass a loader of all samples, without "
        "`drop_last=True` and without a sampler that draws a subset."
    )


def _require_finite(ids: Int[Tensor, " n"], rows: Float[Tensor, "n k"]) -> None:
    wrong = ids[~torch.isfinite(rows).all(dim=1).cpu()]
    if len(wrong):
        raise ValueError(
            f"`train_loader` yields samples whose gradients are NaN or infinite: {_listed(wrong)}; "
            "expected finite gradients. Look at their inputs and labels, and at the weights."
        )


def _listed(ids: Any) -> str:
    first = ", ".join(str(int(sample_id)) for sample_id in ids[:5])
    return first + (", ..." if len(ids) > 5 else "")
