"""Cost estimate: the number of visits and bytes of a run, estimated before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

from torch import Tensor

from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer, training_loaders
from tda_lightning.gradients.losses import LabelSchedule
from tda_lightning.stores import WritableStore
from tda_lightning.stores.recipe import Recipe

# Besides its row, a visit stores its sample id and scale (8 bytes each), and its weight, terms and
# curvature (4 bytes each).
_VISIT_BYTES = 28
# Automatic snapshots are taken between equal parts of a training: more of them improve no answer.
_PARTS = 5
_SMALL_BYTES = 64 * 2**20


def describe_cost(trainer: Trainer, recipe: Recipe, sampled: float, store: WritableStore) -> str:
    """Return a sentence on the place of the run, its parameters and the expected size on disk.

    ``sampled`` is the share of the steps with sampled labels, 0 for none.
    """
    recorded = sum(block.size for block in recipe.blocks)
    total = recorded + sum(entry.size for entry in recipe.left_out)
    steps = _expected_steps(trainer) / recipe.every_n_steps
    row_bytes = _visit_bytes(recipe, steps, sampled, store)
    visits = _expected_visits(trainer, recipe)
    cost = f"{row_bytes:,} bytes for each of an unknown number of visits"
    if math.isfinite(visits):
        cost = f"about {visits * row_bytes / 2**20:,.0f} MiB for {visits:,.0f} visits of samples"
    stride = f"one step in {recipe.every_n_steps:,}" if recipe.every_n_steps > 1 else "every step"
    return (
        f"recording {stride} and {recorded / total:.1%} of the trained parameters into "
        f"{_place_of(store)}, {cost}."
    )


def _place_of(store: WritableStore) -> str:
    path = getattr(store, "path", None)
    if path is None:
        return f"a `{type(store).__name__}`"
    return f"`{path.relative_to(here) if path.is_relative_to(here := Path.cwd()) else path}`"


def automatic_snapshots(
    trainer: Trainer,
    model: LightningModule,
    recipe: Recipe,
    sampled: float,
    store: WritableStore,
    max_gb: float | None,
) -> list[int]:
    """Return steps at each fifth of the training whose snapshots take little space, or none.

    Little is a tenth of the rows or of ``max_gb``; without such a limit, 64 MiB are too.
    """
    steps = _expected_steps(trainer)
    if math.isinf(steps) or steps < _PARTS:
        return []
    row_bytes = _visit_bytes(recipe, steps / recipe.every_n_steps, sampled, store)
    visits = _expected_visits(trainer, recipe)
    rows = visits * row_bytes if math.isfinite(visits) else 0.0
    limit = max(rows / 10, _SMALL_BYTES) if max_gb is None else max_gb * 1e8
    indices = [int(steps) * part // _PARTS for part in range(1, _PARTS)]
    return indices if len(indices) * snapshot_bytes(model) <= limit else []


def snapshot_bytes(model: LightningModule) -> int:
    """Return the size of a snapshot of the weights and buffers."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def describe_snapshots(
    trainer: Trainer, model: LightningModule, chosen: int | Sequence[int]
) -> Iterator[str]:
    """Yield a sentence on the expected size of the chosen snapshots, if there are any."""
    if not chosen:
        return
    steps = _expected_steps(trainer)
    count = steps / chosen if isinstance(chosen, int) else sum(index < steps for index in chosen)
    each = snapshot_bytes(model) / 2**20
    total = "an unknown number of them"
    if math.isfinite(count):
        total = f"about {math.ceil(count):,} of them, {math.ceil(count) * each:,.1f} MiB"
    yield f"Snapshots of the weights take {each:,.1f} MiB each; {total}."


def stride_within(
    trainer: Trainer, recipe: Recipe, sampled: float, store: WritableStore, max_gb: float
) -> int:
    """Return the smallest stride, from the recipe's on, with which a run takes at most ``max_gb``.

    Raises:
        ValueError: If the length of the training is unknown.
    """
    visits, limit = _expected_visits(trainer, recipe) * trainer.world_size, max_gb * 1e9
    if not math.isfinite(visits):
        raise ValueError(
            "`max_gb` cannot be kept, since the number of samples that training will see is "
            "unknown; expected a dataset with a length, and `max_epochs` or `max_steps`. Set "
            "these, or `every_n_steps=` instead."
        )
    steps, times = _expected_steps(trainer) / recipe.every_n_steps, 1
    # With a larger stride, the first steps, which all have sampled labels, are a larger share.
    while (size := visits * _visit_bytes(recipe, steps / times, sampled, store)) > times * limit:
        times = max(times + 1, math.ceil(size / limit))
    return recipe.every_n_steps * times


def _visit_bytes(recipe: Recipe, steps: float, sampled: float, store: WritableStore) -> int:
    """Return the mean number of bytes of a visit in a run of that many recorded steps."""
    row_bytes = recipe.dimension * store.bytes_of(recipe.torch_dtype)
    share = LabelSchedule(sampled).mean_share(steps) if sampled else 0.0
    return round(row_bytes * (1 + share) + _VISIT_BYTES)


def _expected_visits(trainer: Trainer, recipe: Recipe) -> float:
    """Return the number of visits, or infinity if it is unknown."""
    length = _length_of(training_loaders(trainer)[0])
    if recipe.train_ids is None or math.isinf(length):
        return math.inf
    share = float(trainer.num_training_batches) / length
    per_epoch = share * sum(stop - start for start, stop in recipe.train_ids)
    epochs = _expected_steps(trainer) / _steps_per_epoch(trainer)
    return float(per_epoch * epochs / recipe.every_n_steps)


def _expected_steps(trainer: Trainer) -> float:
    """Return the number of optimizer steps, or infinity if it is unknown."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    max_steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    return min(epochs * _steps_per_epoch(trainer), max_steps)


def _steps_per_epoch(trainer: Trainer) -> float:
    return max(1.0, float(trainer.num_training_batches) / trainer.accumulate_grad_batches)


def _length_of(loader: Sized) -> float:
    try:
        return float(len(loader))
    except TypeError:  # A sampler may be endless.
        return math.inf
