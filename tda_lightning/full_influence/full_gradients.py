"""Whole gradients: unprojected rows of a small model, at its own weights or along a run.

Along a run, they are those at its snapshots, each in the coordinates of the step nearest to it:
where the run recorded sketches, these are what it sketched.
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
    parameters_of,
)
from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.gradients.row_recorder import row_dtype
from tda_lightning.gradients.sketching.projectors import Identity
from tda_lightning.passes.batches import kept_batches, with_progress
from tda_lightning.passes.queries import mean_rows_at, query_rows
from tda_lightning.passes.targets import Target
from tda_lightning.passes.training_data import sampled_rows, train_rows
from tda_lightning.recording.sample_ids import IdSource, require_once
from tda_lightning.stores import Store
from tda_lightning.stores.recipe import Recipe, SampleAxis
from tda_lightning.stores.snapshots import MAX_SNAPSHOTS, Moment, own_snapshots, position_of, spread


def whole_recipe(
    model: nn.Module,
    selection: LayerSelection,
    reduction: Literal["mean", "sum"],
    batch_dims: Mapping[str, SampleAxis],
) -> Recipe:
    """Return the recipe of rows that are not projected."""
    return Recipe(
        blocks=selection.blocks,
        left_out=selection.left_out,
        projector=Identity().to_dict(),
        dimension=sum(block.size for block in selection.blocks),
        dtype="float64" if row_dtype(model) == torch.float64 else "float32",
        reduction=reduction,
        batch_dims=dict(batch_dims),
        model=type(model).__name__,
    )


class WholeGradients:
    """Takes the gradients of a model; vectors hold its parameters one after the other, flattened.

    Args:
        model: The LightningModule that was trained.
        selection: What of it counts.
        recipe: How to record: :func:`whole_recipe`.
        run: Where to look from: the snapshots of its steps, ten at most; ``None`` for the model's
            own weights.

    Raises:
        ValueError: If the run has no snapshots, or did not record what counts.
    """

    def __init__(
        self, model: nn.Module, selection: LayerSelection, recipe: Recipe, run: Store | None
    ) -> None:
        self._model, self._recipe, self._run = model, recipe, run
        self._parameters = parameters_of(selection)
        self._order = columns_of(selection)
        self._places = self._order.argsort()
        self.snapshots: list[int] = []
        self._linearization_points = [CURRENT_WEIGHTS]
        if run is not None:
            self.snapshots = spread(own_snapshots(run), MAX_SNAPSHOTS)
            self._linearization_points = [self._viewpoint(run, one) for one in self.snapshots]

    def of_queries(
        self, queries: Any, target: Target, at: Moment, *, progress: bool
    ) -> Float[Tensor, "n_query d"]:
        """Return the gradients of the queries' losses, or of another target."""
        queries = kept_batches(queries) if at == "snapshots" else queries

        def ask(position: int) -> Float[Tensor, "n_query d"]:
            rows = query_rows(self._model, queries, self._recipe, target=target, progress=progress)
            return self._vectors(rows, self._scale(position))

        return ask(-1) if self._run is None else mean_rows_at(self._run, self._model, at, ask)

    def objective(
        self,
        loader: DataLoader[Any],
        damping: float | None,
        *,
        argument: str = "train_loader",
        progress: bool,
    ) -> Objective:
        """Return the mean loss over some data, seen from wherever gradients are taken.

        Args:
            loader: The data.
            damping: What the training suggests.
            argument: What the data are called where the user has passed them.
            progress: Show progress bars.
        """
        found = Objective.of(
            self._model,
            self._parameters,
            loader,
            reduction=self._recipe.reduction,
            argument=argument,
            progress=progress,
        )
        return replace(
            found,
            linearization_points=tuple(self._linearization_points),
            sampled=lambda draws: self._sampled(found, draws, progress),
            damping=damping,
        )

    def _sampled(
        self, objective: Objective, draws: int, progress: bool
    ) -> Generator[Float[Tensor, "n d"], None, None]:
        """Yield sampled-label rows whose outer products sum to the mean over all points."""
        passes = [viewpoint for viewpoint in self._linearization_points for _ in range(draws)]
        total = objective.n * len(passes)
        is_mean = objective.reduction == "mean"
        bar = with_progress(passes, "sampled labels", progress, unit="pass")
        for number, viewpoint in enumerate(bar):
            seed = number * len(objective.batches)
            drawn = sampled_rows(
                self._model,
                objective.batches,
                self._recipe,
                seed=seed,
                argument=objective.argument,
            )
            with viewpoint.of(self._model), closing(drawn) as batches:
                for size, rows in zip(objective.sizes, batches, strict=True):
                    share = (size if is_mean else 1) / total
                    yield self._vectors(rows, viewpoint.scale) * share**0.5

    def products(
        self,
        directions: Float[Tensor, "n_query d"],
        loader: DataLoader[Any],
        sample_ids: IdSource | None,
        *,
        progress: bool,
    ) -> tuple[Int[Tensor, " n_train"], Float[Tensor, "n_query n_train"]]:
        """Return the ids of all samples, sorted, and their gradients' products with directions.

        Raises:
            ValueError: If the passes over the loader draw different samples.
        """
        passes = with_progress(
            self._linearization_points, "training samples", progress, unit="pass"
        )
        each = (self._products(one, directions, loader, sample_ids) for one in passes)
        ids, total = next(each)
        for again, products in each:
            _require_same_samples(ids, again, len(self._linearization_points))
            total += products
        return ids, total / len(self._linearization_points)

    def _products(
        self,
        viewpoint: LinearizationPoint,
        directions: Float[Tensor, "n_query d"],
        loader: DataLoader[Any],
        sample_ids: IdSource | None,
    ) -> tuple[Int[Tensor, " n_train"], Float[Tensor, "n_query n_train"]]:
        scaled = directions if viewpoint.scale is None else directions * viewpoint.scale
        along = scaled[:, self._order].to(self._recipe.torch_dtype)
        ids, products = [], []
        taken = train_rows(self._model, loader, self._recipe, sample_ids=sample_ids)
        with viewpoint.of(self._model), closing(taken) as batches:
            for named, rows in batches:
                _require_finite(named, rows)
                ids.append(named)
                products.append((along @ rows.mT).cpu())
        if not ids:
            raise ValueError("`train_loader` is an empty loader; expected at least one batch.")
        train_ids, places = torch.cat(ids).sort()
        require_once(train_ids)
        return train_ids, torch.cat(products, dim=1)[:, places]

    def _vectors(
        self, rows: Float[Tensor, "n d"], scale: Float[Tensor, " d"] | None
    ) -> Float[Tensor, "n d"]:
        """Return rows in the order of the parameters, where these are, in some coordinates."""
        like = self._parameters[0]
        found = rows[:, self._places].to(like.device, like.dtype)
        return found if scale is None else found * scale

    def _viewpoint(self, run: Store, snapshot: int) -> LinearizationPoint:
        weights = run.weights_at(snapshot)
        for name, _ in self._model.named_parameters():
            if name in weights and not torch.isfinite(weights[name]).all():
                raise ValueError(
                    f"The snapshot before step {snapshot} holds NaN or infinity in `{name}`; "
                    "expected weights of a training that did not diverge. Ask of its part before "
                    "that, `run=store[:n]`."
                )
        return LinearizationPoint(weights, self._scale(position_of(run, snapshot)))

    def _scale(self, position: int) -> Float[Tensor, " d"] | None:
        """Return what the coordinates of a step multiply each parameter's gradient by."""
        found = None if self._run is None else self._run.preconditioner(position)
        if self._run is None or found is None:
            return None
        recorded = self._run.recipe.blocks
        rows = torch.split(found.rows, [block.rows for block in recorded])
        columns = torch.split(found.columns, [block.columns for block in recorded])
        known = {block: pair for block, *pair in zip(recorded, rows, columns, strict=True)}
        unknown = [block.name for block in self._recipe.blocks if block not in known]
        if unknown:
            raise ValueError(
                f"The run did not record `{unknown[0]}` as it is in the model; expected the layers "
                "of the run. Choose among these with `layers=[...]`, or leave `run=` out."
            )
        scales = [torch.outer(*known[block]).flatten() for block in self._recipe.blocks]
        return self._vectors(torch.cat(scales)[None], None)[0]


def _require_same_samples(before: Int[Tensor, " n"], now: Int[Tensor, " m"], passes: int) -> None:
    if torch.equal(before, now):
        return
    only = sorted(set(before.tolist()) ^ set(now.tolist()))
    raise ValueError(
        f"`train_loader` does not draw the same samples in every pass: {_listed(only)} came in one "
        f"and not in another; expected the same in all {passes}, one for each snapshot. Pass a "
        "loader of all samples, without `drop_last=True` and without a sampler that chooses."
    )


def _require_finite(ids: Int[Tensor, " n"], rows: Float[Tensor, "n k"]) -> None:
    wrong = ids[~torch.isfinite(rows).all(dim=1).cpu()]
    if len(wrong):
        raise ValueError(
            f"`train_loader` yields samples whose gradients are NaN or infinite: {_listed(wrong)}; "
            "expected finite ones. Look at their inputs and labels, and at the weights."
        )


def _listed(ids: Any) -> str:
    return ", ".join(str(int(one)) for one in ids[:5]) + (", ..." if len(ids) > 5 else "")
