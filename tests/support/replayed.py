"""Compare recorded rows with autograd: replay each batch, and differentiate one loss at a time."""

from typing import Any

import torch
from lightning_models import Plain, TrainingLog, loader, quiet_trainer
from torch import Tensor, nn
from torch.nn import functional

from tda_lightning import GradientRecorder, Identity
from tda_lightning.gradients.sketching.block_maps import lay_out
from tda_lightning.stores import MemoryStore


class MeanOfLosses(Plain):
    """A module whose loss is the mean of one loss per sample."""

    def losses(self, batch: Any) -> Tensor:
        """Return the loss of each sample, shape ``(n,)``."""
        x, y = batch
        return functional.cross_entropy(self.net(x), y, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()


class ReplayLog(TrainingLog):
    """Also store the random state before each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        super().on_train_batch_start(trainer, module, batch, index)
        self.states.append(torch.get_rng_state())


def single_gradients(model: MeanOfLosses, weights: Any, batch: Any, state: Tensor, blocks: Any):
    """Return the gradient of each sample's loss in the layout of the blocks, ``(n, d)``."""
    model.load_state_dict(weights, strict=False)
    torch.set_rng_state(state)
    named = dict(model.named_parameters(remove_duplicate=False))
    names = [name for block in blocks for name in block.parameters]
    rows = []
    for loss in model.losses(batch):
        parameters = [named[name] for name in names]
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        of = dict(zip(names, grads, strict=True))
        matrices = [lay_out(block, [of[name] for name in block.parameters]) for block in blocks]
        rows.append(torch.cat([matrix.flatten() for matrix in matrices]))
    return torch.stack(rows)


def assert_rows_are_gradients(
    model: MeanOfLosses | nn.Module,
    data: Any,
    batch_size: int = 5,
    *,
    tolerance: float = 1e-10,
    reference: Any = None,
    trainer: Any = None,
    collate_fn: Any = None,
    **settings: Any,
) -> MemoryStore:
    """Train for two epochs, and compare every row with the gradient of its sample's loss.

    Args:
        model: The module, or the network of a classifier.
        data: Its training data.
        batch_size: The last batch may be smaller.
        tolerance: Largest relative error of the rows of a batch.
        reference: Changes the model before the batches are replayed.
        trainer: Settings of the trainer.
        collate_fn: Joins samples to a batch.
        settings: Settings of the recorder.
    """
    if not isinstance(model, MeanOfLosses):
        model = MeanOfLosses(model)
    store, log = MemoryStore(), ReplayLog()
    recorder = GradientRecorder(store, projector=Identity(), **settings)
    torch.manual_seed(3)
    batches = loader(data, batch_size, collate_fn=collate_fn)
    quiet_trainer(recorder, log, **(trainer or {})).fit(model, batches)
    if reference is not None:
        reference(model)
    model.train()
    assert len(store) == len(log.batches)
    seen = zip(store, log.weights, log.batches, log.states, strict=True)
    for step, weights, batch, state in seen:
        expected = single_gradients(model, weights, batch, state, store.recipe.blocks)
        expected = expected / len(expected)
        error = float((step.sketch - expected).norm() / expected.norm())
        assert error < tolerance, (step.index, len(expected), error)
    return store
