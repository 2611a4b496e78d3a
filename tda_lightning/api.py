"""The front door: ask a recorded run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tda_lightning.arguments import require_choice, require_kind, require_whole
from tda_lightning.attribution import Attributor, SelfAttributor, TracIn, Trajectory, Unrolled
from tda_lightning.attribution.top_scores import top_scores
from tda_lightning.attribution.trajectory import Period, chosen_ids, contributions
from tda_lightning.passes.batches import kept_batches
from tda_lightning.passes.model_state import Mode
from tda_lightning.passes.queries import record_queries
from tda_lightning.passes.targets import Loss, Target, name_of
from tda_lightning.results.scores import SampleScores, Scores, TopScores, require_rank
from tda_lightning.stores import Store, opened
from tda_lightning.stores.snapshots import Moment, describe_weights, method_at, rows_at

Run = str | os.PathLike[str] | Store


def attribute(
    run: Run | list[Run] | tuple[Run, ...],
    model: nn.Module | list[nn.Module] | tuple[nn.Module, ...],
    queries: Any,
    *,
    method: Attributor = Unrolled(),
    target: Target = Loss(),
    at: Moment = "now",
    mode: Mode = "eval",
    progress: bool = True,
) -> Scores:
    """Say which training samples lowered, or raised, the loss of each query (or another target).

    Args:
        run: A recorded training: its folder or a store. A slice of a store asks about its steps.
            A list of trainings on the same data asks about their average.
        model: The LightningModule that was trained, with the weights to ask about; a list of them
            for a list of trainings.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches. At
            snapshots, and for several trainings, its batches are kept in memory meanwhile.
        method: How to attribute.
        target: What is asked about: the loss, or a function of (module, batch) that returns one
            number per sample, to raise: :class:`~tda_lightning.Logit`, say.
        at: At which weights: ``"now"``, those that the model has; the index of a step, those before
            it, if the run has a snapshot of them; or ``"snapshots"``: ``TracIn`` takes the snapshot
            nearest to each step, other methods the mean of the queries' gradients at snapshots of
            the later two thirds of the run. The model gets its own weights back.
        mode: Whether the model acts as in evaluation or as in training while queries pass through.
        progress: Show progress bars.

    Returns:
        Scores, shape ``(n_query, n_train)``; positive marks a proponent.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty, the model is another one, or the queries do not fit it.
    """
    stores, models = _pairs(run, model)
    queries = kept_batches(queries) if len(stores) > 1 else queries
    method = method_at(method, at)
    rows = [
        _ask(store, one, queries, target, at, method, mode, progress)
        for store, one in zip(stores, models, strict=True)
    ]
    if isinstance(run, list | tuple):
        scores = method.attribute_ensemble(stores, rows, progress=progress)
    else:
        scores = method.attribute(stores[0], rows[0], progress=progress)
    asked = _asked(stores, models, target, at, method, mode)
    return replace(scores, provenance={**scores.provenance, **asked})


def self_influence(
    run: Run, *, method: SelfAttributor = TracIn(), progress: bool = True
) -> SampleScores:
    """Say how much each training sample did for itself: high for unusual and mislabelled samples.

    Args:
        run: A recorded training: its folder or a store.
        method: How to attribute.
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
    method: Attributor = Unrolled(),
    target: Target = Loss(),
    at: Moment = "now",
    at_once: int = 256,
    mode: Mode = "eval",
    progress: bool = True,
) -> TopScores:
    """Name the best and the worst teachers of each query; for many queries, or much data.

    It keeps ``k`` of each kind per query, and never the matrix of all scores.

    Args:
        run: A recorded training: its folder or a store.
        model: The LightningModule that was trained, with the weights to ask about.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches. At
            snapshots its batches are kept in memory meanwhile.
        k: How many of each kind to keep.
        method: How to attribute.
        at_once: How many queries share a pass over the run. Memory: two matrices of
            ``(at_once, n_train)`` numbers, and the rows of all queries.
        target: What is asked about: the loss, or a function of (module, batch) that returns one
            number per sample, to raise: :class:`~tda_lightning.Logit`, say.
        at: At which weights: ``"now"``, those that the model has; the index of a step, those before
            it, if the run has a snapshot of them; or ``"snapshots"``: ``TracIn`` takes the snapshot
            nearest to each step, other methods the mean of the queries' gradients at snapshots of
            the later two thirds of the run. The model gets its own weights back.
        mode: Whether the model acts as in evaluation or as in training while queries pass through.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty, the model is another one, or the queries do not fit it.
    """
    store, method = open_run(run), method_at(method, at)
    require_rank(k, len(store.train_ids()))
    require_whole("at_once", at_once, least=1)
    rows = _ask(store, model, queries, target, at, method, mode, progress)
    top = top_scores(store, rows, method, k, at_once=at_once, progress=progress)
    asked = _asked([store], [model], target, at, method, mode)
    return replace(top, provenance={**top.provenance, **asked})


