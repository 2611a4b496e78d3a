"""The loss of each sample, by the user's own ``training_step``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.passes.batch_contents import batch_size, part_of, require_batches
from tda_lightning.passes.batches import loss_of, named_batches, step_errors, transfer
from tda_lightning.passes.model_state import Mode, preserved_state, require_model
from tda_lightning.passes.query_batches import batches_of
from tda_lightning.recording.sample_ids import IdSource, SampleLedger
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.stores.arguments import require_choice


def sample_losses(
    model: nn.Module,
    samples: Any,
    *,
    mode: Mode = "eval",
    sample_ids: IdSource | None = None,
    progress: bool = True,
) -> SampleScores:
    """Return the loss of each sample at the current weights of ``model``.

    It is the simplest score for mislabelled samples, and a bar for :func:`self_influence`. Every
    sample passes through ``training_step`` as a batch of one. So the loss may combine the samples
    of a batch in any way.

    Args:
        model: The trained LightningModule. Its state is restored afterwards.
        samples: A ``DataLoader``, usually of the training data, or a batch.
        mode: Whether the model is in evaluation or training mode.
        sample_ids: Key of the ids in a batch, or a function from a batch to its ids. By default,
            ids are inferred from the loader's sampler; for a batch, they are positions.
        progress: Show a progress bar.

    Returns:
        Losses in the order of the ids. For a sample that comes several times, it is the last one.

    Raises:
        ValueError: If ids cannot be inferred, or if ``training_step`` fails on a batch of one.
    """
    require_model(model)
    require_choice("mode", mode, Mode)
    losses: dict[int, float] = {}
    with preserved_state(model, mode), torch.enable_grad():
        for ids, batch in _with_ids(samples, sample_ids, progress):
            n = len(ids)
            parts = (part_of(batch, n, slice(row, row + 1)) for row in range(n))
            losses.update(zip(ids.tolist(), (_loss(model, part) for part in parts), strict=True))
    require_batches(losses, "samples")
    train_ids = sorted(losses)
    values = torch.tensor([losses[sample_id] for sample_id in train_ids])
    provenance = {"model": type(model).__name__, "mode": mode}
    return SampleScores(values, torch.tensor(train_ids), "loss", provenance)


def _with_ids(
    samples: Any, source: IdSource | None, progress: bool
) -> Iterator[tuple[Int[Tensor, " n"], Any]]:
    if not isinstance(samples, DataLoader) and source is None:
        yield torch.arange(batch_size(samples, "samples")), samples
        return
    ledger = SampleLedger(source)
    with named_batches(ledger, batches_of(samples), "losses", progress) as batches:
        yield from batches


def _loss(model: nn.Module, sample: Any) -> float:
    failure = f"`{type(model).__name__}.training_step` failed on a batch of one sample"
    with step_errors(failure, sample, model):
        return float(loss_of(model, transfer(model, sample)).detach())
