"""The functions that query a recorded run.

:func:`attribute` documents the arguments that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from tda_lightning.attribution import Attributor, Averaged, SelfAttributor, TracIn
from tda_lightning.attribution.question import Question
from tda_lightning.attribution.top_scores import top_scores
from tda_lightning.attribution.trajectory import contributions
from tda_lightning.passes.model_state import Mode
from tda_lightning.passes.query_batches import batches_in_memory
from tda_lightning.passes.targets import Loss, Target
from tda_lightning.results.ranking import SampleRanking, require_rank
from tda_lightning.results.sample_groups import positions_of
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.results.scores import Scores
from tda_lightning.results.top_scores import TopScores
from tda_lightning.results.trajectory import Period, Trajectory
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import (
    call_like,
    require_choice,
    require_kind,
    require_object,
    require_whole,
)
from tda_lightning.stores.opening import Run, open_run
from tda_lightning.stores.snapshots import Moment


def attribute(
    run: Run | list[Run] | tuple[Run, ...],
    model: nn.Module | list[nn.Module] | tuple[nn.Module, ...],
    queries: Any,
    *,
    method: Attributor = Averaged(),
    target: Target = Loss(),
    at: Moment | None = None,
    mode: Mode = "eval",
    progress: bool = True,
) -> Scores:
    """Score every training sample by its effect on each query's loss (or another target).

    Args:
        run: A recorded training: its folder or a store. A slice of a store covers only its steps.
            A list of runs on the same data averages over them.
        model: The trained LightningModule, with the weights to query; a list of models for a list
            of runs.
        queries: A batch as the training loader yields it, or a ``DataLoader`` of such batches. With
            several runs, all batches are held in memory meanwhile.
        method: The attribution method. The default is the mean of ``Unrolled()`` and
            ``InfluenceFunction()``.
        target: The quantity to attribute. The default is the loss. Otherwise a function of (module,
            batch) that returns one number per sample, such as :class:`~tda_lightning.Logit`;
            proponents then raise it.
        at: The weights at which queries are evaluated. ``"now"`` uses the weights that the model
            has, and warns if they are not those at the end of the recorded training. ``"model"``
            uses them without a warning. The index of a step uses the snapshot taken before that
            step. ``"snapshots"`` uses several: ``TracIn`` pairs each step with the nearest
            snapshot; other methods take the mean over snapshots in the last two thirds of the run.
            By default ``"snapshots"`` for ``InfluenceFunction``, also within ``Averaged``, if the
            run has any there; otherwise ``"now"``.
        mode: Whether the model is in evaluation or training mode for the queries.
        progress: Show progress bars.

    Returns:
        Scores, shape ``(n_query, n_train)``. A positive score marks a proponent.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty, or if the model or the queries do not match it.
    """
    question = Question(_method_at(method, at), target, at, mode, progress)
    stores, models = _pairs(run, model)
    queries = batches_in_memory(queries) if len(stores) > 1 else queries
    per_run = [
        question.query_rows(store, trained, queries)
        for store, trained in zip(stores, models, strict=True)
    ]
    first, rows = per_run[0], [query.rows for query in per_run]
    if isinstance(run, list | tuple):
        scores = question.method.attribute_ensemble(stores, rows, progress=progress)
    else:
        scores = question.method.attribute(stores[0], rows[0], progress=progress)
    provenance = {**scores.provenance, **question.describe(stores, models)}
    return replace(scores, query_ids=first.ids, tokens=first.tokens, provenance=provenance)


@call_like("`self_influence(run, method=TracIn())`, without a model: the run has all it needs")
def self_influence(
    run: Run, *, method: SelfAttributor = TracIn(), progress: bool = True
) -> SampleScores:
    """Score every training sample by its effect on its own loss.

    Unusual and mislabelled samples score high. Compare with their plain losses, which
    :func:`~tda_lightning.sample_losses` returns: which of both finds more depends on the task.

    Args:
        run: A recorded training: its folder or a store.
        method: The attribution method: ``TracIn``, ``InfluenceFunction`` or ``Unrolled``.
        progress: Show a progress bar.

    Returns:
        Scores, shape ``(n_train,)``.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty.
    """
    require_kind("method", method, SelfAttributor, "`TracIn()` or `InfluenceFunction()`")
    return method.self_influence(open_run(run), progress=progress)


def top_attributions(
    run: Run,
    model: nn.Module,
    queries: Any,
    k: int = 5,
    *,
    method: Attributor = Averaged(),
    target: Target = Loss(),
    at: Moment | None = None,
    query_batch_size: int = 256,
    mode: Mode = "eval",
    progress: bool = True,
) -> TopScores:
    """Return the strongest proponents and opponents of each query, without the full score matrix.

    Use it for many queries or large training sets. Memory: two matrices of
    ``(query_batch_size, n_train)`` numbers, and the rows of all queries.

    Args:
        run: A recorded training: its folder or a store.
        model: See :func:`attribute`, as for all arguments that are not listed here.
        queries: See :func:`attribute`.
        k: Number of proponents, and of opponents, per query.
        method: See :func:`attribute`.
        target: See :func:`attribute`.
        at: See :func:`attribute`.
        query_batch_size: Number of queries that share one pass over the run.
        mode: See :func:`attribute`.
        progress: Show progress bars.
    """
    question = Question(_method_at(method, at), target, at, mode, progress)
    store = open_run(run)
    require_rank(k, len(store.train_ids()))
    require_whole("query_batch_size", query_batch_size, least=1)
    query = question.query_rows(store, model, queries)
    top = top_scores(
        store, query.rows, question.method, k, query_batch_size=query_batch_size, progress=progress
    )
    provenance = {**top.provenance, **question.describe([store], [model])}
    return top.named(query.ids, query.tokens, provenance)


def trajectory(
    run: Run,
    model: nn.Module,
    queries: Any,
    train_ids: Int[Tensor, " n_selected"] | Sequence[int] | SampleRanking,
    *,
    method: Attributor = Averaged(),
    target: Target = Loss(),
    at: Moment | None = None,
    per: Period = "step",
    mode: Mode = "eval",
    progress: bool = True,
) -> Trajectory:
    """Return the contributions of selected training samples over the course of the training.

    Their sum over time is the score that :func:`attribute` returns.

    Args:
        run: A recorded training: its folder or a store.
        model: See :func:`attribute`, as for all arguments that are not listed here.
        queries: See :func:`attribute`.
        train_ids: Ids of the selected training samples, or a ranking of them.
        method: See :func:`attribute`.
        target: See :func:`attribute`.
        at: See :func:`attribute`.
        per: Whether to return contributions per step or sum them per epoch.
        mode: See :func:`attribute`.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty, if the model or the queries do not match it, or if a
            sample is not in the training set.
    """
    question = Question(_method_at(method, at), target, at, mode, progress)
    require_choice("per", per, Period)
    store = open_run(run)
    all_ids = store.train_ids()
    selected = all_ids[positions_of(all_ids, train_ids)]
    query = question.query_rows(store, model, queries)
    result = contributions(store, query.rows, selected, question.method, per=per, progress=progress)
    provenance = {**result.provenance, **question.describe([store], [model])}
    return replace(result, query_ids=query.ids, provenance=provenance)


def _method_at(method: Attributor, at: Moment | None) -> Attributor:
    """Return the method for queries at some weights.

    Raises:
        ValueError: If the method does not read a run.
    """
    require_object("method", method)
    if not isinstance(method, Attributor):
        raise ValueError(
            f"`method` is {method!r}; expected one that reads a run, such as `Unrolled()`. "
            "Pass `FullInfluenceFunction` to `attribute_by_gradients`; pass `FeatureSimilarity`, "
            "`RepresenterPoint` and `LocalJacobianExpansion` to `attribute_by_features`."
        )
    return method.for_queries_at(at)


def _pairs(run: Any, model: Any) -> tuple[list[Store], list[nn.Module]]:
    """Return the stores and the models of one run or of several."""
    runs = list(run) if isinstance(run, list | tuple) else [run]
    models = list(model) if isinstance(model, list | tuple) else [model]
    if len(runs) != len(models) or not runs:
        counts = f"There are {len(runs)} runs and {len(models)} models; expected one model for each"
        raise ValueError(f"{counts} run. Pass two lists of the same length, or one of each.")
    return list(map(open_run, runs)), models