def trajectory(
    run: Run,
    model: nn.Module,
    queries: Any,
    train_ids: Int[Tensor, " n_selected"] | Sequence[int],
    *,
    method: Attributor = Unrolled(),
    target: Target = Loss(),
    at: Moment = "now",
    per: Period = "step",
    mode: Mode = "eval",
    progress: bool = True,
) -> Trajectory:
    """Say when in the training some samples helped or hurt; the sum over times is their score.

    Args:
        run: A recorded training: its folder or a store.
        model: The LightningModule that was trained, with the weights to ask about.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches. At
            snapshots its batches are kept in memory meanwhile.
        train_ids: Which training samples.
        method: How to attribute.
        per: Whether to add up steps to epochs.
        target: What is asked about: the loss, or a function of (module, batch) that returns one
            number per sample, to raise: :class:`~tda_lightning.Logit`, say.
        at: At which weights: ``"now"``, those that the model has; the index of a step, those before
            it, if the run has a snapshot of them; or ``"snapshots"``: ``TracIn`` takes the snapshot
            nearest to each step, other methods the mean of the queries' gradients at snapshots of
            the later two thirds of the run. The model gets its own weights back.
        mode: Whether the model acts as in evaluation or as in training while queries pass through.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty, the model is another one, the queries do not fit it, or a
            sample is not in the training set.
    """
    store, method = open_run(run), method_at(method, at)
    chosen = chosen_ids(store, train_ids)
    rows = _ask(store, model, queries, target, at, method, mode, progress)
    found = contributions(store, rows, chosen, method, per=per, progress=progress)
    asked = _asked([store], [model], target, at, method, mode)
    return replace(found, provenance={**found.provenance, **asked})


def open_run(run: Run) -> Store:
    """Return the store of a run that holds at least one step.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty.
    """
    store = opened(run, "run")
    if len(store) == 0:
        raise ValueError(
            f"The run {_name(run)} has no step yet; expected at least one. If its training is "
            "still going, wait for its first segment; otherwise train again."
        )
    return store


def _pairs(run: Any, model: Any) -> tuple[list[Store], list[nn.Module]]:
    """Return the stores and the models of one training or of several."""
    several = isinstance(run, list | tuple)
    runs = list(run) if several else [run]
    models = list(model) if isinstance(model, list | tuple) else [model]
    if len(runs) != len(models) or not runs:
        raise ValueError(
            f"There are {len(runs)} runs and {len(models)} models; expected one model for each "
            "run. Pass two lists of the same length, or one of each."
        )
    return [open_run(one) for one in runs], models


def _ask(
    store: Store,
    model: nn.Module,
    queries: Any,
    target: Target,
    at: Moment,
    method: Attributor,
    mode: Mode,
    progress: bool,
) -> Float[Tensor, "n_query width"]:
    """Return the rows of the queries, where the model is: methods work where their queries are."""
    require_choice("mode", mode, Mode)
    method.require(store)
    if at == "snapshots":
        queries = kept_batches(queries)

    def ask(position: int) -> Float[Tensor, "n_query k"]:
        return record_queries(
            model, queries, like=store, target=target, at=position, mode=mode, progress=progress
        )

    return rows_at(store, model, at, method, ask).to(next(model.parameters()).device)


def _asked(
    stores: Sequence[Store],
    models: Sequence[nn.Module],
    target: Target,
    at: Moment,
    method: Attributor,
    mode: str,
) -> dict[str, str]:
    """Say in a few words what was asked, of which weights."""
    if at == "now":
        weights = [fingerprint(one) for one in models]
    else:
        weights = list(dict.fromkeys(describe_weights(one, at, method) for one in stores))
    return {"target": name_of(target), "weights": ", ".join(weights), "mode": mode}


def fingerprint(model: nn.Module) -> str:
    """Return a short name for the weights of a model."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        found.update(raw.numpy().tobytes())
    return found.hexdigest()[:12]


def _name(run: Run) -> str:
    return f"in this `{type(run).__name__}`" if isinstance(run, Store) else f"at `{run}`"
