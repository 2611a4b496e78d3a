"""What a run will cost, said before its first step."""

from __future__ import annotations

import math
from collections.abc import Sized

from tda_lightning.callbacks.either import Trainer
from tda_lightning.callbacks.loaders import training_loaders
from tda_lightning.recipe import Recipe
from tda_lightning.stores import WritableStore

# Beside its row, a visit keeps its sample id and its scale (8 bytes each), its weight, terms and
# curvature (4 each).
_VISIT_BYTES = 28


def describe_cost(trainer: Trainer, recipe: Recipe, sampled: float, store: WritableStore) -> str:
    """Say in one line what is recorded, and how much disk it will take.

    Args:
        trainer: The trainer.
        recipe: How sketches will be made.
        sampled: Share of the samples that have a row of sampled labels too.
        store: Where they will be kept.
    """
    recorded = sum(block.size for block in recipe.blocks)
    total = recorded + sum(entry.size for entry in recipe.left_out)
    row_bytes = _visit_bytes(recipe, sampled, store)
    visits = _expected_visits(trainer, recipe)
    cost = "an unknown number of visits"
    if math.isfinite(visits):
        cost = f"about {visits:,.0f} visits, {visits * row_bytes / 2**20:,.0f} MiB in all"
    return (
        f"recording {recorded / total:.1%} of the trained parameters ({len(recipe.blocks)} layers) "
        f"in {row_bytes:,} bytes a visit; {cost}."
    )


def stride_within(
    trainer: Trainer,
    recipe: Recipe,
    sampled: float,
    store: WritableStore,
    max_gb: float,
    ranks: int,
) -> int:
    """Return the smallest stride with which a run will not take more than so many gigabytes.

    Args:
        trainer: The trainer.
        recipe: How sketches will be made, with the smallest stride that is wanted.
        sampled: Share of the samples that have a row of sampled labels too.
        store: Where they will be kept.
        max_gb: How much disk there is, in units of 10^9 bytes.
        ranks: Number of processes, each of which sees its part of the data.

    Raises:
        ValueError: If it cannot be told how long training will be.
    """
    visits = _expected_visits(trainer, recipe) * ranks
    if not math.isfinite(visits):
        raise ValueError(
            "`max_gb` cannot be kept, since it cannot be told how many samples training will see; "
            "expected a dataset with a length, and `max_epochs` or `max_steps`. Set these, or "
            "`every_n_steps=` instead."
        )
    times = visits * _visit_bytes(recipe, sampled, store) / (max_gb * 1e9)
    return recipe.every_n_steps * max(1, math.ceil(times))


def _visit_bytes(recipe: Recipe, sampled: float, store: WritableStore) -> int:
    row_bytes = recipe.dimension * store.bytes_of(recipe.torch_dtype)
    return round(row_bytes * (1 + sampled) + _VISIT_BYTES)


def _expected_visits(trainer: Trainer, recipe: Recipe) -> float:
    """Number of visits, or infinity if it cannot be told beforehand."""
    length = _length_of(training_loaders(trainer)[0])
    if recipe.train_ids is None or math.isinf(length):
        return math.inf
    batches = float(trainer.num_training_batches)
    share = batches / length
    per_epoch = share * sum(stop - start for start, stop in recipe.train_ids)
    steps_per_epoch = max(1.0, batches / trainer.accumulate_grad_batches)
    by_epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    by_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps / steps_per_epoch
    return float(per_epoch * min(by_epochs, by_steps) / recipe.every_n_steps)


def _length_of(loader: Sized) -> float:
    try:
        return float(len(loader))
    except TypeError:  # A sampler may go on for ever.
        return math.inf
